"""What a method changes of a training step: a layer that holds its state, and an optimizer around.

Most training-time methods change how weights are updated, not what the network computes: a penalty
adds to gradients, a proximal step follows the optimizer's, some weights have a rule of their own. A
:class:`MethodUpdate` says which; its state (masks, counters, multipliers) are non-trainable weights
of the model in training, so that they are saved, restored and distributed with it.
:class:`MethodOptimizer` puts it around any Keras optimizer, as ``LossScaleOptimizer`` does with the
loss scale, and :class:`~tfprune.layers.method_model.MethodModel` puts both into ``compile``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import keras

from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph

Gradients = dict[int, Any]
"""Gradient tensors by ``id`` of the Keras variable; a weight without a gradient is not in it."""


@keras.saving.register_keras_serializable(package="tfprune")
class MethodUpdate(keras.layers.Layer):  # type: ignore[misc]
    """What a method does in every training step. It stands for itself and changes nothing.

    Subclasses are hyper-parameters (in ``get_config``) and state (made in :meth:`bind`, with
    :meth:`state`), and override what they need of :meth:`gradients`, :meth:`owned` and
    :meth:`update`. All three are traced into the training function: write them with ``keras.ops``,
    without Python state that changes. Register them with
    ``keras.saving.register_keras_serializable(package="tfprune")``.

    In a training on several devices they run once for all of them, on gradients that are summed
    over the devices already.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"name": "method_update", "trainable": False, **kwargs})
        self.held = SimpleNamespace()
        self.built = True

    def get_config(self) -> dict[str, Any]:
        """The hyper-parameters: the arguments that make this update again."""
        return {}

    def bind(self, graph: ChannelGraph) -> None:
        """Remembers the weights that matter, with :meth:`hold`, and makes the state.

        Called once for a model, before training or loading.

        Args:
            graph: of the model in training.
        """

    def hold(self, **things: Any) -> None:
        """Sets attributes of ``self.held``: for weights of the model and what is made from them.

        As attributes of the layer itself Keras would take them for weights of its own.
        """
        vars(self.held).update(things)

    def state(
        self, name: str, value: Any = None, *, shape: Sequence[int] = (), dtype: str = "float32"
    ) -> Any:
        """A new non-trainable weight.

        Args:
            name: of the weight; unique in this update.
            value: array of its first values; without one it is zeros of ``shape``.
            shape, dtype: of the weight.
        """
        if value is not None:
            shape = keras.ops.shape(value)
        weight = self.add_weight(
            name=name,
            shape=tuple(shape),
            initializer="zeros",
            dtype=dtype,
            trainable=False,
            autocast=False,
            # assigned once for all replicas, outside their context
            aggregation="only_first_replica",
        )
        if value is not None:
            weight.assign(value)
        return weight

    @property
    def owned(self) -> Sequence[Any]:
        """Trainable weights that this updates itself: the optimizer does not get them.

        Neither momentum nor weight decay touches them. The gradients of L2 penalties that
        ``fine_tune`` adds leave them out, too.
        """
        return ()

    def gradients(self, gradients: Gradients, learning_rate: Any) -> Gradients:
        """The gradients that the optimizer is given, from those of the task's loss.

        It only reads; what is assigned is assigned in :meth:`update`.

        Args:
            gradients: by ``id`` of the weight, owned ones included.
            learning_rate: float32 scalar of this step.
        """
        return gradients

    def update(self, gradients: Gradients, learning_rate: Any) -> None:
        """Assigns weights and state after the optimizer's step.

        Args:
            gradients: as :meth:`gradients` returned them, with those of :attr:`owned`.
            learning_rate: float32 scalar of this step.
        """

    def figures(self) -> Mapping[str, float]:
        """Numbers to watch, such as a penalty; written to the logs of every epoch."""
        return {}

    def call(self, inputs: Any) -> Any:
        """The inputs, as they are."""
        return inputs


