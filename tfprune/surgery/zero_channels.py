"""From zeros to fewer channels: removes what weight pruning has emptied, without changing outputs.

Han et al. 2015 (arXiv:1506.02626, section 3.5) remove neurons without input or output connections.
On channel groups there are three ways in which a channel can go exactly:

- *unread*: every weight that reads it is zero;
- *silent*: every weight that makes it is zero, and what arrives where it is read is zero;
- *constant*: every weight that makes it is zero, and what arrives (a bias, a shift of batch
  normalisation) is one number, which is added to the bias of each layer that reads it. That is
  exact for dense layers and for convolutions without padding; with padding the border sees zeros
  instead of the number, and without a bias there is nothing to add it to: such a channel stays.

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
from tfprune.graph.evaluate import call_model, evaluate
from tfprune.graph.plan import PruningPlan
from tfprune.graph.trace import Call
from tfprune.surgery.rebuild import apply
from tfprune.surgery.verify import check_finite, random_batch

# Sums in another order and a bias that absorbs a constant: float32 rounding, as in verify.
_TOLERANCE = 1e-4
_PROBES = 8


@dataclass(frozen=True)
class EmptyChannels:
    """The channels of a model that weight pruning has emptied.

    Attributes:
        removable: group name -> indices (int64) of channels that can go without changing outputs.
        staying: group name -> how many of its emptied channels stay, and why.
        absorbed: what the constant channels among them contribute to layers that read them: these
            have to go into biases first.
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
        bias: the layer's bias, a live variable of shape ``(units,)``; ``None`` for a channel that
            is zero, which adds nothing.
        value: float64, shape ``(units,)``.
        kernel, axis, positions: where the layer reads the channel.
    """

    bias: Any
    value: NDArray[np.float64]
    kernel: Any
    axis: int
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class Arriving:
    """What a layer was seen to read along one axis of its input, over examples and positions.

    Attributes:
        channels: int64, shape ``(size,)``: the channel on each position of the axis.
        low, high: shape ``(size,)``: smallest and largest value there.
    """

    channels: NDArray[np.int64]
    low: NDArray[Any]
    high: NDArray[Any]


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
                arriving = _observe(graph)
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


def _observe(graph: ChannelGraph) -> dict[str, list[Arriving]]:
    """What every layer that reads channels sees on random inputs, by its path."""
    readers = {m.path for group in graph.prunable for m in group.members if m.masked}
    seen: dict[str, list[Arriving]] = {}

    def observe(call: Call, tensors: Sequence[Any]) -> None:
        path = graph.record.paths.get(id(call.op), "")
        if path not in readers:
            return
        for ref, tensor in zip(call.inputs, tensors, strict=True):
            for axis, labels in enumerate(graph.record.tensors.get(ref.key, ())):
                if labels is None:
                    continue
                value = np.asarray(tensor)
                others = tuple(a for a in range(value.ndim) if a != axis)
                seen.setdefault(path, []).append(
                    Arriving(graph.channels(labels), value.min(others), value.max(others))
                )

    evaluate(graph, random_batch(graph, seed=1, examples=_PROBES), observe=observe)
    return seen


def _contributions(
    graph: ChannelGraph, group: ChannelGroup, channel: int, arriving: Mapping[str, list[Arriving]]
) -> list[Contribution]:
    """What a channel adds to the layers that read it; raises where that is not one number."""
    number = int(group.channel_ids[channel])
    ops = {graph.record.paths[key]: op for key, op in graph.record.ops.items()}
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
        low = [arrival.low[where] for arrival, where in zip(seen, on, strict=True)]
        high = [arrival.high[where] for arrival, where in zip(seen, on, strict=True)]
        silent = all(not values.any() for values in (*low, *high))
        if silent and any(len(values) for values in low):
            nothing = np.zeros(())
            result.append(Contribution(None, nothing, member.variable, member.axis, positions))
            continue
        op = ops[member.path]
        bias = _bias_for_constants(op)
        if bias is None:
            raise _StaysError(
                f"constant, and {member.path!r} cannot absorb it (no bias, or padding)"
            )
        if len(seen) != 1 or len(low[0]) != len(positions) or (low[0] != high[0]).any():
            raise _StaysError(f"not constant where {member.path!r} reads it")
        per_position = np.moveaxis(kernel, member.axis, 0)
        units = per_position.reshape(len(positions), -1, per_position.shape[-1]).sum(axis=1)
        result.append(Contribution(bias, low[0] @ units, member.variable, member.axis, positions))
    return result


def _bias_for_constants(op: Any) -> Any:
    """The bias that takes up a constant input exactly, or ``None``."""
    name = type(op).__name__
    if name in ("Conv1D", "Conv2D", "Conv3D"):
        whole = op.padding == "valid" or all(size == 1 for size in op.kernel_size)
        return op.bias if whole and op.groups == 1 else None
    return op.bias if name == "Dense" else None


def _absorb(contribution: Contribution) -> None:
    """Adds to the bias, and zeroes the weights that read the channel, in place."""
    if contribution.bias is not None:
        bias = np.asarray(contribution.bias, np.float64) + contribution.value
        contribution.bias.assign(bias.astype(np.asarray(contribution.bias).dtype))
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
