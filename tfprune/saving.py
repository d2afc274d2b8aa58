"""Writes Keras models whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from tfprune.errors import ArgumentError
from tfprune.writing import replacing, writable_target

_SUFFIXES = (".keras", ".h5")


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path, if a model file can be written there.

    Raises:
        ArgumentError: another kind of file, or a folder that does not exist.
        FileError: the place cannot be written.
    """
    if Path(path).suffix not in _SUFFIXES:
        raise ArgumentError(
            f"Expected an output file ending in {' or '.join(_SUFFIXES)}. "
            f"Received: {os.fspath(path)!r}."
        )
    return writable_target(path)


def save_model(model: Any, path: str | os.PathLike[str]) -> None:
    """Saves a model of Keras 3 or tf_keras; the file appears whole or not at all.

    Raises:
        ArgumentError, FileError: as :func:`check_target`.
    """
    target = check_target(path)
    with replacing(target) as temporary, tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # Keras tells the format by the suffix, which the temporary file has not.
        staged = Path(folder) / f"model{target.suffix}"
        model.save(staged)
        os.replace(staged, temporary)
