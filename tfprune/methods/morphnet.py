r"""MorphNet: a penalty on scales by what each channel costs now, then uniform expansion.

Reference: A. Gordon, E. Eban, O. Nachum, B. Chen, H. Wu, T.-J. Yang and E. Choi, "MorphNet: Fast &
Simple Resource-Constrained Structure Learning of Deep Networks", CVPR 2018, arXiv:1711.06798.
Regulariser, coupling and thresholds are read in the authors' code (google-research/morph-net);
shrinking and expanding is section 4.5 of sheet C4.

An operation that costs :math:`C` for each pair of an input and an output channel costs

.. math:: F = C\, A_{in} A_{out}, \qquad
          G = C \Bigl( A_{in} \sum_{j \in out} r_j + A_{out} \sum_{i \in in} r_i \Bigr)

with A the numbers of channels that are alive (r above a threshold), which are constants that are
counted anew in every step, and r what is left of each channel: the absolute scale of its batch
normalisation, the largest one where channels are coupled. Training adds
``strength * d(sum of G) / d(scales)`` to the gradient. The sub-gradient of the maximum goes to the
first of the largest, and that of \|.\| at 0 is 0.

All costs of the project are sums of terms :math:`C \prod_a A_a` over axes
(:class:`~tfprune.cost.CostModel`), so that here

.. math:: G = \sum_j r_j \frac{\partial F}{\partial A_j}
            = \sum_{terms} C \sum_a \Bigl( \sum_{j \in a} r_j \Bigr) \prod_{b \ne a} A_b,

which is the formula above for two axes, and takes concatenation, slices and flattening as they
are. F with everything alive is the cost that :func:`tfprune.cost.measure` gives. MACs are half of
the FLOPs that the authors count, and with ``strength=None`` (1 / initial cost) it makes no
difference.

Channels without scales behind them have the group lasso's
:math:`r_j = (1 - q) \lVert w_j \rVert_2 / \sqrt{n} + q \lVert w_j \rVert_1 / n` over the n entries
of the filter, the largest one of several.

*Shrink and expand.* What is alive after training are the new widths O'. ``expand`` multiplies all
of them by the largest factor w with :math:`F(w O') \le` budget, with new weights; ``shrink_expand``
repeats the two (:mod:`tfprune.methods.expansion`). The last network is trained from scratch.

*What equals what.* The smaller network computes what the trained one does with the lost channels
left out where they are read. A dead channel's scale is at most the threshold, not 0, and its shift
is not penalised: there is no bound, ``StructuredResult.difference`` is measured. MorphNet does not
need one, as it keeps widths and not weights.

Departures.

- Depthwise: their code counts :math:`C(\sum r_{in} + \sum r_{out})`, twice what the derivative of
  :math:`C A` gives, as both sides are one group. Here it counts once.
- ``resource="params"`` counts all weights of the project's cost (biases and normalisation, too),
  theirs the kernels. No latency.
- Groups of ``ignore`` are not penalised; they count as alive. One channel of a group always stays,
  so that no layer disappears.
- ``macs`` and ``pruning_ratio`` may say how much goes instead of the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from tfprune.arguments import check_positive
from tfprune.cost import CostModel
from tfprune.criteria.scores import Scores, Vector, check_choice
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph, ChannelGroup, Member
from tfprune.layers.updates import Gradients, MethodUpdate
from tfprune.methods.slimming import scales_of
from tfprune.methods.structured import StructuredMethod, penalised_groups

Resource = Literal["macs", "params"]
Whole = NDArray[np.int32]


@dataclass(frozen=True)
class MorphNet(StructuredMethod):
    """Trains with a penalty on scales that is weighted by what a channel costs at the moment.

    Args:
        resource: ``"macs"`` or ``"params"``: what shall become small.
        strength: factor on G; ``None`` is 1 / initial cost, around which the authors search on a
            logarithmic scale. They train at a constant learning rate until cost and penalty stay.
        alive_above: r from which a channel is alive: 1e-2 usually; the histogram of the scales
            should have a gap there.
        l1_fraction: q, for channels without scales: 0, or 0.5 in some of their experiments.
        macs, pruning_ratio, round_to, min_channels, ignore: see :class:`StructuredMethod`. Without
            ``macs`` and ``pruning_ratio`` the channels go that are not alive.

    Raises:
        ArgumentError: a value out of range.
    """

    resource: Resource = "macs"
    strength: float | None = None
    alive_above: float = 1e-2
    l1_fraction: float = 0.0

    # Scores are in units of ``alive_above``.
    threshold: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("resource", self.resource, ("macs", "params"))
        if self.strength is not None:
            check_positive("strength", self.strength)
        check_positive("alive_above", self.alive_above)
        if not 0 <= self.l1_fraction <= 1:
            raise ArgumentError(
                f"Expected l1_fraction from 0 to 1. Received: {self.l1_fraction!r}."
            )

    def update(self) -> MethodUpdate:
        """The regulariser's part of a training step."""
        return CostPenalty(
            self.resource,
            self.strength,
            self.alive_above,
            self.l1_fraction,
            tuple(self.ignore),
        )

    def acts_on(self, group: ChannelGroup) -> bool:
        """Whether there are scales or kernels to judge the group's channels by."""
        return bool(judged_by(group))

    def scores(self, graph: ChannelGraph) -> Scores:
        """r of every channel, in units of ``alive_above``."""
        remains = Remains(graph.prunable, self.l1_fraction)
        r = np.asarray(remains(), np.float64) / self.alive_above
        parts = np.split(r, remains.starts[1:-1])
        values = {g.name: part for g, part in zip(graph.prunable, parts, strict=True)}
        return Scores(values, "what is left of each channel (MorphNet)")


