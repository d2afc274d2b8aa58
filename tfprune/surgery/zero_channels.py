"""From zeros to fewer channels: removes what weight pruning has emptied, without changing outputs.

Han et al. 2015 (arXiv:1506.02626, section 3.5) remove neurons without input or output connections.
On channel groups there are three ways in which a channel can go exactly:

- *unread*: every weight that reads it is zero;
- *silent*: every weight that makes it is zero, and what arrives where it is read is zero;
- *constant*: every weight that makes it is zero, and what arrives (a bias, a shift of batch
  normalisation) is one number, which goes into the bias of each layer that reads it, or the moving
  mean of the batch normalisation behind (:mod:`tfprune.surgery.constants`). That is exact for dense
  layers and for convolutions without padding; with padding the border sees zeros instead of the
  number, and without a bias or mean there is nothing to add it to: such a channel stays.

One removal can make another possible, so this is repeated until nothing changes.

What arrives is observed on random inputs, in inference mode. As the weights that make the channel
are zero, it does not depend on the inputs, up to layers that multiply channels by other tensors;
varied inputs tell those apart, and the result is compared with the source before it is returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.errors import ModelError
from tfprune.graph import ChannelGraph, ChannelGroup, Member, analyse
from tfprune.graph.evaluate import call_model
from tfprune.graph.plan import PruningPlan
from tfprune.surgery.constants import Arriving, Sink, observe, reading, sink_of
from tfprune.surgery.rebuild import apply
from tfprune.surgery.verify import check_finite, random_batch

# Sums in another order and a bias that absorbs a constant: float32 rounding, as in verify.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class EmptyChannels:
    """The channels of a model that weight pruning has emptied.

    Attributes:
        removable: group name -> indices (int64) of channels that can go without changing outputs.
        staying: group name -> how many of its emptied channels stay, and why.
        absorbed: what the constant channels among them contribute to layers that read them: these
            have to go into biases and means first.
    """

    removable: Mapping[str, NDArray[np.int64]]
    staying: Mapping[str, str]
    absorbed: tuple[Contribution, ...]

    @property
    def count(self) -> int:
        """How many channels can go."""
        return sum(len(indices) for indices in self.removable.values())

    def __str__(self) -> str:
        lines = [f"{self.count} channels can be removed without changing the outputs"]
        lines += [f"  {name}: {len(indices)}" for name, indices in self.removable.items()]
        lines += [f"  {name}: {reason}" for name, reason in self.staying.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Contribution:
    """What one channel that is constant adds to the outputs of one layer.

    Attributes:
        sink: what takes it up; ``None`` for a channel that is zero, which adds nothing.
        value: float64, shape ``(units,)``.
        kernel, axis, positions: where the layer reads the channel.
    """

    sink: Sink | None
    value: NDArray[np.float64]
    kernel: Any
    axis: int
    positions: NDArray[np.int64]


def remove_zero_channels(model: Any) -> Any:
    """The smaller model with the same outputs: channels that weight pruning has emptied are gone.

    Args:
        model: a built functional or sequential model without pruning wrappers, of Keras 3 or
            tf_keras. It stays as it is.

    Returns:
        A new model; a copy where there is nothing to remove. ``empty_channels`` tells what can go
        (in a first pass) and what stays, and why.

    Raises:
        ModelError: no such model, weights that are not finite, or (which would be a defect) outputs
            that differ.
    """
    check_finite(model)
    graph = analyse(model)
    batch = random_batch(graph, seed=0)
    current = apply(model, PruningPlan.of(graph, {}))
    while True:
        graph = analyse(current)
        found = empty_channels(graph)
        if not found.count:
            _require_equal(model, current, batch)
            return current
        for contribution in found.absorbed:
            _absorb(contribution)
        kept = {
            name: np.setdiff1d(np.arange(graph[name].width), gone)
            for name, gone in found.removable.items()
        }
        current = apply(current, PruningPlan.of(graph, kept))


def empty_channels(model: Any) -> EmptyChannels:
    """Finds the channels that weight pruning has emptied, in one pass.

    Args:
        model: a model, or its graph from :func:`tfprune.analyse`. It is only read.

    Returns:
        What can go and what stays. One channel of every group stays in any case.

    Raises:
        ModelError: no built functional or sequential model.
    """
    graph = model if isinstance(model, ChannelGraph) else analyse(model)
    arriving: dict[str, list[Arriving]] | None = None
    removable: dict[str, NDArray[np.int64]] = {}
    staying: dict[str, str] = {}
    absorbed: list[Contribution] = []
    for group in graph.prunable:
        unread = _all_zero(group, [m for m in group.members if m.masked])
        unmade = _all_zero(group, [m for m in group.producers if m.scored])
        if not (unread | unmade).any():
            continue
        if not group.exact:
            staying[group.name] = f"{int((unread | unmade).sum())} stay: {group.inexact_reason}"
            continue
        gone: list[int] = np.flatnonzero(unread).tolist()
        left: list[str] = []
        for channel in np.flatnonzero(unmade & ~unread).tolist():
            if arriving is None:
                arriving = observe(graph)
            try:
                absorbed += _contributions(graph, group, channel, arriving)
            except _StaysError as reason:
                left.append(str(reason))
            else:
                gone.append(channel)
        if len(gone) == group.width:
            gone.pop(0)
            left.append("a layer keeps at least one channel")
        if gone:
            removable[group.name] = np.sort(np.array(gone, np.int64))
        if left:
            staying[group.name] = f"{len(left)} stay: {', '.join(dict.fromkeys(left))}"
    return EmptyChannels(removable, staying, tuple(absorbed))


class _StaysError(Exception):
    """Why a channel that is constant cannot be absorbed."""


def _all_zero(group: ChannelGroup, members: Sequence[Member]) -> NDArray[np.bool_]:
    """For each channel of a group, whether all these weights are zero where they carry it."""
    if not members:
        return np.zeros(group.width, bool)
    alive = np.zeros(group.width, bool)
    for member in members:
        value = np.asarray(member.variable)
        others = tuple(axis for axis in range(value.ndim) if axis != member.axis)
        used = (value != 0).any(axis=others)[member.positions]
        alive[member.channels[used]] = True
    return ~alive


def _contributions(
    graph: ChannelGraph, group: ChannelGroup, channel: int, arriving: Mapping[str, list[Arriving]]
) -> list[Contribution]:
    """What a channel adds to the layers that read it; raises where that is not one number."""
    number = int(group.channel_ids[channel])
    result = []
    for member in group.members:
        if not member.masked:
            continue
        positions = member.positions[member.channels == channel]
        kernel = np.take(np.asarray(member.variable, np.float64), positions, member.axis)
        if not kernel.any():
            continue
        seen = arriving.get(member.path, [])
        on = [arrival.channels == number for arrival in seen]
        ends = [
            values[where]
            for arrival, where in zip(seen, on, strict=True)
            for values in (arrival.low, arrival.high)
        ]
        if any(len(values) for values in ends) and not any(values.any() for values in ends):
            nothing = np.zeros(())
            result.append(Contribution(None, nothing, member.variable, member.axis, positions))
            continue
        found = reading(seen)
        sink = None if found is None or len(seen) > 1 else sink_of(graph, found[0].op)
        if found is None or sink is None or not found[1].everywhere:
            raise _StaysError(
                f"constant, and {member.path!r} cannot absorb it (padding, or no bias and no batch "
                "normalisation right behind it)"
            )
        arrival, how = found
        if not arrival.constant[on[0]].all():
            raise _StaysError(f"not constant where {member.path!r} reads it")
        value = arrival.mean[on[0]] @ how.rows(np.flatnonzero(on[0]))
        result.append(Contribution(sink, value, member.variable, member.axis, positions))
    return result


def _absorb(contribution: Contribution) -> None:
    """Puts the constant away, and zeroes the weights that read the channel, in place."""
    sink = contribution.sink
    if sink is not None:
        dtype = np.asarray(sink.variable).dtype
        sink.variable.assign(sink.after(contribution.value).astype(dtype))
    kernel = np.asarray(contribution.kernel).copy()
    index: list[Any] = [slice(None)] * kernel.ndim
    index[contribution.axis] = contribution.positions
    kernel[tuple(index)] = 0
    contribution.kernel.assign(kernel)


def _require_equal(source: Any, result: Any, batch: Sequence[Any]) -> None:
    for before, after in zip(call_model(source, batch), call_model(result, batch), strict=True):
        a, b = np.asarray(before, np.float64), np.asarray(after, np.float64)
        difference, largest = np.max(np.abs(a - b), initial=0), np.max(np.abs(a), initial=0)
        if not difference <= _TOLERANCE * largest:
            raise ModelError(
                "Expected the model without its empty channels to have the same outputs. "
                f"Received: a difference of {difference:.3g} at outputs up to {largest:.3g}. "
                "Please report this model; finish(structured=False) leaves the channels in."
            )
