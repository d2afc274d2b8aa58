"""Opens model files as data: nothing in them is executed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tfprune.errors import ArgumentError, ModelError
from tfprune.untrusted import (
    custom_classes,
    has_keras2_operations,
    holds_lambda,
    made_by_keras2,
    read_config,
    unsafe_for_keras2,
)

SUFFIXES = (".keras", ".h5", ".hdf5")


def model_file(path: str | os.PathLike[str]) -> Path:
    """A path that may hold a model; nothing is opened, and nothing heavy imported.

    Raises:
        ArgumentError: no such file, or a file of another kind.
    """
    file = Path(path)
    if not file.exists():
        raise ArgumentError(
            f"Expected a model file. Received: {str(file)!r}, which does not exist."
        )
    if file.suffix not in SUFFIXES or not file.is_file():
        raise ArgumentError(
            f"Expected a .keras or .h5 file. Received: {str(file)!r}. Save the model with "
            "model.save('model.keras')."
        )
    return file


def load_model(path: str | os.PathLike[str]) -> Any:
    """A model from a ``.keras`` or ``.h5`` file, uncompiled, in Keras's safe mode.

    Files that Keras 3 cannot read are opened with tf_keras (Keras 2) if that is installed, and
    then give a tf_keras model.

    Raises:
        ArgumentError: no such file, or a file of another kind.
        ModelError: the file holds Python code (a Lambda), a class that is not known, weights
            only, or is damaged.
    """
    file = model_file(path)
    config = read_config(file)
    if holds_lambda(config):
        raise ModelError(
            f"Expected a model without Python code in its file. Received: {str(file)!r}, which "
            "holds a Lambda layer; loading it could run anything. Replace the Lambda by a layer "
            "or keras.ops, or load the file yourself and call tfprune from Python."
        )
    if file.suffix == ".keras" and made_by_keras2(config):
        return _with_keras2(file, config, None)
    import keras

    try:
        return keras.saving.load_model(file, compile=False, safe_mode=True)
    # Keras raises nearly anything here, and every bit of it means: this file cannot be read.
    except Exception as error:
        if file.suffix == ".keras":
            raise ModelError(_explained(file, config, error)) from error
        return _with_keras2(file, config, error)


def _with_keras2(file: Path, config: Any, first: Exception | None) -> Any:
    """A tf_keras model, for a file that Keras 3 cannot read (its error is ``first``)."""
    unsafe = unsafe_for_keras2(config)
    if unsafe is not None:
        raise ModelError(
            f"Expected a model of Keras's own parts. Received: {str(file)!r}, which names "
            f"{unsafe}; loading it could run anything. Load it yourself where that is known, and "
            "call tfprune from Python."
        ) from first
    try:
        import tf_keras
    except ImportError as error:
        if first is not None and not has_keras2_operations(config):
            raise ModelError(_explained(file, config, first)) from first
        raise ModelError(
            f"Expected a file that Keras 3 can read. Received: {str(file)!r}, which is of Keras 2 "
            "(tf_keras), and that is not installed. Install it with: pip install "
            "'tf_keras>=2.21,<2.22'."
        ) from error
    try:
        return tf_keras.models.load_model(file, compile=False)
    except Exception as error:
        # What Keras 3 said of an .h5 file is the likelier trouble.
        raise ModelError(_explained(file, config, first or error)) from error


def _explained(file: Path, config: Any, error: Exception) -> str:
    custom = custom_classes(config) or re.findall(r"(?:Unknown layer:|class) '(\w+)'", str(error))
    if "PruneLowMagnitude" in custom:
        return (
            f"Expected a model without pruning wrappers. Received: {str(file)!r}, which has some. "
            "In Python, load it inside tfprune.prune_scope(), and save what "
            "tfprune.strip_pruning(model) returns."
        )
    if custom:
        return (
            f"Expected a model of Keras's own layers. Received: {str(file)!r}, which needs the "
            f"class {custom[0]!r}. Load the model in Python, where that class is defined, and "
            "call tfprune.prune there; a subclassed model has to be written with keras.Input "
            "and keras.Model(inputs, outputs) first."
        )
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
    return f"Expected a Keras model file that can be read. Received: {str(file)!r}: {first}."