class Remains:
    """r of every channel of some groups, and which entries of which weights decide it.

    Attributes:
        starts: int array, shape ``(groups + 1,)``: where each group's channels start when all of
            them are numbered in a row; the last is their number.
        variables: the weights that are looked at.

    Args:
        groups: of one graph.
        l1_fraction: q, where kernels decide.
    """

    def __init__(self, groups: Sequence[ChannelGroup], l1_fraction: float = 0.0) -> None:
        self.starts = np.cumsum([0, *(group.width for group in groups)])
        self.count = int(self.starts[-1])
        self._q = l1_fraction
        # Distinct weights with the axis that is looked at, and for every position along all these
        # axes in a row: the channel, or ``count`` for none.
        seen: dict[tuple[int, int], int] = {}
        self.variables: list[Any] = []
        self._axes: list[int] = []
        self._scales: list[bool] = []
        channels: list[Whole] = []
        for start, group in zip(self.starts, groups, strict=False):
            for member in judged_by(group):
                key = id(member.variable), member.axis
                if key not in seen:
                    seen[key] = len(self.variables)
                    self.variables.append(member.variable)
                    self._axes.append(member.axis)
                    self._scales.append(member.weight == "gamma")
                    size = int(member.variable.shape[member.axis])
                    channels.append(np.full(size, self.count, np.int32))
                channels[seen[key]][member.positions] = start + member.channels
        self._sizes = [len(part) for part in channels]
        joined = [np.zeros(0, np.int32), *channels]
        self._channels: Whole = np.concatenate(joined)
        self._order: Whole = np.arange(len(self._channels), dtype=np.int32)

    def __call__(self) -> Any:
        """r, shape ``(channels,)``."""
        return self.largest(self.values())

    def values(self) -> Any:
        """r by every position of the weights alone, shape ``(positions,)``."""
        return ops.concatenate([ops.zeros(0), *map(self._value, range(len(self.variables)))])

    def largest(self, values: Any) -> Any:
        """r, shape ``(channels,)``, from what :meth:`values` returned."""
        # With a 0 of its own for each channel: 0 for those that nothing is known of.
        every = np.arange(self.count + 1, dtype=np.int32)
        return ops.segment_max(
            ops.concatenate([values, ops.zeros(self.count + 1)]),
            np.concatenate([self._channels, every]),
            num_segments=self.count + 1,
        )[: self.count]

    def gradient(self, values: Any, r: Any, weights: Any) -> list[Any]:
        """The gradient of ``sum(weights * r)`` by every weight, in the order of ``variables``.

        Args:
            values, r: what :meth:`values` and :meth:`largest` returned.
            weights: shape ``(channels,)``.
        """
        reached = ops.take(ops.append(r, ops.zeros(1)), self._channels)
        # Of equal ones the first gets it: the largest of the negative positions.
        candidates = ops.where(values >= reached, -self._order, -len(self._order))
        first = ops.segment_max(candidates, self._channels, num_segments=self.count + 1)
        chosen = ops.equal(ops.take(first, self._channels), -self._order)
        shares = ops.take(ops.append(weights, ops.zeros(1)), self._channels)
        shares = ops.where(chosen, shares, 0.0)
        result, start = [], 0
        for number, size in enumerate(self._sizes):
            result.append(self._slope(number, shares[start : start + size]))
            start += size
        return result

    def _others(self, number: int) -> tuple[tuple[int, ...], int]:
        shape, axis = self.variables[number].shape, self._axes[number]
        others = tuple(a for a in range(len(shape)) if a != axis)
        return others, int(np.prod([shape[a] for a in others]))

    def _value(self, number: int) -> Any:
        magnitude = ops.abs(ops.convert_to_tensor(self.variables[number]))
        if self._scales[number]:
            return magnitude
        others, entries = self._others(number)
        value = (1 - self._q) * ops.sqrt(ops.sum(ops.square(magnitude), others) / entries)
        return value + self._q * ops.sum(magnitude, others) / entries

    def _slope(self, number: int, shares: Any) -> Any:
        """``shares`` times the derivative of each position's r by the weight's entries."""
        weight = ops.convert_to_tensor(self.variables[number])
        if self._scales[number]:
            return shares * ops.sign(weight)
        others, entries = self._others(number)
        mean_square = ops.sum(ops.square(weight), others, keepdims=True) / entries
        root = ops.sqrt(mean_square)
        some = root > 0
        slope = (1 - self._q) * ops.where(some, weight / ops.where(some, root, 1.0), 0.0)
        slope = (slope + self._q * ops.sign(weight)) / entries
        broad = [-1 if a == self._axes[number] else 1 for a in range(len(weight.shape))]
        return slope * ops.reshape(shares, broad)


