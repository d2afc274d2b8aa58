"""Convolutions of all ranks: plain, grouped, transposed, depthwise and separable.

The kernel's input axis consumes the input's channels, its output axis and the bias produce.
Kernel layouts: plain ``(*window, inputs / groups, filters)``; transposed ``(*window, filters,
inputs)``; depthwise ``(*window, inputs, multiplier)``.

A grouped convolution loses the same offsets in every group. :func:`whole_groups` is the rule of one
that loses whole groups.
"""

from __future__ import annotations

import math

import numpy as np

from tfprune.graph.context import RuleCall
from tfprune.graph.labels import AxisLabels, Labels, TensorLabels
from tfprune.graph.rules.dense import plain
from tfprune.graph.rules.elementwise import through_activation
from tfprune.graph.rules.registry import layer_rule


def _spatial(call: RuleCall, shape: tuple[int | None, ...], axis: int) -> int | None:
    """Number of positions of one example."""
    return call.product([size for i, size in enumerate(shape) if i not in (0, axis)])


def _output(call: RuleCall, axis: int, channels: AxisLabels) -> TensorLabels:
    """Labels of the output: channels on the channel axis, then the layer's activation."""
    rank = len(call.output_shapes[0])
    labels: list[AxisLabels] = [None] * rank
    labels[axis] = channels
    return through_activation(call, getattr(call.op, "activation", None), tuple(labels))


def tie_groups(call: RuleCall, labels: AxisLabels, groups: int) -> None:
    """States that labels at the same offset in every group are equal."""
    if labels is not None and groups > 1:
        parts = labels.reshape(groups, -1)
        for part in parts[1:]:
            call.unite(parts[0], part)


@layer_rule("Conv1D", "Conv2D", "Conv3D", "Convolution1D", "Convolution2D", "Convolution3D")
def convolution(call: RuleCall) -> TensorLabels:
    """Plain and grouped convolutions; a group per channel is a depthwise convolution."""
    op, axis = call.op, call.channel_axis()
    kernel = plain(call, "kernel")
    groups = int(op.groups)
    window, filters = tuple(kernel.shape[:-2]), int(kernel.shape[-1])
    inputs = call.channels(axis)
    if inputs is not None and 1 < groups == len(inputs):
        return whole_groups(call)
    outputs = call.fresh(filters)
    tie_groups(call, inputs, groups)
    tie_groups(call, outputs, groups)
    # The kernel sees one group's worth of inputs: any group's labels do, as they are tied.
    read = None if inputs is None else inputs[: len(inputs) // groups]
    call.weight(kernel, "kernel", consumes={-2: read}, produces={-1: outputs})
    call.weight(op.bias, "bias", produces={0: outputs}, scored=False)
    call.size("filters", outputs)
    positions = _spatial(call, call.output_shapes[0], axis)
    taps = math.prod(int(size) for size in window)
    call.macs(
        None if positions is None else positions * taps,
        read if read is not None else int(kernel.shape[-2]),
        outputs,
    )
    return _output(call, axis, outputs)


def whole_groups(call: RuleCall) -> TensorLabels:
    """A grouped convolution that loses whole groups: all that a group reads and makes is one."""
    op, axis = call.op, call.channel_axis()
    kernel = plain(call, "kernel")
    groups, filters = int(op.groups), int(kernel.shape[-1])
    inputs = call.channels(axis)
    one = None if inputs is None else inputs[:: len(inputs) // groups]
    if inputs is not None and one is not None:
        for column in inputs.reshape(groups, -1).T[1:]:
            call.unite(one, column)
    outputs = _repeat(one, filters // groups)
    call.weight(kernel, "kernel", follows={-1: outputs})
    call.weight(op.bias, "bias", follows={0: outputs}, scored=False)
    call.size("groups", one)
    call.size("filters", outputs)
    positions = _spatial(call, call.output_shapes[0], axis)
    taps = math.prod(int(size) for size in kernel.shape[:-1])
    call.macs(
        None if positions is None else positions * taps, filters if outputs is None else outputs
    )
    return _output(call, axis, outputs)


@layer_rule(
    "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose", "Convolution1DTranspose",
    "Convolution2DTranspose", "Convolution3DTranspose",
)  # fmt: skip
def transposed_convolution(call: RuleCall) -> TensorLabels:
    """Transposed convolutions: every input position meets the whole window."""
    op, axis = call.op, call.channel_axis()
    kernel = plain(call, "kernel")
    inputs = call.channels(axis)
    outputs = call.fresh(int(kernel.shape[-2]))
    call.weight(kernel, "kernel", consumes={-1: inputs}, produces={-2: outputs})
    call.weight(op.bias, "bias", produces={0: outputs}, scored=False)
    call.size("filters", outputs)
    positions = _spatial(call, call.input_shapes[0], axis)
    taps = math.prod(int(size) for size in kernel.shape[:-2])
    call.macs(
        None if positions is None else positions * taps,
        inputs if inputs is not None else int(kernel.shape[-1]),
        outputs,
    )
    return _output(call, axis, outputs)


def _repeat(labels: AxisLabels, times: int) -> AxisLabels:
    return None if labels is None else np.repeat(labels, times)


@layer_rule("DepthwiseConv1D", "DepthwiseConv2D", "DepthwiseConvolution2D")
def depthwise_convolution(call: RuleCall) -> TensorLabels:
    """The output's labels are the input's, each repeated ``depth_multiplier`` times."""
    op, axis = call.op, call.channel_axis()
    kernel = getattr(op, "kernel", None)
    if kernel is None:  # tf_keras
        kernel = op.depthwise_kernel
    multiplier = int(kernel.shape[-1])
    inputs = call.channels(axis)
    outputs = _repeat(inputs, multiplier)
    call.weight(kernel, "kernel", follows={-2: inputs})
    call.weight(op.bias, "bias", follows={0: outputs}, scored=False)
    positions = _spatial(call, call.output_shapes[0], axis)
    taps = math.prod(int(size) for size in kernel.shape[:-2])
    call.macs(
        None if positions is None else positions * taps * multiplier,
        inputs if inputs is not None else int(kernel.shape[-2]),
    )
    return _output(call, axis, outputs)


@layer_rule("SeparableConv1D", "SeparableConv2D", "SeparableConvolution1D",
            "SeparableConvolution2D")  # fmt: skip
def separable_convolution(call: RuleCall) -> TensorLabels:
    """A depthwise convolution, then a pointwise one that consumes what it makes."""
    op, axis = call.op, call.channel_axis()
    depthwise, pointwise = op.depthwise_kernel, op.pointwise_kernel
    multiplier = int(depthwise.shape[-1])
    inputs = call.channels(axis)
    middle = _repeat(inputs, multiplier)
    outputs: Labels = call.fresh(int(pointwise.shape[-1]))
    call.weight(depthwise, "depthwise_kernel", follows={-2: inputs})
    call.weight(pointwise, "pointwise_kernel", consumes={-2: middle}, produces={-1: outputs})
    call.weight(op.bias, "bias", produces={0: outputs}, scored=False)
    call.size("filters", outputs)
    positions = _spatial(call, call.output_shapes[0], axis)
    taps = math.prod(int(size) for size in depthwise.shape[:-2])
    width = inputs if inputs is not None else int(depthwise.shape[-2])
    call.macs(None if positions is None else positions * taps * multiplier, width)
    call.macs(positions, middle if middle is not None else int(pointwise.shape[-2]), outputs)
    return _output(call, axis, outputs)
