r"""Collaborative channel pruning: channels that are removed together, with their cross effects.

Reference: Peng, Wu, Chen and Huang, "Collaborative Channel Pruning for Deep Networks", ICML 2019
(PMLR 97). Only the abstract was read; the formulas are recalled, derived anew and checked. With
keep variables :math:`\beta_i \in \{0, 1\}` and :math:`v = \beta - 1`, the loss is expanded to the
second order, pairs included,

.. math:: \Delta L(\beta) = u^\top v + v^\top S v, \qquad u = \operatorname{mean}_n \phi_n, \quad
    S = \tfrac 1 2 \cdot \tfrac 1 N \Phi^\top \Phi,

with :math:`\phi` the gate gradients of :mod:`tfprune.criteria.gates`. The paper approximates the
Hessian for cross-entropy as :math:`(\partial f / \partial w_i)^\top \operatorname{diag}(y / f^2)
(\partial f / \partial w_j)`, f being the softmax outputs; for one-hot labels that is exactly the
second moment of :math:`\phi` above (derived; tested). It is not the Gauss-Newton matrix.

How the quadratic is minimised for a fixed number of kept channels. The paper relaxes the keep
variables to [0, 1], solves the convex problem and keeps the largest (recalled). Here, as a
departure: greedy elimination, always of the channel whose removal raises :math:`\Delta L` least,

.. math:: \Delta L(\beta - e_i) - \Delta L(\beta) = -(u + 2 S v)_i + S_{ii},

which is exact for the quadratic and costs :math:`O(C)` to update per removal; and then exchanges
of a removed channel for a kept one, the best first, as long as one lowers :math:`\Delta L`.

Scores for the allocation: the cost at which a channel was eliminated. Costs need not rise along the
elimination, so each is raised to the largest so far, and scores have the order of the elimination:
the lowest scores of a group are those that go first, and adding up what is removed overestimates
:math:`\Delta L` rather than underestimates it. Every group is expanded by itself: effects between
groups are left out, as in the paper, where layers are chosen one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.criteria.gates import Matrix, Moments, Remembered, moments
from tfprune.criteria.scores import Scores, Vector
from tfprune.criteria.selection import Indices, Quota, Selection
from tfprune.graph import ChannelGraph

# An exchange must lower the loss by more than rounding, relative to the sizes that are summed up.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class CCP:
    """Joint second-order change of the loss; needs TensorFlow, for the gradients.

    Args:
        data: labelled data: the paper uses training data; data that the network was not trained on
            are better where there are some (see :mod:`tfprune.criteria.influence`).
        loss: a function of (labels, outputs) with one value per example, a Keras loss or its name;
            by default cross-entropy as the model's last activation and the labels suggest.
        batches: how many batches to use; ``None`` for all.
        batch_size: for arrays. The gradients need the model's activations for that many examples.
        exchange: whether :meth:`select` improves the greedy choice by exchanges.
    """

    data: Any
    loss: Any = None
    batches: int | None = 16
    batch_size: int = 64
    exchange: bool = True
    _found: Remembered = field(default_factory=Remembered, init=False, repr=False, compare=False)

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group: what it costs when the channel's turn comes.

        Raises:
            ArgumentError: the model runs on another backend than TensorFlow, or the loss has no
                value per example.
            DataError: no labels, no examples, or gradients that are not finite.
        """
        found = self._moments(graph)
        self._found.put(graph, found)
        values: dict[str, Vector] = {}
        for name, matrix in found.second.items():
            order, costs = eliminate(found.mean[name], 0.5 * matrix)
            values[name] = np.empty(len(order))
            values[name][order] = _rising(costs)
        return Scores(values, f"collaborative channel pruning (CCP, {found.examples} examples)")

    def select(self, graph: ChannelGraph, quotas: Mapping[str, Quota]) -> Selection:
        """The kept set of lowest joint cost that greedy elimination and exchanges find.

        Right after a call on the same graph, its pass over the data is used again.
        """
        found: Moments = self._found.take(graph) or self._moments(graph)
        kept: dict[str, Indices] = {}
        total = 0.0
        for name, quota in quotas.items():
            mean, matrix = found.mean[name], 0.5 * found.second[name]
            kept[name] = choose(mean, matrix, quota, exchange=self.exchange)
            total += joint_cost(mean, matrix, kept[name])
        return Selection(kept, notes={"predicted rise of the loss": f"{total:.4g}"})

    def _moments(self, graph: ChannelGraph) -> Moments:
        return moments(
            graph, self.data, self.loss, batches=self.batches, batch_size=self.batch_size
        )