def judged_by(group: ChannelGroup) -> list[Member]:
    """The scales behind a group if every channel has one, else the kernels that make it."""
    scales = scales_of(group)
    covered = {int(channel) for member in scales for channel in member.channels}
    if len(covered) == group.width:
        return scales
    return [member for member in group.producers if member.scored]


class CostTerms:
    """A cost as a sum of products of channels that are counted one by one.

    Attributes:
        starts: as in :class:`Remains`.
        total: the cost with all channels once.

    Args:
        costs: of the graph.
        groups: whose channels count; all others are always there.
        resource: ``"macs"`` or ``"params"``.

    Raises:
        ModelError: MACs are asked for and an input has a free size.
    """

    def __init__(self, costs: CostModel, groups: Sequence[ChannelGroup], resource: str) -> None:
        terms = costs.posynomial(resource, groups)
        self.starts = np.cumsum([0, *(group.width for group in groups)])
        self.count = int(self.starts[-1])
        self.coefficients: Vector = terms.coefficients
        self.factors = terms.factors.astype(np.int32)
        self.fixed: Vector = terms.fixed
        number = np.full(len(costs.graph.group_of), -1, np.int32)
        for start, group in zip(self.starts, groups, strict=False):
            number[group.channel_ids] = start + np.arange(group.width)
        # Every position of every axis that a counted channel stands on.
        axes, channels = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for axis, array in enumerate(costs.axes(), start=1):
            mine = number[array]
            channels.append(mine[mine >= 0])
            axes.append(np.full(len(channels[-1]), axis, np.int32))
        self.axis_of: Whole = np.concatenate(axes)
        self.channel_of: Whole = np.concatenate(channels)
        self.total = self.cost(np.ones(self.count))

    def cost(self, times: NDArray[Any]) -> float:
        """F, exactly.

        Args:
            times: how often each channel is there, shape ``(channels,)``.
        """
        lengths = self.fixed + np.bincount(
            self.axis_of, np.asarray(times, np.float64)[self.channel_of], len(self.fixed)
        )
        return float((self.coefficients * lengths[self.factors].prod(axis=1)).sum())

    def price(self, alive: Any, scale: float = 1.0) -> Any:
        """dF / dA_j: what channel j costs, in the graph of a training step.

        Args:
            alive: float32 tensor of zeros and ones, shape ``(channels,)``.
            scale: multiplies the cost.

        Returns:
            float32 tensor, shape ``(channels,)``.
        """
        axes = len(self.fixed)
        counts = ops.segment_sum(ops.take(alive, self.channel_of), self.axis_of, num_segments=axes)
        lengths = counts + self.fixed.astype(np.float32)
        values = ops.take(lengths, self.factors, axis=0)
        coefficients = (scale * self.coefficients).astype(np.float32)
        by_axis = ops.zeros(axes)
        depth = self.factors.shape[1]
        for column in range(depth):
            others = coefficients
            for other in range(depth):
                others = others * values[:, other] if other != column else others
            by_axis = by_axis + ops.segment_sum(others, self.factors[:, column], num_segments=axes)
        return ops.segment_sum(
            ops.take(by_axis, self.axis_of), self.channel_of, num_segments=self.count
        )


