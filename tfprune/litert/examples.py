"""Examples for calibration and comparison, from whatever form the user's data have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.batches import iterate
from tfprune.errors import DataError
from tfprune.litert.keras_model import InputPort, KerasModel

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Examples:
    """Inputs for a model.

    Attributes:
        arrays: One per input, in the model's order, of shape ``(examples, ...)`` and the input's
            type.
        source: Where they came from, in words.
    """

    arrays: tuple[Array, ...]
    source: str

    def __len__(self) -> int:
        return len(self.arrays[0])

    def batches(self, size: int) -> Iterator[tuple[tuple[Array, ...], int]]:
        """Batches of exactly ``size`` examples, each with how many of them are not padding.

        The last batch is filled up by repeating its last example.
        """
        for start in range(0, len(self), size):
            parts = [array[start : start + size] for array in self.arrays]
            real = len(parts[0])
            if real < size:
                parts = [np.concatenate([p, np.repeat(p[-1:], size - real, 0)]) for p in parts]
            yield tuple(parts), real

    def first(self, count: int) -> Examples:
        """At most ``count`` of them."""
        return Examples(tuple(array[:count] for array in self.arrays), self.source)


def take_examples(data: Any, model: KerasModel, *, limit: int, argument: str) -> Examples:
    """Takes the first examples of a user's data.

    Args:
        data: As :func:`tfprune.batches.iterate` takes it; labels are ignored. The keys of a
            dictionary are the model's input names, Keras's or the stable ones.
        model: The model they are for.
        limit: At most how many to take.
        argument: What the data are called in errors.

    Raises:
        DataError: No examples, or examples that do not fit the model's inputs.
    """
    taken: list[tuple[Array, ...]] = []
    count = 0
    try:
        # no batch is empty, so as many batches as examples are enough
        for x, _ in iterate(data, batch_size=limit, limit=limit):
            arrays = tuple(map(_fitting, _inputs(x, model), model.inputs))
            taken.append(tuple(array[: limit - count] for array in arrays))
            count += len(taken[-1][0])
            if count >= limit:
                break
    except DataError as error:
        raise DataError(f"In {argument}: {error}") from error
    joined = tuple(np.concatenate(parts) for parts in zip(*taken, strict=True))
    return Examples(joined, f"the {argument} data")


def random_examples(model: KerasModel, count: int, seed: int) -> Examples:
    """Made-up examples: standard normal for float inputs, 0 or 1 for the others."""
    generator = np.random.default_rng(seed)
    arrays = []
    for port in model.inputs:
        shape = (count, *port.shape[1:])
        if port.dtype.startswith(("float", "bfloat")):
            arrays.append(generator.standard_normal(shape).astype(port.dtype))
        else:
            # 0 and 1 are valid whatever an embedding's size
            arrays.append(generator.integers(0, 2, shape).astype(port.dtype))
    return Examples(tuple(arrays), "random data")


def _inputs(x: Any, model: KerasModel) -> Sequence[Array]:
    """One array per input, out of a batch."""
    names = [port.name for port in model.inputs]
    if isinstance(x, Mapping):
        keys = [next((k for k in (p.name, *p.aliases) if k in x), None) for p in model.inputs]
        if None in keys:
            raise DataError(f"Expected the inputs {names}. Received the keys {list(x)}.")
        return [x[key] for key in keys]
    arrays = list(x) if isinstance(x, (list, tuple)) else [x]
    if len(arrays) != len(names):
        raise DataError(f"Expected as many inputs as {names}. Received {len(arrays)}.")
    return arrays


def _fitting(array: Array, port: InputPort) -> Array:
    wanted = port.shape[1:]
    if array.ndim != len(wanted) + 1 or array.shape[1:] != wanted:
        unbatched = array.shape == wanted
        advice = " It seems not to be batched: use dataset.batch(32)." if unbatched else ""
        raise DataError(
            f"Expected batches of shape (examples, {', '.join(map(str, wanted))}) for "
            f"{port.name!r}. Received: {array.shape}.{advice}"
        )
    if not np.can_cast(array.dtype, port.dtype, "same_kind"):
        raise DataError(f"Expected {port.dtype} for {port.name!r}. Received: {array.dtype}.")
    array = array.astype(port.dtype, copy=False)
    if not np.isfinite(array).all():
        raise DataError(f"Expected finite numbers for {port.name!r}. Received NaN or infinity.")
    return array
