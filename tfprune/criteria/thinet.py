r"""ThiNet: the channels whose sum the next layer misses least.

Reference: Luo, Wu and Lin, "ThiNet: A Filter Level Pruning Method for Deep Neural Network
Compression", ICCV 2017 (arXiv:1707.06342). The set T of removed channels minimises (Eq. 6)

.. math:: \Big\lVert \sum_{c \in T} Z_c \Big\rVert^2,

where :math:`Z_c` is what channel c contributes to the responses of the layer that reads it, at
sampled positions. Greedily, the channel that makes the sum smallest joins T. Then the kept channels
are scaled by least squares, :math:`w = \arg\min \lVert y - \sum_{c \in S} w_c Z_c \rVert^2`, which
is folded into the reader's kernel; the bias stays.

With :math:`G_{cd} = \langle Z_c, Z_d \rangle` the greedy step is :math:`\arg\min_j G_{jj} + 2
\rho_j` with :math:`\rho_j = \sum_{k \in T} G_{jk}`, and :math:`w = (G_{SS} + \epsilon)^{-1}
(G 1)_S`. (Derived; equal to the naive loop, see the tests and the sheet.) ``search="matching"`` is
the journal version's orthogonal matching pursuit on the kept set (read in the authors' code): the
channel with the best fit to what is left joins, :math:`\arg\max_j c_j^2 / G_{jj}` with
:math:`c = G 1 - G_S w`, and all w are solved for again. It suits keeping less than half.

Departures, with reasons:

- The paper draws a filter anew for each sampled position. Here all filters count at the sampled
  positions, which costs next to nothing with Gram matrices (sheet A2, "Beyond sampling") and is the
  draw's expectation. 1,000 images with 10 positions give more responses than the paper's 100,000
  as soon as a layer has ten filters.
- A tiny ridge, as the paper's ``w`` does not exist for equal channels. Dead channels (a column of
  zeros) go first, for free, and have w = 0.
- Groups with several readers: see :mod:`tfprune.criteria.reconstruction.problem`; each reader gets
  its own w.
- No fine-tuning in between: fine-tune the pruned model, or prune step by step
  (``tfprune.protocols``).
- Scores, which the paper has not: see :class:`ThiNet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tfprune.criteria.reconstruction.moments import Moments, Sampling, own_moments
from tfprune.criteria.reconstruction.problem import Problem, Vector, group_problem, problem_of
from tfprune.criteria.reconstruction.ranking import rising
from tfprune.criteria.reconstruction.readers import (
    Indices,
    Matrix,
    Reader,
    owners_of,
    readers_of,
)
from tfprune.criteria.reconstruction.scoring import require_readers, score_groups
from tfprune.criteria.reconstruction.sequence import State, run
from tfprune.criteria.reconstruction.solve import check_ridge, solve
from tfprune.criteria.scores import Scores, check_choice
from tfprune.criteria.selection import Quota, Selection
from tfprune.graph import ChannelGraph, ChannelGroup

Search = Literal["removal", "matching"]

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class ThiNet:
    """Greedy choice of the channels that the next layers miss least, and least-squares scales.

    As a criterion: the score of a channel is the part of its readers' response energy
    :math:`1^T G 1` that is lost once it goes, in the order of the search and on the dense network:
    0 to 1, the mean over the readers, comparable across groups. The objective is not monotone along
    the search; its cumulative maximum is taken, and ties are broken by the order, so that any
    allocation takes the channels in that order. Groups that no convolution or dense layer reads are
    scored by the L1 norm.

    As a selector: group after group, on the activations of the network that is pruned so far.

    Memory: see :mod:`tfprune.criteria.reconstruction.moments`; it does not depend on the amount of
    data.

    Args:
        data: training data; labels are not used.
        images: how many examples, the first of the data; ``None`` for all.
        positions: output positions drawn per example and layer; a layer with no more than these
            gives all.
        seed: of the positions.
        ridge: added to the diagonal of G for the scales, relative to its mean.
        search: ``"removal"`` (the conference paper) or ``"matching"`` (the journal version).
        rescale: whether the kept channels are scaled.
        batch_size: examples that the network sees at once.

    Raises:
        ArgumentError: a number below 1, a negative ridge, or an unknown search.
    """

    data: Any
    images: int | None = 1000
    positions: int = 10
    seed: int = 0
    ridge: float = 1e-6
    search: Search = "removal"
    rescale: bool = True
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_choice("search", self.search, ("removal", "matching"))
        check_ridge(self.ridge)
        self._sampling()

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group.

        Raises:
            DataError: no examples, they do not fit the model, or activations that are not finite.
        """
        return score_groups(graph, self._sampling(), self._score, f"ThiNet ({self.search})")

    def select(self, graph: ChannelGraph, quotas: Mapping[str, Quota]) -> Selection:
        """The channels that stay, and the kernels of their readers, scaled.

        Raises:
            ArgumentError: a group that no convolution or dense layer reads.
            DataError: as for the call.
        """
        require_readers(graph, list(quotas), readers_of(graph))
        return run(graph, list(quotas), _Steps(self, self._sampling(), quotas))

    def order(self, gram: Matrix, width: int = 0, protected: Indices = _NONE) -> Indices:
        """Channels in the order in which they go, all but ``width``, never the protected ones."""
        if self.search == "removal":
            return removal_order(gram, width, protected)
        joined, _ = matching(gram, self.ridge, protected)
        return joined[max(width, len(protected)) :][::-1]

    def _score(self, problem: Problem) -> Vector:
        if self.search == "removal":
            order = removal_order(problem.gram)
            lost = objective(problem.gram, order)
        else:
            joined, left = matching(problem.gram, self.ridge)
            order, lost = joined[::-1], left[-2::-1]
        return rising(order, lost / (problem.energy or 1.0))

    def _sampling(self) -> Sampling:
        return Sampling(self.data, self.images, self.positions, self.seed, self.batch_size)


