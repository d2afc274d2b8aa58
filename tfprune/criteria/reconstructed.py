r"""Reconstruction behind any criterion: the same channels, the layers that read them refit.

He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, compare
their choice with simpler ones under the same reconstruction (their "first k" and "max response"),
and reconstruction is what most of the gain comes from. Here it is a part by itself: whatever chose
the channels, each convolution or dense layer that reads fewer of them is solved for by least
squares, in the order of the model, against the original network's responses
(:mod:`tfprune.criteria.reconstruction.least_squares`; sheet A3, step 3).

Departure from the paper, where choosing and solving take turns layer by layer: the criterion
chooses first, for the whole network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.criteria.reconstruction.least_squares import LeastSquares
from tfprune.criteria.reconstruction.moments import Sampling
from tfprune.criteria.reconstruction.readers import readers_in, readers_of
from tfprune.criteria.reconstruction.sequence import run
from tfprune.criteria.reconstruction.solve import check_ridge
from tfprune.criteria.scores import Criterion, Scores
from tfprune.criteria.selection import Quota, Selection, Selector
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph


@dataclass(frozen=True)
class Reconstructed:
    """Any criterion, with the layers that read the pruned channels solved for by least squares.

    Args:
        criterion: a criterion or selector, as an object: ``criteria.L1()``. Scores and channels
            are its own. New values that it has for weights stay, but for those solved for.
        data: training data; labels are not used.
        images: how many examples, the first of the data; ``None`` for all.
        positions: output positions drawn per example and layer; a layer with no more than these
            gives all.
        seed: of the positions.
        ridge: towards the trained kernel, relative to the mean of the diagonal of each Gram matrix;
            what fewer rows than unknowns leave open stays as trained.
        residual: whether branches make up for the drift of what they are added to.
        batch_size: examples that the networks see at once.

    Raises:
        ArgumentError: no criterion, a number below 1, or a negative ridge.
    """

    criterion: Criterion
    data: Any
    images: int | None = 1000
    positions: int = 10
    seed: int = 0
    ridge: float = 0.1
    residual: bool = True
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not callable(self.criterion) or isinstance(self.criterion, type):
            raise ArgumentError(
                "Expected a criterion as an object, such as criteria.L1(). Received: "
                f"{self.criterion!r}. For a name, write criteria.get(name, data)."
            )
        check_ridge(self.ridge)
        self._sampling()

    def __call__(self, graph: ChannelGraph) -> Scores:
        """The criterion's scores."""
        scores = self.criterion(graph)
        return Scores(scores.values, f"{scores.criterion}, reconstructed")

    def select(self, graph: ChannelGraph, quotas: Mapping[str, Quota]) -> Selection:
        """The criterion's channels, and the kernels that read them, solved for.

        Groups that no convolution or dense layer reads lose their channels without a
        reconstruction; the selection's notes name them.

        Raises:
            DataError: no examples, they do not fit the model, or activations that are not finite.
        """
        chosen = self._chosen(graph, quotas)
        readers = readers_of(graph)
        without = [name for name in quotas if not readers_in(graph[name], readers)]
        steps = LeastSquares.of(graph, quotas, self._sampling(), self.ridge, self.residual)
        found = run(graph, list(quotas), steps, chosen.kept, chosen.values)
        notes = dict(chosen.notes)
        if without:
            notes["not reconstructed"] = ", ".join(without)
        return Selection(found.kept, found.values, notes)

    def _chosen(self, graph: ChannelGraph, quotas: Mapping[str, Quota]) -> Selection:
        if isinstance(self.criterion, Selector):
            return self.criterion.select(graph, quotas)
        scores = self.criterion(graph)
        return Selection(
            {name: quota.best(np.asarray(scores[name])) for name, quota in quotas.items()}
        )

    def _sampling(self) -> Sampling:
        return Sampling(self.data, self.images, self.positions, self.seed, self.batch_size)
