"""Keras 3 and tf_keras, told apart without importing the other one."""

from __future__ import annotations

from typing import Any

from tfprune.errors import ModelError
from tfprune.graph.trace import framework_module, framework_of, is_model


def framework(model: Any) -> Any:
    """The module a model belongs to: ``keras`` (3) or ``tf_keras`` (2).

    Raises:
        ModelError: it is no Keras model, or its weights do not exist yet.
    """
    name = framework_of(model)
    if name is None or not is_model(model):
        raise ModelError(f"Expected a Keras 3 or tf_keras model; received {type(model).__name__}.")
    if not model.built:
        raise ModelError(
            f"The model {model.name!r} has no weights yet. Call it on a batch, or build() it with "
            "an input shape."
        )
    return framework_module(name)


def is_keras_3(keras: Any) -> bool:
    """Whether a module that :func:`framework` returned is Keras 3."""
    return bool(keras.__name__ == "keras")


def as_array(keras: Any, tensor: Any) -> Any:
    """A tensor or variable as a numpy array, of whatever backend."""
    if is_keras_3(keras) and keras.backend.backend() != "tensorflow":
        return keras.ops.convert_to_numpy(tensor)
    # TensorFlow's own way: numpy 2 warns of ops.convert_to_numpy's.
    return tensor.numpy()
