r"""How scales of batch normalisation reach the layers that read their channels.

Two questions about a channel group, answered by one walk through the model:

*Guarded.* Does every layer that reads a channel read it behind a batch normalisation's scale? Then
the channel's signal ends when all its scales are zero. A residual stream that a convolution without
normalisation adds to is not guarded: it is alive whatever the scales of its other branches are.

*Rescalable.* Can scales and shifts be multiplied by :math:`\alpha > 0`, and the slices of what
reads the channels divided by it, without changing the function? That needs operations in between
that are positively homogeneous, :math:`f(\alpha x) = \alpha f(x)`: ReLU, pooling, flattening,
and sums of tensors that are all scaled. A depthwise convolution is divided by alpha itself, so that
the batch normalisation behind it takes in what it did. J. Ye, X. Lu, Z. Lin and J. Z. Wang, ICLR
2018, arXiv:1802.00124, scale the scales and the kernels; that the shifts must be scaled, too, was
checked numerically (sheet B5, step 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.graph import ChannelGraph, ChannelGroup, Member
from tfprune.graph.trace import Call, Ref, is_model
from tfprune.methods.slimming import scales_of

_SUMS = frozenset(["Add", "Average", "Maximum", "Minimum", "Subtract"])
_READERS = frozenset(
    ["Conv1D", "Conv1DTranspose", "Conv2D", "Conv2DTranspose", "Conv3D", "Conv3DTranspose", "Dense",
     "SeparableConv1D", "SeparableConv2D"]
)  # fmt: skip
_DEPTHWISE = frozenset(["DepthwiseConv1D", "DepthwiseConv2D"])
_HOMOGENEOUS = frozenset(
    ["Abs", "Absolute", "AveragePool", "Concatenate", "Copy", "Dropout", "ExpandDims", "Flatten",
     "GetItem", "Identity", "LeakyReLU", "LeakyRelu", "Max", "MaxPool", "Mean", "Min", "Negative",
     "PReLU", "Permute", "Relu", "Reshape", "SpatialDropout1D", "SpatialDropout2D",
     "SpatialDropout3D", "Split", "Squeeze", "Sum", "Transpose"]
)  # fmt: skip
_HOMOGENEOUS_FAMILIES = (
    "AveragePooling", "Cropping", "GlobalAveragePooling", "GlobalMaxPooling", "MaxPooling",
    "UpSampling", "ZeroPadding",
)  # fmt: skip
_HOMOGENEOUS_ACTIVATIONS = frozenset(["leaky_relu", "linear", "relu"])


@dataclass(frozen=True)
class ScaleFlow:
    """How one group's scales reach its readers.

    Attributes:
        guarded: whether every reader reads behind a scale.
        obstacle: why the group is not rescalable, in words; empty if it is.
        up, down: the axes of weights to multiply and to divide by alpha.
    """

    guarded: bool
    obstacle: str
    up: tuple[Member, ...]
    down: tuple[Member, ...]


def scale_flow(graph: ChannelGraph) -> dict[str, ScaleFlow]:
    """The flow of every prunable group that has scales, by the group's name."""
    walk = _Walk(graph)
    walk.through(graph.model, [{} for _ in graph.trace.inputs])
    return {group.name: walk.flow(number) for number, group in walk.groups.items()}


def rescale(flows: Iterable[ScaleFlow], alpha: float) -> None:
    """Multiplies the scales and shifts of rescalable groups by alpha, and makes up for it.

    The weights that the flows' members stand for change in place; the model's function does not.
    """
    for flow in flows:
        if flow.obstacle:
            continue
        for members, factor in ((flow.up, alpha), (flow.down, 1 / alpha)):
            for member in members:
                value = np.asarray(member.variable)
                scaled = np.moveaxis(value.astype(np.float64), member.axis, 0).copy()
                scaled[member.positions] *= factor
                member.variable.assign(np.moveaxis(scaled, 0, member.axis).astype(value.dtype))


# Per tensor: number of the group -> (guarded, scaled by alpha).
_State = Mapping[int, tuple[bool, bool]]


