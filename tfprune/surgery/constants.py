r"""Constants that removed channels contribute to the layers that read them, and where they can go.

A channel whose value is one number a, wherever and whatever is read, adds to output o of a reader
with kernel W

.. math:: s_o = \sum_k a_k \sum_{h, w} W_{h, w, k, o}

(k over such channels). Before the channel goes, :math:`s_o` is added to the reader's bias; or,
where there is none and a batch normalisation directly follows, taken from that one's moving mean.
Then the outputs in inference mode stay as they are. In training a batch normalisation takes the
batch's own mean, in which the constant is not missed either.

Reference: step 4 of the algorithm in J. Ye, X. Lu, Z. Lin and J. Z. Wang, "Rethinking the
Smaller-Norm-Less-Informative Assumption in Channel Pruning of Convolution Layers", ICLR 2018,
arXiv:1802.00124 (read in the paper). There the channels are those whose scale of batch
normalisation is 0, which are :math:`f(\beta)` behind an activation f. Here it does not matter what
made them constant: what arrives at a reader is observed, behind pooling, residual additions,
flattening and whatever else lies between.

Exact for dense layers, convolutions of 1x1 or without padding, grouped and separable ones among
them. A convolution with padding sees zeros instead of the constant at its border: there the formula
holds inside the image only, and the group is reported as not exact. So it does behind a depthwise
convolution with padding, as what arrives is no constant then.

With data, channels that are not constant are absorbed by the mean of what arrives: of all constants
the nearest in the mean square. The group is not exact then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.batches import iterate
from tfprune.graph import ChannelGraph
from tfprune.graph.evaluate import evaluate, flatten
from tfprune.graph.trace import Call
from tfprune.surgery.verify import random_batch

Vector = NDArray[np.float64]

_PROBES = 8
# Pooling and additions of a constant round alike everywhere but at borders, to a few float32 units.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Absorption:
    """What :func:`absorbed` found.

    Attributes:
        values: full name of a bias or moving mean -> its new values (float32, or float64 for a
            float64 weight), in the shape of the kept part: for :attr:`PruningPlan.values`.
        exact: name of every group that loses channels -> whether the outputs stay what they were
            on the inputs that were observed, to rounding, as far as this group goes.
        reasons: name of each group that is not exact -> why, in words.
    """

    values: Mapping[str, NDArray[Any]]
    exact: Mapping[str, bool]
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        exact = sum(self.exact.values())
        lines = [f"{len(self.values)} weights absorb; {exact} of {len(self.exact)} groups exactly"]
        return "\n".join([*lines, *(f"  {name}: {why}" for name, why in self.reasons.items())])


def absorbed(
    graph: ChannelGraph,
    kept: Mapping[str, Sequence[int] | NDArray[np.int64]],
    data: Any = None,
    *,
    batches: int | None = 8,
    batch_size: int = 64,
) -> Absorption:
    """New biases and moving means that make up for constant channels that a plan removes.

    Args:
        graph: the analysed model; it is only read.
        kept: group name -> indices of the channels that stay; other groups keep everything.
        data: ``None`` to absorb constants only, observed on random inputs (of floating point,
            standard normal). Or data, see :func:`tfprune.batches.iterate`: what is not constant
            on them is absorbed by its mean.
        batches: how many of the data; ``None`` for all.
        batch_size: for arrays.

    Returns:
        The new values, and what could not be absorbed, or only roughly. Channels that are dead on
        all that was observed count as constant.

    Raises:
        KeyError: an unknown group.
        DataError, ArgumentError: data that do not fit.
    """
    mask = graph.keep_mask(kept)
    losing = [g for g in graph.groups if not mask[g.channel_ids].all()]
    findings = _Findings({group.name: [] for group in losing})
    for group in losing:
        if not group.exact:
            findings.why[group.name].append(group.inexact_reason)
    if not losing:
        return findings.absorption(graph, mask)
    if data is None:
        given: Iterable[Sequence[Any]] = [random_batch(graph, seed=1, examples=_PROBES)]
    else:
        shape = getattr(graph.model, "input_shape", None)
        pairs = iterate(data, batch_size=batch_size, limit=batches, input_shape=shape)
        given = ([np.asarray(part) for part in flatten(x)] for x, _ in pairs)
    arriving = observe(graph, given)
    readers = dict.fromkeys(m.path for group in losing for m in group.members if m.masked)
    for path in readers:
        _absorb_at(graph, mask, path, arriving.get(path, []), data is not None, findings)
    return findings.absorption(graph, mask)


# -- what arrives ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arriving:
    """What an operation was seen to read along one axis of its input, over examples and positions.

    Attributes:
        op: the operation.
        axis: of the input, counted from the front.
        channels: int64, shape ``(size,)``: the channel on each position of the axis.
        low, high, mean: float64, shape ``(size,)``: smallest, largest and mean value there.
        count: how many values were seen at each position.
    """

    op: Any
    axis: int
    channels: NDArray[np.int64]
    low: Vector
    high: Vector
    mean: Vector
    count: int

    @property
    def constant(self) -> NDArray[np.bool_]:
        """Where it was one number, to rounding."""
        largest = np.maximum(np.abs(self.low), np.abs(self.high))
        found: NDArray[np.bool_] = self.high - self.low <= _ROUNDING * largest
        return found

    def with_more(self, other: Arriving) -> Arriving:
        """Both together."""
        count = self.count + other.count
        return Arriving(
            self.op,
            self.axis,
            self.channels,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            (self.mean * self.count + other.mean * other.count) / count,
            count,
        )


def observe(
    graph: ChannelGraph, batches: Iterable[Sequence[Any]] | None = None
) -> dict[str, list[Arriving]]:
    """What every layer that reads channels sees, in inference mode.

    Args:
        graph: the analysed model.
        batches: each with one array per input; by default one of random inputs.

    Returns:
        Path of the layer -> one entry per call and labelled axis of an input.
    """
    if batches is None:
        batches = [random_batch(graph, seed=1, examples=_PROBES)]
    readers = {m.path for group in graph.prunable for m in group.members if m.masked}
    seen: list[tuple[str, Arriving]] = []
    for batch in batches:
        now = _observed(graph, batch, readers)
        if seen:
            now = [(path, a.with_more(b)) for (path, a), (_, b) in zip(seen, now, strict=True)]
        seen = now
    result: dict[str, list[Arriving]] = {}
    for path, arrival in seen:
        result.setdefault(path, []).append(arrival)
    return result


def _observed(
    graph: ChannelGraph, batch: Sequence[Any], readers: set[str]
) -> list[tuple[str, Arriving]]:
    seen = []

    def see(call: Call, tensors: Sequence[Any]) -> None:
        path = graph.record.paths.get(id(call.op), "")
        if path not in readers:
            return
        for ref, tensor in zip(call.inputs, tensors, strict=True):
            for axis, labels in enumerate(graph.record.tensors.get(ref.key, ())):
                if labels is None:
                    continue
                value = np.asarray(tensor)
                others = tuple(a for a in range(value.ndim) if a != axis)
                low, high = (
                    reduced(others).astype(np.float64) for reduced in (value.min, value.max)
                )
                mean = value.mean(others, dtype=np.float64)
                channels = graph.channels(labels)
                count = value.size // len(channels)
                seen.append((path, Arriving(call.op, axis, channels, low, high, mean, count)))

    evaluate(graph, batch, observe=see)
    return seen


# -- how it is read ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How a layer reads what is constant along space.

    Attributes:
        op: a dense layer, or a plain, grouped or separable convolution.
        everywhere: whether it reads alike at all positions; not at borders that are padded.
    """

    op: Any
    everywhere: bool

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """What a 1 at each of these positions of the input adds to the outputs.

        Returns:
            Shape ``(len(positions), outputs)``.
        """
        op = self.op
        if type(op).__name__ == "Dense":
            return np.asarray(op.kernel)[positions].astype(np.float64)
        if type(op).__name__.startswith("Separable"):
            depth = _summed(np.asarray(op.depthwise_kernel)[..., positions, :])
            multiplier = depth.shape[1]
            middle = (positions[:, None] * multiplier + np.arange(multiplier)).ravel()
            point = _summed(np.asarray(op.pointwise_kernel)[..., middle, :])
            through: NDArray[np.float64] = np.einsum(
                "im,imo->io", depth, point.reshape(*depth.shape, -1)
            )
            return through
        kernel = np.asarray(op.kernel)
        inputs, outputs = kernel.shape[-2], kernel.shape[-1] // int(op.groups)
        group, within = np.divmod(positions, inputs)
        rows = _summed(kernel[..., within, :])
        # An input adds to the outputs of its own group only.
        rows[group[:, None] != np.arange(rows.shape[1]) // outputs] = 0
        return rows


@dataclass(frozen=True)
class Sink:
    """A weight that can take up a constant.

    Attributes:
        variable: a live variable, shape ``(outputs,)``.
        sign: 1 where the constant is added (a bias), -1 where it is taken away (a mean).
    """

    variable: Any
    sign: float

    def after(self, shift: Vector) -> NDArray[Any]:
        """The new values, whole."""
        before = np.asarray(self.variable)
        after = before.astype(np.float64) + self.sign * shift
        return after if before.dtype == np.float64 else after.astype(np.float32)


def reading(arrivals: Sequence[Arriving]) -> tuple[Arriving, Reading] | None:
    """What arrives on the axis along which a layer reads, all calls together, and how it is read.

    Args:
        arrivals: what arrives at one layer, see :func:`observe`.

    Returns:
        ``None`` for layers other than dense ones and convolutions, which are not understood.
    """
    if not arrivals:
        return None
    op = arrivals[0].op
    name = type(op).__name__
    if name == "Dense":
        how, size = Reading(op, True), int(op.kernel.shape[0])
    elif name in ("Conv1D", "Conv2D", "Conv3D"):
        how, size = Reading(op, _unpadded(op)), int(op.kernel.shape[-2]) * int(op.groups)
    elif name in ("SeparableConv1D", "SeparableConv2D"):
        how, size = Reading(op, _unpadded(op)), int(op.depthwise_kernel.shape[-2])
    else:
        return None
    axis = 1 if getattr(op, "data_format", "") == "channels_first" else None
    ours = [a for a in arrivals if len(a.channels) == size and axis in (None, a.axis)]
    # Of several labelled axes a dense layer reads the last; it has one input.
    last = max((a.axis for a in ours), default=0)
    ours = [a for a in ours if a.axis == last]
    if not ours:
        return None
    together = ours[0]
    for more in ours[1:]:
        together = together.with_more(more)
    return together, how


def _summed(kernel: NDArray[Any]) -> NDArray[np.float64]:
    """A kernel ``(*window, inputs, outputs)`` summed over its window."""
    total: NDArray[np.float64] = kernel.astype(np.float64).sum(axis=tuple(range(kernel.ndim - 2)))
    return total


def _unpadded(op: Any) -> bool:
    return bool(op.padding == "valid" or all(size == 1 for size in op.kernel_size))


def sink_of(graph: ChannelGraph, op: Any) -> Sink | None:
    """Where a constant on the outputs of a layer can go.

    Args:
        graph: the analysed model.
        op: a dense layer or convolution in it.

    Returns:
        The bias; or the moving mean of the batch normalisation that is all that reads the layer's
        output; or ``None``.
    """
    if op.bias is not None:
        return Sink(op.bias, 1.0)
    activation = getattr(op, "activation", None)
    if activation is not None and getattr(activation, "__name__", "") != "linear":
        return None
    calls = [call for traced in graph.record.traces.values() for call in traced.calls]
    own = [call for call in calls if call.op is op]
    if len(own) != 1 or len(own[0].outputs) != 1:
        return None
    out = own[0].outputs[0]
    if any(out.key == end.key for traced in graph.record.traces.values() for end in traced.outputs):
        return None
    after = [call for call in calls if any(ref.key == out.key for ref in call.inputs)]
    if len(after) != 1 or "BatchNormalization" not in type(after[0].op).__name__:
        return None
    norm = after[0].op
    # A normalisation that is called elsewhere, too, has one mean for both.
    if sum(call.op is norm for call in calls) != 1:
        return None
    axes = [norm.axis] if isinstance(norm.axis, int) else list(norm.axis)
    first = getattr(op, "data_format", "") == "channels_first"
    if [axis % len(out.shape) for axis in axes] != [1 if first else len(out.shape) - 1]:
        return None
    return Sink(norm.moving_mean, -1.0)


# -- together ----------------------------------------------------------------------------------


@dataclass
class _Findings:
    """Collected reader by reader."""

    why: dict[str, list[str]]
    sinks: dict[int, Sink] = field(default_factory=dict)
    shifts: dict[int, Vector] = field(default_factory=dict)

    def take(self, sink: Sink, shift: Vector) -> None:
        """Adds up what goes into one weight."""
        key = id(sink.variable)
        self.sinks[key] = sink
        self.shifts[key] = self.shifts.get(key, 0.0) + shift

    def absorption(self, graph: ChannelGraph, mask: NDArray[np.bool_]) -> Absorption:
        """The result, in the shape of what is kept."""
        values = {}
        for key, sink in self.sinks.items():
            site = graph.record.sites[key]
            after = sink.after(self.shifts[key])
            labels = site.labels[0]
            values[site.full_name] = (
                after if labels is None else np.compress(mask[graph.channels(labels)], after)
            )
        reasons = {
            name: "; ".join(dict.fromkeys(reasons)) for name, reasons in self.why.items() if reasons
        }
        return Absorption(values, {name: name not in reasons for name in self.why}, reasons)


def _absorb_at(
    graph: ChannelGraph,
    mask: NDArray[np.bool_],
    path: str,
    arrivals: Sequence[Arriving],
    means: bool,
    findings: _Findings,
) -> None:
    """Adds what one layer reads of removed channels to the findings."""

    def blame(channels: NDArray[np.int64], what: str) -> None:
        for number in np.unique(graph.group_of[channels]).tolist():
            count = len(np.unique(channels[graph.group_of[channels] == number]))
            text = f"{count} channels {what}" if count > 1 else f"1 channel {what}"
            findings.why[graph.groups[number].name].append(text)

    found = reading(arrivals)
    if found is None:
        _blame_unknown(graph, mask, path, arrivals, blame)
        return
    arrival, how = found
    gone = np.flatnonzero(~mask[arrival.channels])
    rows = how.rows(gone)
    gone, rows = gone[rows.any(axis=1)], rows[rows.any(axis=1)]
    channels, constant = arrival.channels[gone], arrival.constant[gone]
    value = np.where(constant | means, arrival.mean[gone], 0.0)
    if constant.all() and not value.any():
        return
    sink = sink_of(graph, arrival.op)
    if sink is not None and sink.sign < 0 and len(arrivals) > 1:
        sink = None  # the layer stands in a model that is called several times
    if sink is None or id(sink.variable) not in graph.record.sites:
        blame(
            channels[(value != 0) | ~constant],
            f"read by {path!r}, which has no bias nor a batch normalisation right behind it",
        )
        return
    if not constant.all():
        remedy = ", where their mean is absorbed" if means else ""
        blame(channels[~constant], f"not constant where {path!r} reads{remedy}")
    if not how.everywhere and value.any():
        blame(
            channels[value != 0],
            f"read by {path!r}, whose padded border sees zeros instead of the constant",
        )
    if value.any():
        findings.take(sink, value @ rows)


def _blame_unknown(
    graph: ChannelGraph,
    mask: NDArray[np.bool_],
    path: str,
    arrivals: Sequence[Arriving],
    blame: Any,
) -> None:
    """A layer that is not understood: only channels that are zero there go exactly."""
    read = [
        graph.groups[number].channel_ids[m.channels]
        for number, group in enumerate(graph.groups)
        for m in group.members
        if m.masked and m.path == path
    ]
    gone = np.unique(np.concatenate(read))
    gone = gone[~mask[gone]]
    zero = np.zeros(len(mask), bool)
    alive = np.zeros(len(mask), bool)
    for arrival in arrivals:
        silent = (arrival.low == 0) & (arrival.high == 0)
        zero[arrival.channels[silent]] = True
        alive[arrival.channels[~silent]] = True
    left = gone[alive[gone] | ~zero[gone]]
    if len(left):
        kind = type(arrivals[0].op).__name__ if arrivals else "a layer inside another"
        blame(left, f"read by {path!r} ({kind}), which cannot absorb a constant")
