"""Writes Keras models whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from tfprune.errors import ArgumentError


def check_target(path: str | os.PathLike[str], suffixes: tuple[str, ...] = (".keras",)) -> Path:
    """The path, if a file can be written there.

    Raises:
        ArgumentError: another kind of file, a folder that does not exist or cannot be written.
    """
    target = Path(path)
    if target.suffix not in suffixes:
        raise ArgumentError(
            f"Expected an output file ending in {' or '.join(suffixes)}. Received: {str(target)!r}."
        )
    folder = target.parent
    if not folder.is_dir():
        raise ArgumentError(
            f"Expected an output path in a folder that exists. Received: {str(target)!r}; there "
            f"is no folder {str(folder)!r}. Create it first."
        )
    if target.is_dir() or not os.access(folder, os.W_OK):
        raise ArgumentError(
            f"Expected an output path that can be written. Received: {str(target)!r}."
        )
    return target


def save_model(model: Any, path: str | os.PathLike[str]) -> None:
    """Saves a model beside its target and moves it there in one step.

    Raises:
        ArgumentError: the path cannot be written.
    """
    target = check_target(path, (".keras", ".h5"))
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.stem}.", suffix=target.suffix
    )
    os.close(handle)
    temporary = Path(name)
    try:
        model.save(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
