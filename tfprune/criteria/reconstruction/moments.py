r"""Second moments of a reader's rows, streamed over the data.

For a reader with rows X of the present network (shape (rows, inputs * taps)) and targets Y (shape
(rows, filters)) these are all that selection and least squares need:

.. math:: A = X^\top X, \quad D = X^\top Y, \quad e = \operatorname{tr} Y^\top Y.

Targets are the original network's responses at the same examples and positions, without the bias.

Memory does not depend on the amount of data: for each reader ``16 P^2 + 16 P F`` bytes (A, D and
one update of each in float64; ``P`` = inputs * taps, ``F`` = filters), the readers' inputs for one
batch, and up to 0.5 GB of targets that are kept from one visit of the data to the next. A
convolution of 512 channels and 3 x 3 has P = 4,608 and A takes 170 MB; a dense layer with 25,088
rows (VGG-16 at 224 pixels) takes 5 GB: leave the group in front of it out with ``ignore``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.batches import iterate
from tfprune.criteria.reconstruction.readers import Matrix, Reader, draw, inputs_at, readers_of
from tfprune.criteria.reconstruction.sums import sum_behind
from tfprune.criteria.reconstruction.targets import Originals, summands
from tfprune.errors import ArgumentError, DataError
from tfprune.graph import ChannelGraph
from tfprune.graph.evaluate import flatten
from tfprune.graph.masking import MaskedModel


@dataclass(frozen=True)
class Sampling:
    """Which examples and output positions are looked at.

    Attributes:
        data: training data; labels are not used.
        images: how many examples, the first of the data; ``None`` for all.
        positions: output positions drawn per example and reader.
        seed: of the positions.
        batch_size: examples that the networks see at once (a dataset has its own batches).
    """

    data: Any
    images: int | None
    positions: int
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("images", "positions", "batch_size"):
            value = getattr(self, name)
            if value is None and name == "images":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(
                    f"Expected {name} to be a positive whole number. Received: {value!r}."
                )

    def batches(self, graph: ChannelGraph) -> Iterator[list[Any]]:
        """Batches with one array per input.

        Raises:
            DataError: no examples, or they do not fit the model.
        """
        left = self.images
        shape = getattr(graph.model, "input_shape", None)
        # Every batch holds at least one example, so that the limit ends a dataset without an end.
        for x, _ in iterate(
            self.data, batch_size=self.batch_size, limit=self.images, input_shape=shape
        ):
            inputs = flatten(x)
            if left is not None:
                inputs = [part[:left] for part in inputs]
                left -= len(inputs[0])
            for start in range(0, len(inputs[0]), self.batch_size):
                yield [part[start : start + self.batch_size] for part in inputs]
            if left == 0:
                return


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of one reader.

    Attributes:
        gram: A, shape (groups, P, P).
        cross: D, shape (groups, P, filters / groups); ``None`` without targets.
        energy: tr Y'Y for each filter, shape (groups, filters / groups); ``None`` without targets.
        rows: how many rows there were.
    """

    gram: Matrix
    cross: Matrix | None
    energy: Matrix | None
    rows: int


class _Sink:
    """Moments in the making."""

    def __init__(self, reader: Reader, targets: bool) -> None:
        groups, size, filters = reader.matrix(reader.kernel).shape
        self.path = reader.path
        self.gram = np.zeros((groups, size, size))
        self.cross = np.zeros((groups, size, filters)) if targets else None
        self.energy = np.zeros((groups, filters)) if targets else None
        self.rows = 0

    def add(self, rows: Matrix, targets: Matrix | None = None) -> None:
        if not np.isfinite(rows).all() or not (targets is None or np.isfinite(targets).all()):
            raise DataError(
                f"Expected finite activations. Received: NaN or infinity at the input of "
                f"{self.path!r}. Look at the data, and at the model's outputs for them."
            )
        self.rows += rows.shape[1]
        for number, x in enumerate(rows):
            self.gram[number] += x.T @ x
            if targets is not None and self.cross is not None and self.energy is not None:
                self.cross[number] += x.T @ targets[number]
                self.energy[number] += (targets[number] ** 2).sum(0)

    def moments(self) -> Moments:
        return Moments(self.gram, self.cross, self.energy, self.rows)


def own_moments(
    graph: ChannelGraph,
    readers: Sequence[Reader],
    sampling: Sampling,
    override: Mapping[int, Any] | None = None,
) -> dict[str, Moments]:
    """Moments of readers of one network, without targets: its own responses, ``X @ matrix``.

    Args:
        graph: the network, which the readers belong to.
        readers: of ``graph``.
        sampling: what is looked at.
        override: as for :func:`tfprune.graph.evaluate.evaluate`.

    Raises:
        DataError: as :meth:`Sampling.batches`; activations that are not finite.
    """
    sinks = {reader.path: _Sink(reader, targets=False) for reader in readers}
    calls = {call for reader in readers for call in reader.calls}
    for number, batch in enumerate(sampling.batches(graph)):
        seen = inputs_at(graph, batch, calls, override or {})
        for reader in readers:
            random = np.random.default_rng([sampling.seed, number, reader.number])
            for call in reader.calls:
                for tensor, *_ in seen[call]:
                    drawn = draw(reader, tensor, sampling.positions, random)
                    sinks[reader.path].add(reader.rows(tensor, *drawn))
    return {path: sink.moments() for path, sink in sinks.items()}


def moments_against(
    originals: Originals, masked: MaskedModel, readers: Sequence[Reader], sampling: Sampling
) -> dict[str, Moments]:
    """Moments of readers of the masked network, with the source's responses as targets.

    Args:
        originals: the source's responses.
        masked: the present network.
        readers: of the source.
        sampling: what is looked at.

    Raises:
        DataError: as :func:`own_moments`.
    """
    sinks = {reader.path: _Sink(reader, targets=True) for reader in readers}
    copies = readers_of(masked.graph)
    # Both networks have the same structure, and so the same sums.
    behind = {
        path: sum_behind(masked.graph, copies[path]) for path in sinks if path in originals.sums
    }
    calls = {call for path in sinks for call in copies[path].calls}
    calls |= {found.call for found in behind.values() if found is not None}
    for number, batch in enumerate(sampling.batches(originals.source)):
        answers = originals.at(number, batch, readers)
        seen = inputs_at(masked.graph, batch, calls, masked.overrides)
        for path, sink in sinks.items():
            copy, found = copies[path], behind.get(path)
            tensors = [inputs[0] for call in copy.calls for inputs in seen[call]]
            for answer, tensor in zip(answers[path], tensors, strict=True):
                drawn = answer.examples, answer.places
                targets = answer.targets.astype(np.float64)
                if found is not None:
                    targets -= summands(copy, found, seen[found.call][0], *drawn)
                sink.add(copy.rows(tensor, *drawn), targets)
    return {path: sink.moments() for path, sink in sinks.items()}