class _Walk:
    """One pass through the calls, with the state of every tensor."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph
        self.groups: dict[int, ChannelGroup] = {
            number: group
            for number, group in enumerate(graph.groups)
            if group.prunable and scales_of(group)
        }
        self._norms: dict[str, set[int]] = {}
        self._makers: dict[str, set[int]] = {}
        self._readers: dict[str, set[int]] = {}
        for number, group in self.groups.items():
            for member in scales_of(group):
                self._norms.setdefault(member.path, set()).add(number)
            for member in group.members:
                if member.masked:
                    self._under(self._readers, member.path, number)
                if member.role == "produces" and member.scored:
                    self._under(self._makers, member.path, number)
        self._guarded = dict.fromkeys(self.groups, True)
        self._obstacle = dict.fromkeys(self.groups, "")
        self._up: dict[int, dict[str, None]] = {number: {} for number in self.groups}
        # What a layer takes in, which must be the same whenever it is called.
        self._takes: dict[int, dict[str, bool]] = {number: {} for number in self.groups}

    @staticmethod
    def _under(paths: dict[str, set[int]], path: str, number: int) -> None:
        """A layer inside another is met as that one."""
        parts = path.split("/")
        for end in range(1, len(parts) + 1):
            paths.setdefault("/".join(parts[:end]), set()).add(number)

    def flow(self, number: int) -> ScaleFlow:
        """What was found for one group."""
        group = self.groups[number]
        divided = {path for path, scaled in self._takes[number].items() if scaled}
        kernels = [m for m in group.followers if m.weight == "kernel"]
        return ScaleFlow(
            self._guarded[number],
            self._obstacle[number],
            tuple(
                m
                for m in group.followers
                if m.path in self._up[number] and m.weight in ("gamma", "beta")
            ),
            tuple(
                m for m in (*(m for m in group.members if m.masked), *kernels) if m.path in divided
            ),
        )

    def through(self, model: Any, inputs: Sequence[_State]) -> list[_State]:
        """The states of a model's outputs."""
        traced = self._graph.record.traces[id(model)]
        known = {ref.key: state for ref, state in zip(traced.inputs, inputs, strict=True)}
        for call in traced.calls:
            states = [known[ref.key] for ref in call.inputs]
            if is_model(call.op):
                outputs = self.through(call.op, states)
            else:
                path = self._graph.record.paths.get(id(call.op), "")
                self._read(call, path, states)
                outputs = [self._make(call, path, states, ref) for ref in call.outputs]
            known.update(zip((ref.key for ref in call.outputs), outputs, strict=True))
        return [known[ref.key] for ref in traced.outputs]

    def _stop(self, number: int, why: str) -> None:
        self._obstacle[number] = self._obstacle[number] or why

    def _take(self, number: int, path: str, scaled: bool) -> None:
        if self._takes[number].setdefault(path, scaled) != scaled:
            self._stop(number, f"{path!r} is called on scaled and on other tensors")

    def _read(self, call: Call, path: str, states: Sequence[_State]) -> None:
        for number in self._readers.get(path, ()):
            incoming = [state[number] for state in states if number in state]
            if not incoming or not all(guarded for guarded, _ in incoming):
                self._guarded[number] = False
            for _, scaled in incoming:
                self._take(number, path, scaled)
                if scaled and type(call.op).__name__ not in _READERS:
                    self._stop(number, f"{path!r} ({type(call.op).__name__}) reads it")

    def _make(self, call: Call, path: str, states: Sequence[_State], ref: Ref) -> _State:
        result = {}
        for number in self._in(ref):
            incoming = [state[number] for state in states if number in state]
            if number in self._makers.get(path, ()):
                result[number] = False, False
            elif number in self._norms.get(path, ()):
                self._up[number][path] = None
                self._take(number, path, False)
                if any(scaled for _, scaled in incoming):
                    self._stop(number, f"{path!r} normalises what is scaled already")
                result[number] = True, True
            else:
                result[number] = self._pass(call, path, incoming, number)
        return result

    def _pass(
        self, call: Call, path: str, incoming: Sequence[tuple[bool, bool]], number: int
    ) -> tuple[bool, bool]:
        kind = type(call.op).__name__
        guarded = bool(incoming) and all(guarded for guarded, _ in incoming)
        scaled = any(scaled for _, scaled in incoming)
        if kind in _DEPTHWISE:
            self._take(number, path, scaled)
            return guarded, False
        if kind == "Multiply" and len(call.inputs) > 1:
            # One factor without a signal is enough to end the channel's.
            guarded = any(guarded for guarded, _ in incoming)
            if scaled:
                self._stop(number, f"{path!r} multiplies it (a gate)")
            return guarded, False
        if not scaled:
            return guarded, False
        if kind in _SUMS:
            whole = len(incoming) == len(call.inputs) > 1
            if not whole or not all(scaled for _, scaled in incoming):
                self._stop(number, f"{path!r} adds scaled and other tensors")
        elif not _homogeneous(call.op, kind) and kind != "Multiply":
            self._stop(number, f"{path!r} ({kind}) is not positively homogeneous")
        return guarded, True

    def _in(self, ref: Ref) -> list[int]:
        """The groups whose channels a tensor carries."""
        axes = [axis for axis in self._graph.record.tensors.get(ref.key, ()) if axis is not None]
        if not axes:
            return []
        channels = self._graph.channels(np.concatenate(axes))
        found = np.unique(self._graph.group_of[channels]).tolist()
        return [number for number in found if number in self.groups]


def _homogeneous(op: Any, kind: str) -> bool:
    """Whether f(a x) = a f(x) for every a > 0."""
    if kind == "ReLU":
        return op.max_value is None and not op.threshold
    if kind == "Activation":
        return getattr(op.activation, "__name__", "") in _HOMOGENEOUS_ACTIVATIONS
    return kind in _HOMOGENEOUS or kind.startswith(_HOMOGENEOUS_FAMILIES)
