"""A functional model that trains by a method."""

from __future__ import annotations

from typing import Any

import keras

from tfprune.errors import ModelError
from tfprune.graph import analyse
from tfprune.graph.copying import copy_model
from tfprune.graph.trace import ends_of, is_plain
from tfprune.layers.updates import MethodOptimizer, MethodUpdate


@keras.saving.register_keras_serializable(package="tfprune")
class MethodModel(keras.Model):  # type: ignore[misc]
    """A functional model whose ``compile`` puts a method's update around the optimizer.

    It is compiled, trained, evaluated, saved and loaded like any functional model; its outputs are
    those of the model that it was made from. :meth:`of` makes it.

    Attributes:
        update: the method's part of a training step, a layer that holds its state.
    """

    # The arguments of a functional model: Keras then makes it again like one.
    def __init__(
        self, inputs: Any = None, outputs: Any = None, name: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(inputs=inputs, outputs=outputs, name=name, **kwargs)
        self.update: MethodUpdate | None = None

    @classmethod
    def of(cls, model: Any, update: MethodUpdate) -> MethodModel:
        """A copy of a model, weights included, that trains by ``update``.

        Args:
            model: a built functional or sequential Keras 3 model on TensorFlow; it stays as it is.
            update: not bound yet.

        Raises:
            ModelError: another kind of model, or one of a class of your own, whose ``train_step``
                would be lost.
        """
        require_tensorflow()
        copy = copy_model(model)
        if not is_plain(copy):
            raise ModelError(
                "Expected a functional or sequential model of Keras's own classes. Received one of "
                f"class {type(copy).__name__}, whose methods would be lost. Pass "
                "keras.Model(model.inputs, model.outputs)."
            )
        result = cls(*ends_of(copy), name=copy.name)
        result.dtype_policy = model.dtype_policy
        result.attach(update)
        return result

    def attach(self, update: MethodUpdate) -> None:
        """Binds an update to this model."""
        update.bind(analyse(self))
        self.update = update

    def compile(self, optimizer: Any = "rmsprop", *args: Any, **kwargs: Any) -> None:
        """As ``keras.Model.compile``, with the method's update around the optimizer."""
        if self.update is not None and optimizer is not None:
            optimizer = keras.optimizers.get(optimizer)
            around = optimizer
            if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
                around = optimizer.inner_optimizer
            if not isinstance(around, MethodOptimizer):
                around = MethodOptimizer(around)
            object.__setattr__(around, "method", self.update)
            if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
                optimizer.inner_optimizer = around
            else:
                optimizer = around
        super().compile(optimizer, *args, **kwargs)
        if self.optimizer is not None:
            # Variables made within the first step would have TensorFlow trace it twice.
            self.optimizer.build(self.trainable_variables)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles as it was compiled when it was saved."""
        self.compile(**keras.saving.deserialize_keras_object(config))

    def get_config(self) -> dict[str, Any]:
        """The functional model's configuration, and the update's."""
        config: dict[str, Any] = super().get_config()
        config["policy"] = self.dtype_policy.name
        if self.update is not None:
            config["update"] = keras.saving.serialize_keras_object(self.update)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> MethodModel:
        """The model with its update, whose state is loaded with the weights."""
        update, policy = config.pop("update", None), config.pop("policy")
        model: MethodModel = super().from_config(config, custom_objects=custom_objects)
        model.dtype_policy = policy
        if update is not None:
            made = keras.saving.deserialize_keras_object(update, custom_objects=custom_objects)
            model.attach(made)
        return model


def require_tensorflow() -> None:
    """Raises :class:`ModelError` if Keras runs on another backend."""
    if keras.backend.backend() != "tensorflow":
        raise ModelError(
            "Expected a model on TensorFlow, on which the training-time methods run. Received: a "
            f"model on the Keras backend {keras.backend.backend()!r}. Set KERAS_BACKEND to "
            "tensorflow before importing keras."
        )
