"""The pruning wrapper: tfmot's magnitude pruning around a Keras 3 layer.

The wrapper keeps what tfmot's keeps (a mask and a threshold for every pruned weight, and a step
counter) as Keras 3 variables, and hands the TensorFlow variables behind them to tfmot's own
``Pruning``, which computes the masks.

Reference: Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878, as tfmot implements it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from tfprune.errors import ArgumentError, ModelError
from tfprune.graph.trace import (
    framework_of,
    in_stateless_scope,
    raw_variable,
    take_call_signature,
)
from tfprune.layers.prunable import is_wrapper, prunable_of
from tfprune.schedules import ConstantSparsity, PruningSchedule, deserialize, serialize

DEFAULT_SCHEDULE = ConstantSparsity(0.5, 0)
"""tfmot's default: half of the weights from the first update on."""

NOT_STARTED = -1
"""The step counter of a wrapper that no ``UpdatePruningStep`` has seen."""


@keras.saving.register_keras_serializable(package="tfprune")
class PruneLowMagnitude(keras.layers.Wrapper):  # type: ignore[misc]
    """Prunes the small weights of a layer while it is trained.

    In every training call the step counter goes up by one; where the schedule says so, the masks
    are computed anew; then the weights are multiplied by their masks, and the layer is called. The
    first batch is step 1. The optimizer may fill masked weights again: they are masked in the next
    call, training or not, and by ``UpdatePruningStep`` at the end of every epoch. That callback is
    needed; without it the first training call raises.

    Steps are *training calls of the layer*: with gradient accumulation every forward pass counts,
    and a layer that stands twice in a model counts two steps per batch (as in tfmot).

    Attributes:
        layer: the wrapped layer.
        pruning_step: int64 variable, shape ``()``; -1 before training.
        pruning_vars: for every pruned weight (weight, mask, threshold): Keras variables; a mask has
            the shape and type of its weight, ones for weights that stay; a threshold is ``()``.

    Args:
        layer: a Keras 3 layer, built or not.
        pruning_schedule: a ``PruningSchedule`` of ``tfprune.schedules``, tfmot or your own.
        block_size: (height, width) of the blocks that are pruned as one, in kernels of two axes.
        block_pooling_type: "AVG" or "MAX": how the magnitudes in a block become one.
        sparsity_m_by_n: ``(m, n)``: zero the m smallest of every n consecutive weights along the
            input channels, once, at step 1, in kernels of two or four axes. The schedule is then
            not used.

    Raises:
        ArgumentError: an argument is not allowed, or does not fit the layer's weights.
        ModelError: the layer is no Keras 3 layer, or nobody knows which of its weights to prune.
    """

    is_pruning_wrapper = True

    def __init__(
        self,
        layer: Any,
        pruning_schedule: Any = DEFAULT_SCHEDULE,
        block_size: Sequence[int] = (1, 1),
        block_pooling_type: str = "AVG",
        sparsity_m_by_n: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_layer(layer)
        check_arguments(pruning_schedule, block_size, block_pooling_type, sparsity_m_by_n)
        kwargs["name"] = f"prune_low_magnitude_{layer.name}"
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, autocast=False, **kwargs)
        take_call_signature(self, layer)
        self.supports_masking = layer.supports_masking
        if not (layer.trainable and kwargs.get("trainable", True)):
            self.trainable = layer.trainable = False
        self.pruning_schedule = pruning_schedule
        self.block_size = tuple(map(int, block_size))
        self.block_pooling_type = block_pooling_type
        self.sparsity_m_by_n = None if sparsity_m_by_n is None else tuple(map(int, sparsity_m_by_n))
        self.pruning_vars: list[tuple[Any, Any, Any]] = []
        self.pruning_step: Any = None
        self._first_step = NOT_STARTED
        self._pruning: Any = None
        if layer.built:
            # refuses unknown layers at once, with their names
            prunable_of(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer. One with several inputs is built by a symbolic call of its own."""
        if not self.layer.built:
            tensors = [t for t in keras.tree.flatten([args, kwargs]) if hasattr(t, "shape")]
            if len(tensors) > 1:
                symbolic = keras.tree.map_structure(_symbol, (args, kwargs))
                self.layer(*symbolic[0], **symbolic[1])
        return super().__call__(*args, **kwargs)

    def build(self, input_shape: Any = None) -> None:
        """Builds the layer, and makes masks of ones for its prunable weights."""
        super().build(input_shape)
        weights = prunable_of(self.layer)
        self._check_patterns(weights)
        for weight in weights:
            # As tfmot aggregates them: replicas compute the same masks.
            options = {"dtype": weight.variable.dtype, "trainable": False, "autocast": False}
            mask = self.add_weight(
                name="mask",
                shape=weight.variable.shape,
                initializer="ones",
                aggregation="mean",
                **options,
            )
            threshold = self.add_weight(
                name="threshold", shape=(), initializer="zeros", aggregation="mean", **options
            )
            self.pruning_vars.append((weight.variable, mask, threshold))
        self.pruning_step = self.add_weight(
            name="pruning_step",
            shape=(),
            initializer=keras.initializers.Constant(self._first_step),
            dtype="int64",
            trainable=False,
            aggregation="only_first_replica",
        )
        self.built = True

    def call(self, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Updates step, masks and weights, then calls the layer."""
        if not in_stateless_scope():
            if training:
                self._require_callback()
                raw_variable(self.pruning_step).assign_add(1)
                self.pruning_obj.conditional_mask_update()
            self.mask_weights()
        return self.layer(*args, **kwargs)

    @property
    def pruning_obj(self) -> Any:
        """tfmot's ``Pruning`` on the TensorFlow variables of this wrapper."""
        if self._pruning is None:
            from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl

            step = raw_variable(self.pruning_step)
            self._pruning = pruning_impl.Pruning(
                training_step_fn=lambda: step,
                pruning_vars=[tuple(map(raw_variable, three)) for three in self.pruning_vars],
                pruning_schedule=self.pruning_schedule,
                block_size=self.block_size,
                block_pooling_type=self.block_pooling_type,
                sparsity_m_by_n=self.sparsity_m_by_n,
            )
        return self._pruning

    def start(self) -> None:
        """Sets the step counter to 0, or lets it be if training has moved it already."""
        if not self.built:
            self._first_step = 0
        elif int(np.asarray(self.pruning_step)) == NOT_STARTED:
            self.pruning_step.assign(0)

    @property
    def called_in_training(self) -> bool:
        """Whether the step counter has moved."""
        return bool(self.built and int(np.asarray(self.pruning_step)) > 0)

    def mask_weights(self) -> None:
        """Multiplies the weights by their masks, in place."""
        import tensorflow as tf

        strategy = getattr(raw_variable(self.pruning_step), "distribute_strategy", None)
        if strategy is None or strategy is tf.distribute.get_strategy():
            self.pruning_obj.weight_mask_op()
            return
        with strategy.scope():  # a model that is called outside the scope it was made in
            self.pruning_obj.weight_mask_op()

    @property
    def masks(self) -> list[NDArray[np.bool_]]:
        """The masks, ``True`` for weights that stay, in the order of ``pruning_vars``."""
        return [np.asarray(mask) != 0 for _, mask, _ in self.pruning_vars]

    def get_weights(self) -> list[Any]:
        """The weights of the layer, without masks, as tfmot's wrapper returns them."""
        return list(self.layer.get_weights())

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the weights of the layer."""
        self.layer.set_weights(weights)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """That of the layer."""
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """That of the layer."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """That of the layer: Keras's masks of time steps, nothing about pruning."""
        return self.layer.compute_mask(inputs, previous_mask)

    def get_build_config(self) -> dict[str, Any] | None:
        """That of the layer."""
        config = self.layer.get_build_config()
        return None if config is None else dict(config)

    def build_from_config(self, config: Mapping[str, Any]) -> None:
        """Builds the layer as it was built, then the masks."""
        if not self.layer.built:
            self.layer.build_from_config(config)
            self.layer.built = True
        if not self.built:
            self.build()

    def around(self, layer: Any) -> PruneLowMagnitude:
        """A wrapper like this one, not started, around another layer."""
        config = super().get_config() | {
            "layer": layer,
            "pruning_schedule": self.pruning_schedule,
            "block_size": self.block_size,
            "block_pooling_type": self.block_pooling_type,
            "sparsity_m_by_n": self.sparsity_m_by_n,
        }
        return type(self)(**config)

    def get_config(self) -> dict[str, Any]:
        """Everything that the wrapper is made from."""
        return {
            **super().get_config(),
            "pruning_schedule": serialize(self.pruning_schedule),
            "block_size": list(self.block_size),
            "block_pooling_type": self.block_pooling_type,
            "sparsity_m_by_n": None if self.sparsity_m_by_n is None else [*self.sparsity_m_by_n],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Makes the wrapper again; a custom schedule is looked up in ``custom_objects``."""
        config = dict(config)
        schedule = deserialize(config.pop("pruning_schedule"), custom_objects)
        layer = keras.saving.deserialize_keras_object(config.pop("layer"), custom_objects)
        return cls(layer, pruning_schedule=schedule, **config)

    def _require_callback(self) -> None:
        """Raises where no callback started the counter: while tracing, so that XLA says it too."""
        import tensorflow as tf

        with tf.init_scope():
            variable = raw_variable(self.pruning_step)
            # a layer that is built while it is traced gets its values afterwards
            known = bool(variable.is_initialized())
            step = int(np.asarray(variable)) if known else self._first_step
        if step == NOT_STARTED:
            raise ArgumentError(
                "Expected the callback tfprune.UpdatePruningStep() in training, without which "
                f"nothing is pruned. Received: a training call of {self.name!r} without it. Add "
                "callbacks=[tfprune.UpdatePruningStep()] to fit; in a training loop of your own, "
                "make the callback, call its set_model(model) and on_train_begin() before the "
                "first step, and on_epoch_end(epoch) after every epoch."
            )

    def _check_patterns(self, weights: Sequence[Any]) -> None:
        for weight in weights:
            rank, where = len(weight.variable.shape), f"{self.layer.name}/{weight.name}"
            shape = tuple(weight.variable.shape)
            if self.block_size != (1, 1) and rank != 2:
                raise ArgumentError(
                    f"Expected weights of 2 axes for block_size={self.block_size}. Received: "
                    f"{where!r} of shape {shape}. Wrap only the Dense layers with blocks, and the "
                    "others with block_size=(1, 1)."
                )
            blocks = [-(-n // size) for n, size in zip(shape, self.block_size, strict=False)]
            if self.block_size != (1, 1) and min(blocks) < 2:
                raise ArgumentError(
                    f"Expected room for 2 blocks or more along both axes for block_size="
                    f"{self.block_size}, as tfmot's block pruning needs it. Received: {where!r} of "
                    f"shape {shape}, with {blocks[0]} x {blocks[1]} blocks. Take smaller blocks "
                    "there, or wrap that layer with block_size=(1, 1)."
                )
            if self.sparsity_m_by_n is not None and rank not in (2, 4):
                raise ArgumentError(
                    f"Expected weights of 2 or 4 axes for sparsity_m_by_n={self.sparsity_m_by_n}. "
                    f"Received: {where!r} of shape {shape}. Wrap only Dense and Conv2D layers."
                )


def check_arguments(
    pruning_schedule: Any,
    block_size: Any,
    block_pooling_type: Any,
    sparsity_m_by_n: Any,
) -> None:
    """Refuses arguments of the wrapper that make no sense for any layer.

    Raises:
        ArgumentError: with what was expected, what came, and what to do.
    """
    if not isinstance(pruning_schedule, PruningSchedule):
        raise ArgumentError(
            "Expected pruning_schedule to be a PruningSchedule, such as "
            "tfprune.schedules.Polynomial(0.0, 0.8, 0, 1000). "
            f"Received: {type(pruning_schedule).__name__}."
        )
    if not _whole_numbers(block_size, 2) or min(block_size) < 1:
        raise ArgumentError(
            f"Expected block_size to be two whole numbers from 1, (height, width). "
            f"Received: {block_size!r}."
        )
    if block_pooling_type not in ("AVG", "MAX"):
        raise ArgumentError(
            f"Expected block_pooling_type to be 'AVG' or 'MAX'. Received: {block_pooling_type!r}."
        )
    if sparsity_m_by_n is not None and (
        not _whole_numbers(sparsity_m_by_n, 2) or not 0 < sparsity_m_by_n[0] < sparsity_m_by_n[1]
    ):
        raise ArgumentError(
            "Expected sparsity_m_by_n to be two whole numbers (m, n), 0 < m < n: m zeros in "
            f"every n weights, such as (2, 4). Received: {sparsity_m_by_n!r}."
        )


def _whole_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == count
        and all(isinstance(item, Integral) and not isinstance(item, bool) for item in value)
    )


def _check_layer(layer: Any) -> None:
    if is_wrapper(layer):
        raise ModelError(
            f"Expected a layer without pruning wrapper. Received: {layer.name!r}, which has one."
        )
    if not isinstance(layer, keras.layers.Layer):
        known = framework_of(layer)
        hint = (
            " It is a layer of tf_keras: tfprune.prune_low_magnitude hands those to tfmot."
            if known == "tf_keras"
            else ""
        )
        raise ModelError(f"Expected a Keras 3 layer. Received: {type(layer).__name__}.{hint}")
    if keras.backend.backend() != "tensorflow":
        raise ModelError(
            "Expected Keras on TensorFlow, on which tfmot's pruning runs. Received: backend "
            f"{keras.backend.backend()!r}. Set KERAS_BACKEND to tensorflow."
        )


def _symbol(value: Any) -> Any:
    if not hasattr(value, "shape") or isinstance(value, keras.KerasTensor):
        return value
    return keras.KerasTensor(value.shape, keras.backend.standardize_dtype(value.dtype))