@dataclass(frozen=True, eq=False)
class _Steps:
    """What ThiNet does at a reader."""

    method: ThiNet
    sampling: Sampling
    quotas: Mapping[str, Quota]

    @property
    def solves(self) -> bool:
        return self.method.rescale

    def moments(self, state: State, readers: Sequence[Reader]) -> dict[str, Moments]:
        copies = readers_of(state.masked.graph)
        there = [copies[reader.path] for reader in readers]
        return own_moments(state.masked.graph, there, self.sampling, state.masked.overrides)

    def choose(
        self,
        state: State,
        group: ChannelGroup,
        readers: Sequence[Reader],
        moments: Mapping[str, Moments],
    ) -> Indices:
        quota = self.quotas[group.name]
        matrices = {reader.path: reader.matrix(reader.kernel) for reader in readers}
        outputs = {reader.path: state.outputs(reader) for reader in readers}
        problem = group_problem(group, readers, moments, matrices, outputs)
        gone = self.method.order(problem.gram, quota.width, quota.protected)
        return np.setdiff1d(np.arange(group.width), gone)

    def solve(
        self, state: State, reader: Reader, moments: Moments, losing: Sequence[ChannelGroup]
    ) -> Matrix:
        """Scales the rows of each group's kept channels so that they stand in for all of it."""
        matrix = reader.matrix(reader.kernel)
        outputs = state.outputs(reader)
        factors = np.ones(reader.inputs)
        for group in losing:
            problem = problem_of(reader, group, moments, matrix, outputs)
            kept = state.channels(group)
            scales = np.zeros(group.width)
            scales[kept] = scales_of(problem.gram, kept, self.method.ridge)
            owners = owners_of(reader, group)
            factors[owners >= 0] = scales[owners[owners >= 0]]
        return matrix * np.repeat(factors, reader.taps)[:, None]

    def depends_on_sums(self, state: State, reader: Reader) -> bool:
        return False


