r"""Filter correlations: pairs of alike filters are trained to be more alike, and one of each goes.

Reference: P. Singh, V. K. Verma, P. Rai and V. P. Namboodiri, "Leveraging Filter Correlations for
Deep Model Compression", WACV 2020, pp. 835-844, arXiv:1811.10559. Neither code nor the paper's full
text was at hand: the idea is confirmed by its abstract, the formulas are from memory. Sheet B8.2.

An *episode* :math:`S` is the pairs of filters with the largest :math:`|\rho_{XY}|` of every layer,
Pearson's correlation over the entries of their kernels, no filter in two pairs. For some epochs
the loss is

.. math:: C(\Theta) + \lambda\,C_S, \qquad
   C_S = \exp\Big(-\frac{1}{|S|} \sum_{(X, Y) \in S} |\rho_{XY}|\Big) \in (1/e, 1]

Then one of each pair goes, that with the smaller L1 norm, and the next episode begins. With
:math:`\tilde X` for a filter less its mean the gradient is

.. math:: \frac{\partial C_S}{\partial X} = -\frac{C_S}{|S|}\,\mathrm{sign}(\rho)\,\Big(
   \frac{\tilde Y}{\|\tilde X\| \|\tilde Y\|} - \rho\,\frac{\tilde X}{\|\tilde X\|^2}\Big)

*What equals what.* A filter that went is not read any more: its slices in the layers that read it
are zero from then on, and the smaller network computes what the trained one does, to rounding. Only
the pairs of an episode that has not ended yet change something when they go in the end. Give epochs
beyond ``episodes * episode_epochs``, the paper's fine-tuning, and there are none.

*Absorption* (not in the paper). If :math:`Y = a X` with :math:`a > 0`, what reads the removed Y may
read a times X: ``absorb=True`` adds the slices, :math:`W_X \mathrel{+}= a W_Y`. It is exact where
nothing but functions with :math:`\phi(a x) = a \phi(x)` (ReLU, pooling) lies between and offsets
are in the same proportion. Behind one batch normalisation a is that of filters with the
scales :math:`\gamma / \sqrt{v + \epsilon}` folded in; behind several, or a depthwise convolution,
and for :math:`a \le 0`, nothing is absorbed.

Departures.

- The widths come from ``macs`` or ``pruning_ratio`` (the same part of every group), and every
  episode removes the same part of what is left; the paper goes on until the accuracy drops.
- Coupled channels (a residual stream) are one filter, all kernels that make them put together.
- Entries of kernels that read removed channels do not count.
- :math:`10^{-12}` is added to squared norms, so that constant filters have the correlation 0.
- Which of a pair goes is this library's choice; the sources do not say.
- Groups of which equal channels could not be merged (:mod:`tfprune.surgery.merging`) or that are
  not trained are left alone; the plan's notes say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from tfprune.arguments import check_whole
from tfprune.criteria.scores import Scores
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph, ChannelGroup, Member, analyse
from tfprune.graph.plan import PruningPlan
from tfprune.layers.per_channel import Axis
from tfprune.layers.updates import Gradients, MethodUpdate
from tfprune.methods.merging import check_any, left_alone, notes_on, uniform_widths
from tfprune.methods.method import AtEpochs
from tfprune.methods.structured import StructuredMethod
from tfprune.surgery import check_finite
from tfprune.surgery.merging import merged, occurrences

EPSILON = 1e-12


@dataclass(frozen=True)
class FilterCorrelation(StructuredMethod):
    """Trains pairs of filters to be correlated, and removes one of each, episode by episode.

    Give one of ``macs`` and ``pruning_ratio`` (here of every group). Epochs beyond
    ``episodes * episode_epochs`` are fine-tuning.

    Args:
        penalty: lambda, the weight of the correlation loss.
        episodes: how often pairs are chosen.
        episode_epochs: epochs of training between the choice of pairs and the removal.
        absorb: let the channel that stays take over what read the other, see above.
        macs, pruning_ratio, round_to, min_channels, ignore: see :class:`StructuredMethod`.

    Raises:
        ArgumentError: a value out of range, or neither ``macs`` nor ``pruning_ratio``.
    """

    penalty: float = 1.0
    episodes: int = 3
    episode_epochs: int = 2
    absorb: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.macs is None and self.pruning_ratio is None:
            raise ArgumentError("Expected macs or pruning_ratio. Received: neither.")
        if not np.isfinite(self.penalty) or self.penalty <= 0:
            raise ArgumentError(f"Expected a positive penalty. Received: {self.penalty!r}.")
        check_whole("episodes", self.episodes, 1)
        check_whole("episode_epochs", self.episode_epochs, 1)

    @property
    def epochs_needed(self) -> int:
        """Enough for all episodes."""
        return self.episodes * self.episode_epochs

    def update(self) -> MethodUpdate:
        """The correlation loss, and the mask of what is not read any more."""
        return CorrelationUpdate(self.penalty, self.absorb)

    def check(self, graph: ChannelGraph) -> None:
        """Raises what :meth:`prepare` raises."""
        check_any(graph, type(self).__name__)
        check_finite(graph.model)
        self.widths(graph)

    def widths(self, graph: ChannelGraph) -> dict[str, list[int]]:
        """Group name -> its width before every episode, and after the last.

        Raises:
            ArgumentError, BudgetError: out of reach, for all episodes together.
        """
        result = {}
        for name, target in uniform_widths(graph, self).items():
            whole = graph[name].width
            result[name] = falling_widths(whole, target, self.episodes)
            if result[name][-1] > target:
                needed = int(np.ceil(np.log2(whole / target)))
                raise ArgumentError(
                    f"Expected at least {needed} episodes for {name!r} to fall from {whole} to "
                    f"{target} channels, as pairs have no filter in common. Received: "
                    f"{self.episodes}."
                )
        return result

    def callbacks(self) -> list[Any]:
        """What ends and begins episodes, and what writes to the logs."""
        starts = {
            number * self.episode_epochs: self._begin(number) for number in range(self.episodes + 1)
        }
        return [AtEpochs(starts), *super().callbacks()]

    def _begin(self, number: int) -> Callable[[Any], None]:
        def begin(model: Any) -> None:
            if number:
                model.update.remove()
            if number < self.episodes:
                widths = self.widths(analyse(model))
                model.update.choose({name: w[number] - w[number + 1] for name, w in widths.items()})

        return begin

    def scores(self, graph: ChannelGraph) -> Scores:
        """1 for channels that stay, 0 for those that went or are about to."""
        values = {group.name: np.ones(group.width) for group in graph.prunable}
        for name, (kept, _) in _update_of(graph).outcome().items():
            values[name][~kept] = 0.0
        return Scores(values, "filter correlation")

    def choice(self, graph: ChannelGraph) -> PruningPlan:
        """Without the channels that went, and without one of each pair of this episode.

        Args:
            graph: of a model from :meth:`prepare`.
        """
        outcome = _update_of(graph).outcome()
        kept = {name: np.flatnonzero(stays) for name, (stays, _) in outcome.items()}
        return PruningPlan.of(graph, kept, {"method": self.describe(), **notes_on(graph)})

    def values(self, graph: ChannelGraph, plan: PruningPlan) -> Mapping[str, Any]:
        """What readers of channels that stay take over from this episode's pairs."""
        clusters, kept, factors = {}, {}, {}
        outcome = _update_of(graph).outcome()
        for name, (stays, into) in outcome.items():
            kept[name] = np.flatnonzero(stays)
            clusters[name] = np.where(stays, np.arange(len(stays)), -1)
            factors[name] = np.ones(len(stays))
            for lost, (partner, factor) in into.items():
                clusters[name][lost], factors[name][lost] = partner, factor
        if not any(into for _, into in outcome.values()):
            return {}
        return merged(graph, clusters, kept=kept, factors=factors)[1]