@keras.saving.register_keras_serializable(package="tfprune")
class MethodOptimizer(keras.optimizers.Optimizer):  # type: ignore[misc]
    """Any Keras optimizer, and a method's update around each of its steps.

    ``MethodModel.compile`` makes it. Learning rate, iterations and variables are the inner
    optimizer's.

    Attributes:
        inner: the optimizer.
        method: the :class:`MethodUpdate`, or ``None`` before a model has given its own.

    Args:
        inner: a Keras 3 optimizer.
        method: see above.

    Raises:
        ArgumentError: an inner optimizer that does not step with every batch.
    """

    def __init__(
        self, inner: Any, method: MethodUpdate | None = None, name: str | None = None
    ) -> None:
        if getattr(inner, "gradient_accumulation_steps", None):
            raise ArgumentError(
                "Expected an optimizer that steps with every batch. Received one with "
                f"gradient_accumulation_steps={inner.gradient_accumulation_steps}. Use a larger "
                "batch instead."
            )
        super().__init__(learning_rate=0.0, name=name or "method_optimizer")
        self.inner = inner
        # Not tracked: its weights are the model's.
        object.__setattr__(self, "method", method)

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the inner optimizer's variables, for the weights that are its own."""
        own = {id(variable) for variable in self._owned()}
        self.inner.build([variable for variable in variables if id(variable) not in own])
        super().build(list(variables))

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """One step: the method's gradients, the inner optimizer, the method's update."""
        import tensorflow as tf

        if trainable_variables is None:
            trainable_variables = self._trainable_variables
        variables = list(trainable_variables)
        if not self.built:
            self.build(variables)
        pairs = [(v, g) for v, g in zip(variables, grads, strict=True) if g is not None]
        variables = [variable for variable, _ in pairs]
        dense = [tf.convert_to_tensor(gradient) for _, gradient in pairs]
        replica = tf.distribute.get_replica_context()
        replicas = 1 if replica is None else replica.num_replicas_in_sync
        if replicas > 1:
            dense = replica.all_reduce(tf.distribute.ReduceOp.SUM, dense)
        gradients: Gradients = {id(v): g for v, g in zip(variables, dense, strict=True)}
        if self.method is not None:
            gradients = self.method.gradients(gradients, self._rate())
            # What gradients() reads it has read before anything is assigned. TensorFlow's graph
            # optimizer can lose that order (seen with 2.21 on a CPU), so it is data here.
            with tf.control_dependencies(list(gradients.values())):
                gradients = {key: tf.identity(value) for key, value in gradients.items()}
        own = {id(variable) for variable in self._owned()}
        given = [v for v in variables if id(v) not in own]
        # The inner optimizer adds up what the replicas give it.
        self.inner.apply([gradients[id(v)] / replicas for v in given], given)
        if self.method is None:
            return
        if replicas == 1:
            self.method.update(gradients, self._rate())
            return

        def together(strategy: Any, values: Sequence[Any]) -> None:
            first = [strategy.experimental_local_results(value)[0] for value in values]
            self.method.update(dict(zip(gradients, first, strict=True)), self._rate())

        replica.merge_call(together, args=(list(gradients.values()),))

    def _rate(self) -> Any:
        return keras.ops.cast(self.inner.learning_rate, "float32")

    def _owned(self) -> Sequence[Any]:
        return () if self.method is None else self.method.owned

    @property
    def variables(self) -> list[Any]:
        """The inner optimizer's variables."""
        return list(self.inner.variables)

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate."""
        return self.inner.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """The inner optimizer's count of steps."""
        return self.inner.iterations

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Does what the inner optimizer does at the end of training, such as writing averages."""
        own = {id(variable) for variable in self._owned()}
        self.inner.finalize_variable_values([v for v in var_list if id(v) not in own])

    def save_own_variables(self, store: Any) -> None:
        """Saves the inner optimizer's variables."""
        self.inner.save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Loads the inner optimizer's variables."""
        self.inner.load_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        """The inner optimizer's configuration; the method is the model's."""
        return {
            "name": self.name,
            "inner": keras.saving.serialize_keras_object(self.inner),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> MethodOptimizer:
        """Without a method, which ``compile`` of the model puts in."""
        inner = keras.saving.deserialize_keras_object(
            config["inner"], custom_objects=custom_objects
        )
        return cls(inner, name=config["name"])
