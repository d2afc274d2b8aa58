"""Readers: layers that are linear in patches of their input, and those patches as rows.

Convolutions of one to three dimensions (any stride, dilation, padding and number of groups) and
dense layers compute, at every output position, a product of a patch of the input with a matrix.
With the rows X of the patches at some positions, the output there is ``X @ matrix + bias``.

Columns are ordered by (position along the kernel's input axis, offset within the window), so that
what belongs to one channel lies side by side. A channel behind a flatten owns many positions.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.graph import ChannelGraph, ChannelGroup
from tfprune.graph.context import Site
from tfprune.graph.evaluate import evaluate
from tfprune.graph.rules.convolution import convolution
from tfprune.graph.rules.dense import dense
from tfprune.graph.rules.registry import find_rule
from tfprune.graph.trace import Call, is_model

Array = NDArray[Any]
Matrix = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Reader:
    """A convolution or dense layer, as a matrix that reads patches of its input.

    Attributes:
        path: the layer's path.
        number: its place in the order of the model.
        op: the live layer.
        site: its kernel and the labels along the kernel's axes.
        calls: ``id`` of every call of the layer (a shared layer has several).
        window: kernel sizes; ``()`` for a dense layer.
        strides, dilation: one per axis of the window.
        padding: ``"valid"``, ``"same"`` or ``"causal"``.
        groups: of a grouped convolution, else 1.
        channels_first: whether channels come before the other axes of the input and output.
    """

    path: str
    number: int
    op: Any
    site: Site
    calls: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str
    groups: int
    channels_first: bool

    @property
    def taps(self) -> int:
        """Offsets within the window."""
        return math.prod(self.window)

    @property
    def input_axis(self) -> int:
        """The kernel's axis that reads; the last one makes the outputs."""
        return len(self.window)

    @property
    def inputs(self) -> int:
        """Positions along the kernel's input axis (those of one group)."""
        return int(self.site.variable.shape[self.input_axis])

    @property
    def kernel(self) -> Matrix:
        """The layer's kernel, float64."""
        return np.asarray(self.site.variable).astype(np.float64)

    def matrix(self, kernel: Matrix) -> Matrix:
        """Shape (groups, inputs * taps, filters / groups), in the order of the rows."""
        flat = np.moveaxis(kernel, self.input_axis, 0).reshape(self.inputs * self.taps, -1)
        return np.moveaxis(flat.reshape(len(flat), self.groups, -1), 1, 0)

    def unmatrix(self, matrix: Matrix) -> Matrix:
        """The kernel behind a matrix: the inverse of :meth:`matrix`."""
        flat = np.moveaxis(matrix, 0, 1).reshape(self.inputs, *self.window, -1)
        return np.moveaxis(flat, 0, self.input_axis)

    def output_sizes(self, tensor: Any) -> tuple[int, ...]:
        """Sizes of the output but for examples and channels, for an input tensor."""
        if not self.window:
            return tuple(int(size) for size in tensor.shape[1:-1])
        return tuple(
            (size + sum(pad) - dilation * (tap - 1) - 1) // stride + 1
            for size, pad, dilation, tap, stride in zip(
                self._sizes(tensor), self._pads(tensor), self.dilation, self.window, self.strides,
                strict=True,
            )
        )  # fmt: skip

    def rows(self, tensor: Any, examples: Indices, places: Indices) -> Matrix:
        """The patches that some outputs are made of.

        Args:
            tensor: the layer's input, examples first.
            examples: int array, shape (rows,).
            places: int array, shape (rows,): numbers of output positions, as of a flattened output.

        Returns:
            Shape (groups, rows, inputs * taps), float64.
        """
        if not self.window:
            array = np.asarray(tensor)
            array = array.reshape(len(array), -1, array.shape[-1])
            return array[examples, places][None].astype(np.float64)
        array = _channels_last(np.asarray(tensor), self.channels_first)
        padded = np.pad(array, [(0, 0), *self._pads(tensor), (0, 0)])
        starts = np.unravel_index(places, self.output_sizes(tensor))
        index: list[Indices] = [examples.reshape(-1, *([1] * len(self.window)))]
        for axis, (start, stride, dilation, tap) in enumerate(
            zip(starts, self.strides, self.dilation, self.window, strict=True)
        ):
            offsets = start[:, None] * stride + np.arange(tap) * dilation
            shape = [len(places)] + [1] * len(self.window)
            shape[axis + 1] = tap
            index.append(offsets.reshape(shape))
        patches = np.moveaxis(padded[tuple(index)], -1, 1)
        grouped = patches.reshape(len(places), self.groups, -1)
        return np.moveaxis(grouped, 1, 0).astype(np.float64)

    def outputs_at(self, tensor: Any, examples: Indices, places: Indices) -> Matrix:
        """Values of a tensor in the shape of the output, as shape (rows, filters)."""
        array = _channels_last(np.asarray(tensor), self.channels_first)
        array = array.reshape(len(array), -1, array.shape[-1])
        return array[examples, places].astype(np.float64)

    def _sizes(self, tensor: Any) -> tuple[int, ...]:
        sizes = tensor.shape[2:] if self.channels_first else tensor.shape[1:-1]
        return tuple(int(size) for size in sizes)

    def _pads(self, tensor: Any) -> list[tuple[int, int]]:
        """Zeros before and after each axis of the window."""
        pads = []
        for size, tap, stride, dilation in zip(
            self._sizes(tensor), self.window, self.strides, self.dilation, strict=True
        ):
            reach = (tap - 1) * dilation
            if self.padding == "same":
                # As many outputs as strides fit; an odd zero goes behind.
                total = max((math.ceil(size / stride) - 1) * stride + reach + 1 - size, 0)
                pads.append((total // 2, total - total // 2))
            else:
                pads.append((reach if self.padding == "causal" else 0, 0))
        return pads


def readers_of(graph: ChannelGraph) -> dict[str, Reader]:
    """The readers of a model by their path, in the order of the model."""
    ids: dict[int, list[int]] = {}
    ops: dict[int, Any] = {}
    for call in all_calls(graph):
        if find_rule(call.op)[0] in (convolution, dense):
            ops[id(call.op)] = call.op
            known = ids.setdefault(id(call.op), [])
            if id(call) not in known:
                known.append(id(call))
    result: dict[str, Reader] = {}
    for key, op in ops.items():
        site = graph.record.sites.get(id(op.kernel))
        window = tuple(int(size) for size in op.kernel.shape[:-2])
        # A depthwise convolution written as a grouped one reads nothing: it follows.
        if site is None or site.roles[-1] == "follows":
            continue
        result[site.path] = Reader(
            path=site.path,
            number=len(result),
            op=op,
            site=site,
            calls=tuple(ids[key]),
            window=window,
            strides=tuple(op.strides) if window else (),
            dilation=tuple(op.dilation_rate) if window else (),
            padding=str(op.padding) if window else "valid",
            groups=int(op.groups) if window else 1,
            channels_first=bool(window) and op.data_format == "channels_first",
        )
    return result


def readers_in(group: ChannelGroup, readers: Mapping[str, Reader]) -> list[Reader]:
    """The readers of a group's channels, in the order of the model."""
    variables = {id(member.variable) for member in group.consumers}
    return [reader for reader in readers.values() if id(reader.site.variable) in variables]


def owners_of(reader: Reader, group: ChannelGroup) -> Indices:
    """For each position along the kernel's input axis, the group's channel there, or -1.

    Shape (inputs,).
    """
    owners = np.full(reader.inputs, -1)
    for member in group.consumers:
        if member.variable is reader.site.variable and member.axis == reader.input_axis:
            owners[member.positions] = member.channels
    return owners


def all_calls(graph: ChannelGraph) -> Iterator[Call]:
    """Every call but those of nested models themselves, as often and in the order as it is made."""

    def walk(model: Any) -> Iterator[Call]:
        for call in graph.record.traces[id(model)].calls:
            if is_model(call.op):
                yield from walk(call.op)
            else:
                yield call

    return walk(graph.model)


class _Seen(Exception):
    """Everything wanted was seen; the rest of the network need not be computed."""


def inputs_at(
    graph: ChannelGraph, batch: Sequence[Any], calls: set[int], override: Mapping[int, Any]
) -> dict[int, list[Sequence[Any]]]:
    """The input tensors of some calls for one batch: ``id`` of the call -> one entry per time.

    Args:
        graph: the analysed model, in inference mode.
        batch: one array per input.
        calls: ``id`` of each call.
        override: as for :func:`tfprune.graph.evaluate.evaluate`.
    """
    found: dict[int, list[Sequence[Any]]] = {key: [] for key in calls}
    left = sum(count for key, count in _times(graph).items() if key in calls)

    def observe(call: Call, tensors: Sequence[Any]) -> None:
        nonlocal left
        if id(call) in found:
            found[id(call)].append(tensors)
            left -= 1
            if not left:
                raise _Seen

    with contextlib.suppress(_Seen):
        evaluate(graph, batch, override=override, observe=observe)
    return found


def _times(graph: ChannelGraph) -> Counter[int]:
    return Counter(id(call) for call in all_calls(graph))


def draw(
    reader: Reader, tensor: Any, positions: int, random: np.random.Generator
) -> tuple[Indices, Indices]:
    """Examples and output positions to sample, shape (rows,) each.

    All positions, once, where there are no more than asked for; else drawn with replacement.
    """
    count, available = int(tensor.shape[0]), math.prod(reader.output_sizes(tensor))
    if available <= positions:
        pairs = np.array(list(itertools.product(range(count), range(available))), np.int64)
        pairs = pairs.reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]
    return np.repeat(np.arange(count), positions), random.integers(0, available, count * positions)


def _channels_last(array: Array, channels_first: bool) -> Array:
    return np.moveaxis(array, 1, -1) if channels_first else array