@keras.saving.register_keras_serializable(package="tfprune")
class CorrelationUpdate(MethodUpdate):
    """Adds the gradient of ``penalty * C_S``, and holds slices that read removed channels at zero.

    Args:
        penalty: lambda.
        absorb: whether channels that stay take over.
    """

    def __init__(self, penalty: float, absorb: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.penalty = penalty
        self.absorb = absorb

    def get_config(self) -> dict[str, Any]:
        """Both."""
        return {"penalty": self.penalty, "absorb": self.absorb}

    def bind(self, graph: ChannelGraph) -> None:
        """Makes two states per group: which channels are there, and every channel's partner."""
        reasons = left_alone(graph)
        groups = [group for group in graph.prunable if group.name not in reasons]
        there = {
            group.name: self.state(f"there_{number}", np.ones(group.width, np.float32))
            for number, group in enumerate(groups)
        }
        # int64, as Keras's own counters: TensorFlow keeps int32 variables off the GPU.
        partners = {
            group.name: self.state(f"partner_{number}", np.arange(group.width), dtype="int64")
            for number, group in enumerate(groups)
        }
        axes: dict[int, list[tuple[Axis, Any]]] = {}
        readers: dict[int, tuple[Any, list[tuple[Axis, Any]]]] = {}
        for group in groups:
            for member in group.members:
                axis = Axis(member, group.width)
                axes.setdefault(id(member.variable), []).append((axis, there[group.name]))
                if member.masked:
                    entry = readers.setdefault(id(member.variable), (member.variable, []))
                    entry[1].append((axis, there[group.name]))
        self.hold(
            there=there,
            partners=partners,
            groups={group.name: group for group in groups},
            filters={group.name: _Filters(group, axes) for group in groups},
            scales={group.name: _normalisation(graph, group) for group in groups},
            readers=list(readers.values()),
        )

    def gradients(self, gradients: Gradients, learning_rate: Any) -> Gradients:
        """With that of the correlation loss."""
        parts = {name: self._pairs(name) for name in self.held.filters}
        count, total = self._sums(parts)
        factor = -self.penalty * ops.exp(-total / ops.maximum(count, 1.0))
        factor = factor / ops.maximum(count, 1.0)
        changed = dict(gradients)
        for name, (rho, is_paired, centred, other, squares) in parts.items():
            norms = ops.sqrt(squares * ops.take(squares, self.held.partners[name], axis=0))
            slope = other / norms[:, None] - (rho / squares)[:, None] * centred
            slope = slope * (factor * ops.sign(rho) * is_paired)[:, None]
            for variable, part in self.held.filters[name].apart(slope):
                if id(variable) in changed:
                    known = changed[id(variable)]
                    changed[id(variable)] = known + ops.cast(part, known.dtype)
        return changed

    def update(self, gradients: Gradients, learning_rate: Any) -> None:
        """Slices that read removed channels are zero again."""
        for variable, axes in self.held.readers:
            value = ops.convert_to_tensor(variable)
            for axis, there in axes:
                value = value * ops.cast(
                    axis.spread(ops.convert_to_tensor(there), 1.0), value.dtype
                )
            variable.assign(value)

    def _pairs(self, name: str) -> tuple[Any, Any, Any, Any, Any]:
        """Of every channel: rho with its partner, whether it has one, and both filters, centred."""
        partner = ops.convert_to_tensor(self.held.partners[name])
        centred = self.held.filters[name].centred()
        squares = ops.sum(ops.square(centred), axis=1) + EPSILON
        other = ops.take(centred, partner, axis=0)
        rho = ops.sum(centred * other, axis=1)
        rho = rho / ops.sqrt(squares * ops.take(squares, partner, axis=0))
        alone = np.arange(self.held.groups[name].width)
        return rho, ops.cast(ops.not_equal(partner, alone), "float32"), centred, other, squares

    def _sums(self, parts: Mapping[str, tuple[Any, ...]]) -> tuple[Any, Any]:
        """The number of pairs, and the sum of their absolute correlations."""
        count = sum(ops.sum(paired) for _, paired, *_ in parts.values()) / 2
        total = sum(ops.sum(ops.abs(rho) * paired) for rho, paired, *_ in parts.values()) / 2
        return count, total

    def figures(self) -> Mapping[str, float]:
        """Pairs of this episode, their mean absolute correlation (0 if none), and C_S."""
        count, total = self._sums({name: self._pairs(name) for name in self.held.filters})
        pairs, correlation = float(count), float(total / ops.maximum(count, 1.0))
        return {
            "pairs": pairs,
            "correlation": correlation,
            "correlation_loss": float(np.exp(-correlation)),
        }

    # -- between epochs ------------------------------------------------------------------------

    def choose(self, counts: Mapping[str, int]) -> None:
        """Begins an episode: the pairs of largest correlation among what is there.

        Args:
            counts: group name -> pairs; the other groups have none.
        """
        for name, state in self.held.partners.items():
            partner = np.arange(int(state.shape[0]))
            filters = ops.convert_to_numpy(self.held.filters[name].centred())
            there = np.asarray(self.held.there[name]) > 0
            for x, y in top_pairs(filters, counts.get(name, 0), there):
                partner[[x, y]] = y, x
            state.assign(partner)

    def outcome(self) -> dict[str, tuple[NDArray[np.bool_], dict[int, tuple[int, float]]]]:
        """What would be left if the episode ended now.

        Returns:
            Group name -> bool array ``(width,)`` of the channels that stay; and for each of this
            episode's that go and are absorbed, the channel that takes over and the factor a.
        """
        result = {}
        for name, state in self.held.partners.items():
            partner, stays = np.asarray(state), np.asarray(self.held.there[name]) > 0
            into: dict[int, tuple[int, float]] = {}
            rows = ops.convert_to_numpy(self.held.filters[name].rows()).astype(np.float64)
            centred = ops.convert_to_numpy(self.held.filters[name].centred()).astype(np.float64)
            norms, scales = np.abs(rows).sum(1), self.held.scales[name]()
            for x in np.flatnonzero(partner > np.arange(len(partner))).tolist():
                y = int(partner[x])
                kept, lost = (x, y) if norms[x] >= norms[y] else (y, x)
                stays[lost] = False
                slope = centred[kept] @ centred[lost] / (centred[kept] @ centred[kept] + EPSILON)
                if self.absorb and scales is not None and scales[kept]:
                    slope *= scales[lost] / scales[kept]
                    if slope > 0:
                        into[lost] = kept, float(slope)
            result[name] = stays, into
        return result

    def remove(self) -> None:
        """Ends an episode: one of each pair goes."""
        for name, (stays, into) in self.outcome().items():
            for member in self.held.groups[name].members:
                if member.masked and into:
                    _absorb(member, into)
            self.held.there[name].assign(stays.astype(np.float32))
            self.held.partners[name].assign(np.arange(len(stays)))
        self.update({}, 0.0)


class _Filters:
    """All kernels that make a group's channels, as one matrix with a row per channel.

    Args:
        group: the group.
        axes: ``id`` of a weight -> its axes along which channels may be removed, each with the
            state that says which are there.
    """

    def __init__(self, group: ChannelGroup, axes: Mapping[int, list[tuple[Axis, Any]]]) -> None:
        self._width = group.width
        self._members = [member for member in group.producers if member.scored]
        self._others = [
            [(a, state) for a, state in axes[id(m.variable)] if a.member.axis != m.axis]
            for m in self._members
        ]

    def rows(self) -> Any:
        """float32 tensor of shape ``(width, n)``."""
        parts = []
        for member in self._members:
            value = ops.moveaxis(ops.cast(member.variable, "float32"), member.axis, 0)
            order = member.positions[np.argsort(member.channels, kind="stable")]
            parts.append(ops.reshape(ops.take(value, order, axis=0), (self._width, -1)))
        return ops.concatenate(parts, axis=1)

    def centred(self) -> Any:
        """Rows less their means; entries of removed channels are 0 and do not count."""
        there, rows = self._there(), self.rows()
        mean = ops.sum(rows * there, axis=1) / ops.maximum(ops.sum(there, axis=1), 1.0)
        return (rows - mean[:, None]) * there

    def apart(self, rows: Any) -> list[tuple[Any, Any]]:
        """The weights, each with its part of a matrix like :meth:`rows`."""
        result, start = [], 0
        for member in self._members:
            shape = [int(size) for size in member.variable.shape]
            size = shape.pop(member.axis)
            each = len(member.positions) // self._width
            columns = each * int(np.prod(shape))
            part = ops.reshape(rows[:, start : start + columns], (self._width * each, *shape))
            start += columns
            # Positions of other groups' channels take a row of zeros behind the last.
            index = np.full(size, self._width * each)
            order = np.argsort(member.channels, kind="stable")
            index[member.positions[order]] = np.arange(self._width * each)
            part = ops.concatenate([part, ops.zeros((1, *shape))])
            part = ops.moveaxis(ops.take(part, index, axis=0), 0, member.axis)
            result.append((member.variable, part))
        return result

    def _there(self) -> Any:
        """1 where an entry belongs to channels that are there, else 0: shape ``(1, n)``."""
        parts = []
        for member, others in zip(self._members, self._others, strict=True):
            shape = [int(size) for size in member.variable.shape]
            shape[member.axis] = 1
            mask = ops.ones(shape)
            for axis, there in others:
                mask = mask * axis.spread(ops.convert_to_tensor(there), 1.0)
            mask = ops.reshape(ops.moveaxis(mask, member.axis, 0), (1, -1))
            parts.append(ops.tile(mask, (1, len(member.positions) // self._width)))
        return ops.concatenate(parts, axis=1)


def top_pairs(
    centred: Any, count: int, there: NDArray[np.bool_] | None = None
) -> list[tuple[int, int]]:
    """Disjoint pairs of rows, the largest absolute correlation first.

    Args:
        centred: array of shape ``(width, n)``, rows of mean 0.
        count: how many, at most half as many as there are rows.
        there: bool array of shape ``(width,)``: rows that may be taken; by default all.

    Returns:
        Pairs ``(x, y)`` with ``x < y``; of equal correlations the one of lower indices.
    """
    rows = np.asarray(centred, np.float64)
    rows = rows / np.sqrt((rows**2).sum(1, keepdims=True) + EPSILON)
    free = np.ones(len(rows), bool) if there is None else there.copy()
    first, second = np.triu_indices(len(rows), 1)
    order = np.argsort(-np.abs(rows @ rows.T)[first, second], kind="stable")
    pairs: list[tuple[int, int]] = []
    for x, y in zip(first[order].tolist(), second[order].tolist(), strict=True):
        if len(pairs) == count:
            break
        if free[x] and free[y]:
            free[[x, y]] = False
            pairs.append((x, y))
    return pairs


def falling_widths(whole: int, target: int, episodes: int) -> list[int]:
    """Widths that fall by the same ratio every time, but never to less than half.

    The last is ``target``, or more if that is out of reach.
    """
    widths = [whole]
    for number in range(1, episodes + 1):
        wanted = round(whole * (target / whole) ** (number / episodes))
        widths.append(max(wanted, -(-widths[-1] // 2)))
    return widths


def _normalisation(
    graph: ChannelGraph, group: ChannelGroup
) -> Callable[[], NDArray[np.float64] | None]:
    """What the group's channels are scaled with on their way to all readers, now.

    ``None`` where that is no single positive or negative number per channel.
    """
    followers = {member.path: dict[str, Member]() for member in group.followers}
    for member in group.followers:
        followers[member.path][member.weight] = member
    if not followers:
        return lambda: np.ones(group.width)
    ((path, members), *more) = followers.items()
    op = next(op for key, op in graph.record.ops.items() if graph.record.paths[key] == path)
    variance, gamma = members.get("moving_variance"), members.get("gamma")
    if more or variance is None or len(variance.positions) != group.width:
        return lambda: None

    def values(member: Member) -> NDArray[np.float64]:
        result = np.empty(group.width)
        result[member.channels] = np.asarray(member.variable).astype(np.float64)[member.positions]
        return result

    def scales() -> NDArray[np.float64]:
        scale = 1 / np.sqrt(values(variance) + float(op.epsilon))
        return scale if gamma is None else scale * values(gamma)

    return scales


def _absorb(member: Member, into: Mapping[int, tuple[int, float]]) -> None:
    """Adds slices of channels that go to those of the channels that take over."""
    value = np.moveaxis(np.asarray(member.variable).copy(), member.axis, 0)
    number = occurrences(member.channels)
    places = {
        (int(c), int(n)): int(p)
        for c, n, p in zip(member.channels, number, member.positions, strict=True)
    }
    for (channel, occurrence), place in places.items():
        if channel in into:
            kept, factor = into[channel]
            value[places[kept, occurrence]] += (factor * value[place]).astype(value.dtype)
    member.variable.assign(np.moveaxis(value, 0, member.axis))


def _update_of(graph: ChannelGraph) -> CorrelationUpdate:
    update = getattr(graph.model, "update", None)
    if not isinstance(update, CorrelationUpdate):
        raise ArgumentError(
            f"Expected a model from FilterCorrelation.prepare. Received: {graph.model.name!r}, "
            "which has no pairs."
        )
    return update