@keras.saving.register_keras_serializable(package="tfprune")
class CostPenalty(MethodUpdate):
    """Adds ``strength * dG / dw`` to the gradients of scales (or kernels).

    Args:
        resource, strength, alive_above, l1_fraction: see :class:`MorphNet`.
        ignore: names or patterns of groups that are left alone.
    """

    def __init__(
        self,
        resource: Resource = "macs",
        strength: float | None = None,
        alive_above: float = 1e-2,
        l1_fraction: float = 0.0,
        ignore: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.resource = resource
        self.strength = strength
        self.alive_above = alive_above
        self.l1_fraction = l1_fraction
        self.hold(ignore=tuple(ignore))

    def get_config(self) -> dict[str, Any]:
        """The hyper-parameters."""
        return {
            "resource": self.resource,
            "strength": self.strength,
            "alive_above": self.alive_above,
            "l1_fraction": self.l1_fraction,
            "ignore": list(self.held.ignore),
        }

    def bind(self, graph: ChannelGraph) -> None:
        """Finds the scales, and what their channels cost."""
        groups = [g for g in penalised_groups(graph, self.held.ignore) if judged_by(g)]
        terms = CostTerms(CostModel(graph), groups, self.resource)
        self.hold(
            remains=Remains(groups, self.l1_fraction),
            terms=terms,
            scale=1 / terms.total if self.strength is None else self.strength,
        )

    def gradients(self, gradients: Gradients, learning_rate: Any) -> Gradients:
        """With the regulariser's added."""
        remains = self.held.remains
        values = remains.values()
        r = remains.largest(values)
        slopes = remains.gradient(values, r, self._prices(r))
        result = dict(gradients)
        for variable, slope in zip(remains.variables, slopes, strict=True):
            if id(variable) in result:
                result[id(variable)] = result[id(variable)] + slope
        return result

    def _prices(self, r: Any) -> Any:
        alive = ops.cast(r > self.alive_above, "float32")
        return self.held.terms.price(alive, self.held.scale)

    def figures(self) -> Mapping[str, float]:
        """strength * G; F, and the fraction of channels alive."""
        r = self.held.remains()
        alive = np.asarray(r) > self.alive_above
        return {
            "cost_penalty": float(np.asarray(ops.sum(r * self._prices(r)))),
            f"alive_{self.resource}": self.held.terms.cost(alive),
            "alive": float(alive.mean()),
        }
