"""Pooling and reductions: spatial ones let labels pass, those over channels freeze them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tfprune.graph.context import RuleCall
from tfprune.graph.labels import AxisLabels, TensorLabels
from tfprune.graph.rules.registry import layer_rule, op_rule


def match_shapes(call: RuleCall, labels: TensorLabels, shape: Sequence[int | None]) -> TensorLabels:
    """Labels for an output of the same rank whose channel sizes are unchanged."""
    output: list[AxisLabels] = []
    for axis, size in zip(labels, shape, strict=True):
        if axis is not None and size != len(axis):
            call.freeze(axis, f"{type(call.op).__name__} changes the size of the channel axis")
            axis = None
        output.append(axis)
    return tuple(output)


@layer_rule(
    "MaxPooling1D", "MaxPooling2D", "MaxPooling3D", "AveragePooling1D", "AveragePooling2D",
    "AveragePooling3D", "MaxPool1D", "MaxPool2D", "MaxPool3D", "AvgPool1D", "AvgPool2D",
    "AvgPool3D", "AdaptiveAveragePooling1D", "AdaptiveAveragePooling2D",
    "AdaptiveAveragePooling3D", "AdaptiveMaxPooling1D", "AdaptiveMaxPooling2D",
    "AdaptiveMaxPooling3D", "UpSampling1D", "UpSampling2D", "UpSampling3D", "ZeroPadding1D",
    "ZeroPadding2D", "ZeroPadding3D", "Cropping1D", "Cropping2D", "Cropping3D", "Resizing",
    "CenterCrop", "RandomCrop",
)  # fmt: skip
@op_rule("MaxPool", "AveragePool", "AdaptiveMaxPool", "AdaptiveAveragePool", "Resize",
         symbols=("image.resize", "nn.avg_pool2d", "nn.max_pool2d", "nn.avg_pool", "nn.max_pool"),
         )  # fmt: skip
def spatial(call: RuleCall) -> TensorLabels:
    """Acts on the spatial axes only."""
    return match_shapes(call, call.inputs[0], call.output_shapes[0])


@layer_rule(
    "GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D",
    "GlobalMaxPooling1D", "GlobalMaxPooling2D", "GlobalMaxPooling3D", "GlobalAvgPool1D",
    "GlobalAvgPool2D", "GlobalAvgPool3D", "GlobalMaxPool1D", "GlobalMaxPool2D", "GlobalMaxPool3D",
)  # fmt: skip
def global_pooling(call: RuleCall) -> TensorLabels:
    """The spatial axes go, or stay with size one."""
    labels, axis = call.inputs[0], call.channel_axis()
    for i, other in enumerate(labels):
        if i != axis:
            call.freeze(other, "pooled over")
    if call.op.keepdims:
        return tuple(known if i == axis else None for i, known in enumerate(labels))
    return (None, labels[axis])


def _reduced_axes(call: RuleCall) -> set[int] | None:
    """The axes that a reduction takes, or ``None`` if they cannot be told."""
    rank = len(call.inputs[0])
    arguments = call.arguments()
    axis: Any = getattr(call.op, "axis", None)
    if axis is None:
        axis = arguments.get("axis")
    if axis is None:
        return set(range(rank))
    try:
        return {int(a) % rank for a in (axis if isinstance(axis, list | tuple) else [axis])}
    except TypeError:
        return None


@op_rule(
    "Mean", "Sum", "Max", "Min", "Amax", "Amin", "Prod", "Std", "Var", "Any", "All", "Median",
    "Logsumexp", "CountNonzero", "Argmax", "Argmin", "Nanmean", "Nansum", "Nanmax", "Nanmin",
    "Average", "Norm", "Ptp",
    symbols=("math.reduce_mean", "reduce_mean", "math.reduce_sum", "reduce_sum", "math.reduce_max",
             "reduce_max", "math.reduce_min", "math.reduce_std", "math.reduce_variance",
             "math.argmax", "argmax", "norm"),
)  # fmt: skip
def reduction(call: RuleCall) -> TensorLabels:
    """Reduced axes freeze; the others pass."""
    labels, axes = call.inputs[0], _reduced_axes(call)
    if axes is None:
        axes = set(range(len(labels)))
    for axis in axes:
        call.freeze(labels[axis], f"{type(call.op).__name__} reduces over the channels")
    if len(call.output_shapes[0]) == len(labels):
        return tuple(None if i in axes else known for i, known in enumerate(labels))
    return tuple(known for i, known in enumerate(labels) if i not in axes)


@layer_rule("Softmax")
@op_rule("Softmax", "LogSoftmax", "Sparsemax", "Cumsum", "Cumprod", "Sort", "Argsort", "Normalize",
         symbols=("nn.softmax", "nn.log_softmax", "math.cumsum", "sort", "math.l2_normalize",
                  "linalg.l2_normalize", "nn.l2_normalize"))  # fmt: skip
def along_axis(call: RuleCall) -> TensorLabels:
    """Mixes the values along some axes, which freeze."""
    labels = call.inputs[0]
    axis = getattr(call.op, "axis", None)
    if axis is None:
        axis = call.arguments().get("axis", -1)
    axes = {a % len(labels) for a in (axis if isinstance(axis, list | tuple) else [-1 if axis is
            None else axis])}  # fmt: skip
    for a in axes:
        call.freeze(labels[a], f"{type(call.op).__name__} mixes the values of all channels")
    return tuple(None if i in axes else known for i, known in enumerate(labels))
