"""Keras 3 and tf_keras, told apart without importing the other one."""

from __future__ import annotations

import importlib
from typing import Any

from tfprune.errors import ModelError


def framework(model: Any) -> Any:
    """The module a model belongs to: ``keras`` (3) or ``tf_keras`` (2).

    Raises:
        ModelError: it is no Keras model, or its weights do not exist yet.
    """
    origins = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    for name in ("tf_keras", "keras"):
        if name in origins:
            module = importlib.import_module(name)
            if isinstance(model, module.Model):
                if not model.built:
                    raise ModelError(
                        f"The model {model.name!r} has no weights yet. Call it on a batch, or "
                        "build() it with an input shape."
                    )
                return module
    raise ModelError(f"Expected a Keras 3 or tf_keras model; received {type(model).__name__}.")


def is_keras_3(keras: Any) -> bool:
    """Whether a module that :func:`framework` returned is Keras 3."""
    return bool(keras.__name__ == "keras")


def as_array(keras: Any, tensor: Any) -> Any:
    """A tensor or variable as a numpy array, of whatever backend."""
    if is_keras_3(keras) and keras.backend.backend() != "tensorflow":
        return keras.ops.convert_to_numpy(tensor)
    # TensorFlow's own way: numpy 2 warns of ops.convert_to_numpy's.
    return tensor.numpy()