def joint_cost(mean: Vector, half_fisher: Matrix, kept: NDArray[np.integer[Any]]) -> float:
    """The quadratic: the predicted rise of the loss when all channels but ``kept`` go together.

    Args:
        mean: u, shape ``(channels,)``.
        half_fisher: S, shape ``(channels, channels)``.
        kept: indices.
    """
    v = np.full(len(mean), -1.0)
    v[kept] = 0
    return float(mean @ v + v @ half_fisher @ v)


def eliminate(
    mean: Vector,
    half_fisher: Matrix,
    protected: NDArray[np.integer[Any]] | None = None,
    count: int | None = None,
) -> tuple[Indices, Vector]:
    """Greedy elimination.

    Args:
        mean, half_fisher: as for :func:`joint_cost`.
        protected: indices that stay.
        count: how many are eliminated; by default all.

    Returns:
        The channels in the order in which they go (of equals, the one with the higher index goes
        first), and what each removal adds to the quadratic.
    """
    size = len(mean)
    marginal = np.diag(half_fisher) - mean
    marginal = np.array(marginal, np.float64)
    barred = np.zeros(size)
    barred[[] if protected is None else protected] = np.inf
    order = np.empty(size if count is None else count, np.int64)
    costs = np.empty(len(order))
    for step in range(len(order)):
        channel = size - 1 - int(np.argmin((marginal + barred)[::-1]))
        order[step], costs[step] = channel, marginal[channel]
        barred[channel] = np.inf
        marginal += 2 * half_fisher[channel]
    return order, costs


def choose(mean: Vector, half_fisher: Matrix, quota: Quota, *, exchange: bool = True) -> Indices:
    """Sorted indices of the channels that stay.

    Args:
        mean, half_fisher: as for :func:`joint_cost`.
        quota: how many stay, and which in any case.
        exchange: whether to improve the greedy choice by exchanges of one channel for another.
    """
    size = len(mean)
    removed, _ = eliminate(mean, half_fisher, quota.protected, size - quota.width)
    out = np.zeros(size, bool)
    out[removed] = True
    fixed = np.zeros(size, bool)
    fixed[quota.protected] = True
    diagonal = np.diag(half_fisher)
    pull = half_fisher @ out.astype(np.float64)  # -S v
    least = _ROUNDING * (np.abs(mean).sum() + np.abs(half_fisher).sum())
    while exchange:
        inside, outside = np.flatnonzero(~out & ~fixed), np.flatnonzero(out)
        if not len(inside) or not len(outside):
            break
        # Removing i costs -u_i + 2 (S 1_out)_i + S_ii; taking o back the reverse, and both together
        # lack their cross term.
        removal = -mean[inside] + 2 * pull[inside] + diagonal[inside]
        back = mean[outside] - 2 * pull[outside] + diagonal[outside]
        change = removal[:, None] + back[None] - 2 * half_fisher[np.ix_(inside, outside)]
        best = np.unravel_index(int(np.argmin(change)), change.shape)
        if not change[best] < -least:
            break
        i, o = inside[best[0]], outside[best[1]]
        out[i], out[o] = True, False
        pull += half_fisher[i] - half_fisher[o]
    return np.flatnonzero(~out)


def _rising(costs: Vector) -> Vector:
    """The largest cost so far; equals are told apart by the next larger number, in order."""
    result = np.maximum.accumulate(costs)
    for step in range(1, len(result)):
        if result[step] <= result[step - 1]:
            result[step] = np.nextafter(result[step - 1], np.inf)
    return result
