"""Opens model files as data: nothing in them is executed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tfprune.errors import ArgumentError, ModelError


def load_model(path: str | os.PathLike[str]) -> Any:
    """A model from a ``.keras`` or ``.h5`` file, uncompiled, in Keras's safe mode.

    ``.h5`` files that Keras 3 cannot read are opened with tf_keras (Keras 2) if that is installed,
    and then give a tf_keras model.

    Raises:
        ArgumentError: no such file, or a file of another kind.
        ModelError: the file holds Python code (a Lambda), a class that is not known, or is damaged.
    """
    file = Path(path)
    if not file.exists():
        raise ArgumentError(
            f"Expected a model file. Received: {str(file)!r}, which does not exist."
        )
    if file.suffix not in (".keras", ".h5", ".hdf5"):
        raise ArgumentError(
            f"Expected a .keras or .h5 file. Received: {str(file)!r}. Save the model with "
            "model.save('model.keras')."
        )
    if file.suffix != ".keras":
        _refuse_code(file)
    import keras

    try:
        return keras.saving.load_model(file, compile=False, safe_mode=True)
    except Exception as error:
        if file.suffix != ".keras":
            model = _with_keras2(file)
            if model is not None:
                return model
        raise ModelError(_explained(file, error)) from error


def _explained(file: Path, error: Exception) -> str:
    text = str(error)
    if "ambda" in text:
        return (
            f"Expected a model without Python code in its file. Received: {str(file)!r}, which "
            "holds a Lambda layer; loading it could run anything. Replace the Lambda by a layer "
            "or keras.ops, or load the file yourself and call tfprune from Python."
        )
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return (
        f"Expected a Keras model file that can be read. Received: {str(file)!r}: {first} "
        "If it has custom layers, load it in Python, where they are known, and call "
        "tfprune.prune there."
    )


def _refuse_code(file: Path) -> None:
    """An ``.h5`` file with a Lambda holds marshalled byte code, which Keras 2 would run."""
    import h5py

    try:
        with h5py.File(file, "r") as archive:
            text = archive.attrs.get("model_config")
    except OSError as error:
        raise ModelError(
            f"Expected an HDF5 file. Received: {str(file)!r}, which is damaged or none: {error}."
        ) from error
    if text is None:
        raise ModelError(
            f"Expected a whole model. Received: {str(file)!r}, which holds weights only. Build "
            "the model, load_weights, and save it with model.save('model.keras')."
        )
    config = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    if _has_class(config, "Lambda"):
        raise ModelError(_explained(file, ValueError("Lambda")))


def _has_class(config: Any, name: str) -> bool:
    if isinstance(config, dict):
        return config.get("class_name") == name or any(
            _has_class(value, name) for value in config.values()
        )
    if isinstance(config, list):
        return any(_has_class(item, name) for item in config)
    return False


def _with_keras2(file: Path) -> Any:
    try:
        import tf_keras
    except ImportError:
        return None
    try:
        return tf_keras.models.load_model(file, compile=False)
    except Exception:  # noqa: BLE001 - Keras 3's own error is the one to report
        return None
