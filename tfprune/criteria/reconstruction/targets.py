"""What the original network answers at the sampled positions: the targets of least squares."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfprune.criteria.reconstruction.readers import Indices, Matrix, Reader, draw, inputs_at
from tfprune.criteria.reconstruction.sums import Sum, sum_behind
from tfprune.graph import ChannelGraph

# Bytes of targets that are kept; beyond, the original network is evaluated again.
_MOST_BYTES = 2**29


@dataclass(frozen=True, eq=False)
class Answer:
    """Targets of one reader for one batch and one call.

    Attributes:
        examples, places: the sampled positions, shape (rows,) each.
        targets: shape (groups, rows, filters / groups), float32: the reader's response without the
            bias, and the other summands of a sum in the reader's units.
    """

    examples: Indices
    places: Indices
    targets: Any


@dataclass(eq=False)
class Originals:
    """The original network's answers, kept from one visit of the data to the next while they fit.

    A batch is known again by its place and a checksum of its values, so that data in another order
    each time are read anew.

    Attributes:
        source: the original network.
        readers: all that will be asked for.
        positions, seed: as in :class:`~tfprune.criteria.reconstruction.moments.Sampling`.
        residual: whether targets include the other summands of a sum.
    """

    source: ChannelGraph
    readers: Sequence[Reader]
    positions: int
    seed: int
    residual: bool
    _known: dict[tuple[int, int | None, str], list[Answer]] = field(default_factory=dict)
    _bytes: int = 0

    def __post_init__(self) -> None:
        self.sums: dict[str, Sum] = {}
        for reader in self.readers if self.residual else ():
            found = sum_behind(self.source, reader)
            if found is not None:
                self.sums[reader.path] = found
        self._matrices = {reader.path: reader.matrix(reader.kernel) for reader in self.readers}

    def at(
        self, number: int, batch: Sequence[Any], readers: Sequence[Reader]
    ) -> Mapping[str, list[Answer]]:
        """The answers for one batch by the readers' paths, one per time that a reader runs."""
        mark = _checksum(batch)
        keys = {reader.path: (number, mark, reader.path) for reader in readers}
        if mark is None or not all(key in self._known for key in keys.values()):
            keep = mark is not None and self._bytes < _MOST_BYTES
            asked = self.readers if keep else readers
            found = self._evaluate(number, batch, asked)
            if not keep:
                return found
            for path, answers in found.items():
                self._known[number, mark, path] = answers
                self._bytes += sum(answer.targets.nbytes for answer in answers)
        return {path: self._known[key] for path, key in keys.items()}

    def _evaluate(
        self, number: int, batch: Sequence[Any], readers: Sequence[Reader]
    ) -> dict[str, list[Answer]]:
        calls = {call for reader in readers for call in reader.calls}
        calls |= {self.sums[r.path].call for r in readers if r.path in self.sums}
        seen = inputs_at(self.source, batch, calls, {})
        result: dict[str, list[Answer]] = {}
        for reader in readers:
            random = np.random.default_rng([self.seed, number, reader.number])
            result[reader.path] = []
            for tensor in (tensors[0] for call in reader.calls for tensors in seen[call]):
                drawn = draw(reader, tensor, self.positions, random)
                targets = reader.rows(tensor, *drawn) @ self._matrices[reader.path]
                behind = self.sums.get(reader.path)
                if behind is not None:
                    targets = targets + summands(reader, behind, seen[behind.call][0], *drawn)
                result[reader.path].append(Answer(*drawn, targets.astype(np.float32)))
        return result


def summands(
    reader: Reader, behind: Sum, tensors: Sequence[Any], examples: Indices, places: Indices
) -> Matrix:
    """The other summands of a sum in the reader's units, in the shape of targets.

    Args:
        reader: whose output is added to them.
        behind: the sum.
        tensors: the inputs of the sum.
        examples, places: the sampled positions.
    """
    total = np.sum([reader.outputs_at(tensors[i], examples, places) for i in behind.others], 0)
    grouped = (behind.factor * total).reshape(len(total), reader.groups, -1)
    return np.moveaxis(grouped, 1, 0)


def _checksum(batch: Sequence[Any]) -> int | None:
    """Of the values of a batch; ``None`` for objects (strings)."""
    result = 0
    for part in batch:
        array = np.ascontiguousarray(part)
        if array.dtype == object:
            return None
        result = zlib.crc32(array.tobytes(), result)
    return result
