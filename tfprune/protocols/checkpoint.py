"""Training states on disk: whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tfprune.errors import ArgumentError
from tfprune.protocols.framework import as_array

FORMAT = 1
Array = np.ndarray[Any, Any]


@dataclass
class TrainingState:
    """Where a training run stands after a number of whole epochs.

    Attributes:
        epochs: finished epochs.
        stopped: a callback ended the training.
        history: values per epoch.
        seconds: wall-clock time of the finished epochs.
        weights: of the model, in its own order.
        optimizer: its variables, in its own order.
        best: weights of the best epoch; empty unless they are to be restored.
    """

    epochs: int = 0
    stopped: bool = False
    history: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    weights: list[Array] = field(default_factory=list)
    optimizer: list[Array] = field(default_factory=list)
    best: list[Array] = field(default_factory=list)


_ARRAYS = ("weights", "optimizer", "best")


def save(path: Path, state: TrainingState, settings: dict[str, Any]) -> None:
    """Writes a state to one file, which is replaced in one step: a crash leaves the former one."""
    description = {key: value for key, value in vars(state).items() if key not in _ARRAYS}
    header = json.dumps({"format": FORMAT, "settings": settings, **description})
    content = {"header": np.frombuffer(header.encode(), np.uint8)}
    for part in _ARRAYS:
        content |= {f"{part}/{i:05d}": array for i, array in enumerate(getattr(state, part))}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **content)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: Path, settings: dict[str, Any]) -> TrainingState:
    """Reads a state and checks that it is one of this run.

    Raises:
        ArgumentError: the file is damaged, no checkpoint, or of a run with other settings.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            header = json.loads(archive["header"].tobytes())
            parts: dict[str, Any] = {
                part: [archive[key] for key in sorted(archive.files) if key.startswith(f"{part}/")]
                for part in _ARRAYS
            }
        form, recorded = header.pop("format"), header.pop("settings")
        if form != FORMAT:
            raise ValueError(f"format {form}, where this version of tfprune writes {FORMAT}")
        state = TrainingState(**header, **parts)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ArgumentError(
            f"{path} is no training checkpoint that can be read ({type(error).__name__}: {error}). "
            "Remove it, or give another path."
        ) from error
    # As written: JSON makes lists of tuples.
    settings = json.loads(json.dumps(settings))
    changed = [
        f"{key}: {recorded.get(key)!r} there, {settings.get(key)!r} here"
        for key in sorted({*recorded, *settings})
        if recorded.get(key) != settings.get(key)
    ]
    if changed:
        raise ArgumentError(
            f"The checkpoint {path} is of another run ({'; '.join(changed)}). Give another path, "
            "or resume=False to overwrite it."
        )
    return state


def read_variables(keras: Any, variables: Sequence[Any]) -> list[Array]:
    """Copies of the values of Keras variables, in dtypes that numpy can write."""
    arrays = (np.asarray(as_array(keras, variable)) for variable in variables)
    # Numpy knows bfloat16 by an extension only; float32 holds it exactly.
    return [a.astype(np.float32) if a.dtype.name == "bfloat16" else a.copy() for a in arrays]


def write_variables(variables: Sequence[Any], values: Sequence[Array], what: str) -> None:
    """Assigns values that were read from the like variables.

    Raises:
        ArgumentError: other numbers or shapes.
    """
    shapes = [tuple(variable.shape) for variable in variables]
    if shapes != [value.shape for value in values]:
        raise ArgumentError(
            f"The checkpoint does not fit: {what} has {len(shapes)} variables, of other shapes "
            f"than the {len(values)} on file. Give another path, or resume=False."
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