def removal_order(gram: Matrix, width: int = 0, protected: Indices = _NONE) -> Indices:
    """The greedy removal of the paper, by the Gram matrix, O(channels) per step.

    Dead channels go first. Of channels that do equally, the one with the highest index goes.

    Args:
        gram: G, shape (channels, channels).
        width: how many stay.
        protected: which never go.
    """
    count = len(gram) - max(width, len(protected))
    allowed = np.ones(len(gram), bool)
    allowed[protected] = False
    diagonal = np.diag(gram).copy()
    dead = np.flatnonzero(allowed & ~(diagonal > 0))[::-1][:count]
    order = dead.tolist()
    allowed[dead] = False
    rho = np.zeros(len(gram))
    while len(order) < count:
        cost = np.where(allowed, diagonal + 2 * rho, np.inf)
        chosen = len(cost) - 1 - int(np.argmin(cost[::-1]))
        order.append(chosen)
        allowed[chosen] = False
        rho += gram[:, chosen]
    return np.array(order, np.int64)


def matching(gram: Matrix, ridge: float, protected: Indices = _NONE) -> tuple[Indices, Vector]:
    """Orthogonal matching pursuit by the Gram matrix.

    The Cholesky factor of the kept part grows by a row per step, so that no system is solved anew:
    O(channels * kept) per step. Protected channels join first, dead ones last; of channels that do
    equally, the one with the lowest index joins.

    Args:
        gram: G, shape (channels, channels).
        ridge: relative to the mean of the diagonal of the channels that are not dead.
        protected: which join first, in their own order.

    Returns:
        All channels in the order in which they join, shape (channels,), and what the first 0, 1,
        ... of them leave unexplained, :math:`1^T G 1 - (G1)_S w`, shape (channels + 1,).
    """
    size, diagonal = len(gram), np.diag(gram)
    alive = diagonal > 0
    eps = ridge * diagonal[alive].mean() if alive.any() else 0.0
    rows = np.zeros((size, size))  # L^-1 G_S, with G_SS + eps = L L'
    left = gram.sum(1)  # Z' times what is left of the response
    waiting = alive.copy()
    waiting[protected] = False
    order, explained = [], []
    for step in range(size):
        if step < len(protected):
            chosen = int(protected[step])
        elif waiting.any():
            gain = np.where(waiting, left**2 / np.where(alive, diagonal, 1), -1)
            chosen = int(np.argmax(gain))
        else:
            break
        waiting[chosen] = False
        order.append(chosen)
        before = rows[:step, chosen]
        pivot = diagonal[chosen] + eps - before @ before
        weight = 0.0
        # A repetition of those that joined (with ridge=0), or a dead one, explains nothing more.
        if pivot > 1e-10 * diagonal[chosen]:
            weight = float(left[chosen] / np.sqrt(pivot))
            rows[step] = (gram[chosen] - before @ rows[:step]) / np.sqrt(pivot)
            left -= weight * rows[step]
        explained.append(weight**2)
    rest = [channel for channel in range(size) if channel not in set(order)]
    explained += [0.0] * len(rest)
    unexplained = gram.sum() - np.concatenate([[0.0], np.cumsum(explained)])
    return np.array([*order, *rest], np.int64), np.maximum(unexplained, 0.0)


def objective(gram: Matrix, order: Indices) -> Vector:
    """``||sum over T of Z_c||^2`` after each step of an order of removal."""
    ordered = gram[np.ix_(order, order)]
    # Step k adds the diagonal, and twice what stands beside it to the left.
    left = np.tril(ordered, -1).sum(1)
    return np.asarray(np.maximum(np.cumsum(np.diag(ordered) + 2 * left), 0.0))


def scales_of(gram: Matrix, kept: Indices, ridge: float) -> Vector:
    """``w = (G_SS + eps)^-1 (G 1)_S``; 0 for dead channels."""
    return solve(gram[np.ix_(kept, kept)], gram.sum(1)[kept], ridge)


def residual(gram: Matrix, kept: Indices, ridge: float) -> float:
    """``1'G1 - (G1)_S . w``: what the scaled channels do not explain."""
    total = gram.sum()
    explained = gram.sum(1)[kept] @ scales_of(gram, kept, ridge) if len(kept) else 0.0
    return max(float(total - explained), 0.0)
