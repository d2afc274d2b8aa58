"""Pooling and reductions: spatial ones let labels pass.

Statistics across channels (mean, largest, deviation) are taken without removed ones, as in layer
normalisation; such groups are marked inexact. Other reductions across channels freeze them: a sum
or a norm grows with their number, a position has no meaning without the others.
"""

from __future__ import annotations

import functools
from collections.abc import Set
from typing import Any

import numpy as np

from tfprune.graph.context import RuleCall
from tfprune.graph.labels import Keep, TensorLabels
from tfprune.graph.rules.registry import layer_rule, op_rule
from tfprune.graph.trace import Call, Ref, map_leaves, symbol_of


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
         "AffineTransform", "PadImages", "CropImages", "PerspectiveTransform", "GaussianBlur",
         "ElasticTransform",
         symbols=("image.resize", "nn.avg_pool2d", "nn.max_pool2d", "nn.avg_pool", "nn.max_pool"),
         )  # fmt: skip
def spatial(call: RuleCall) -> TensorLabels:
    """Acts on the spatial axes only; channels are neither mixed nor counted."""
    axis = call.channel_axis()
    channels = call.channels(axis)
    if channels is not None and call.output_shapes[0][axis] != len(channels):
        call.freeze(channels, f"{type(call.op).__name__} changes the number of channels")
        channels = None
    return tuple(channels if i == axis else None for i in range(len(call.output_shapes[0])))


@layer_rule(
    "GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D",
    "GlobalMaxPooling1D", "GlobalMaxPooling2D", "GlobalMaxPooling3D", "GlobalAvgPool1D",
    "GlobalAvgPool2D", "GlobalAvgPool3D", "GlobalMaxPool1D", "GlobalMaxPool2D", "GlobalMaxPool3D",
)  # fmt: skip
def global_pooling(call: RuleCall) -> TensorLabels:
    """The spatial axes go, or stay with size one."""
    axis = call.channel_axis()
    channels = call.channels(axis)
    if call.op.keepdims:
        return tuple(channels if i == axis else None for i in range(len(call.inputs[0])))
    return (None, channels)


def _reduced_axes(call: RuleCall) -> set[int] | None:
    """The axes that a reduction takes, or ``None`` if they cannot be told."""
    rank = len(call.inputs[0])
    arguments = call.arguments()
    axis: Any = getattr(call.op, "axis", getattr(call.op, "axes", None))
    if axis is None:
        axis = arguments.get("axis", arguments.get("axes"))
    if axis is None:
        return set(range(rank))
    try:
        return {int(a) % rank for a in (axis if isinstance(axis, list | tuple) else [axis])}
    except (TypeError, ValueError):
        return None


_STATISTICS = frozenset(
    ["Mean", "Max", "Min", "Amax", "Amin", "Std", "Var", "reduce_mean", "reduce_max", "reduce_min",
     "reduce_std", "reduce_variance"]
)  # fmt: skip


def _without_removed(
    call: Call, labels: TensorLabels, axes: Set[int], keep: Keep, tensor: Any
) -> Any:
    """The reduction of what is kept along the reduced axes."""
    value = np.asarray(tensor)
    for axis in axes:
        known = labels[axis]
        if known is not None:
            value = np.compress(keep(known), value, axis=axis)

    def fill(leaf: Any) -> Any:
        return value if isinstance(leaf, Ref) else leaf

    return call.op(*map_leaves(fill, call.args), **map_leaves(fill, call.kwargs))


@op_rule(
    "Mean", "Sum", "Max", "Min", "Amax", "Amin", "Prod", "Std", "Var", "Any", "All", "Median",
    "Logsumexp", "CountNonzero", "Argmax", "Argmin", "Nanmean", "Nansum", "Nanmax", "Nanmin",
    "Average", "Norm", "Ptp", "Nanargmax", "Nanargmin", "Nanmedian", "Nanprod", "Nanstd", "Nanvar",
    "Moments",
    symbols=("math.reduce_mean", "reduce_mean", "math.reduce_sum", "reduce_sum", "math.reduce_max",
             "reduce_max", "math.reduce_min", "math.reduce_std", "math.reduce_variance",
             "math.argmax", "argmax", "norm"),
)  # fmt: skip
def reduction(call: RuleCall) -> list[TensorLabels]:
    """Reduced axes freeze, but for those of statistics; the others pass."""
    labels, axes = call.inputs[0], _reduced_axes(call)
    for weights in call.inputs[1:]:
        call.freeze(weights, "weights of an average")
    if axes is None:
        axes = set(range(len(labels)))
    name = str(symbol_of(call.op) or type(call.op).__name__).rpartition(".")[2]
    if name in _STATISTICS and len(call.inputs) == 1:
        masked = functools.partial(_without_removed, call.call, labels, axes)
        for axis in axes:
            call.inexact(labels[axis], f"{name} over the channels", masked)
    else:
        for axis in axes:
            call.freeze(labels[axis], f"{type(call.op).__name__} reduces over the channels")
    rank = len(call.output_shapes[0])
    if rank == len(labels):
        result = tuple(None if i in axes else known for i, known in enumerate(labels))
    elif rank == len(labels) - len(axes):
        result = tuple(known for i, known in enumerate(labels) if i not in axes)
    else:
        # All axes were frozen above: tf.argmax takes the first where no axis is given.
        result = (None,) * rank
    return [result for _ in call.output_shapes]


@layer_rule("Softmax")
@op_rule("Softmax", "LogSoftmax", "Sparsemax", "Cumsum", "Cumprod", "Sort", "Argsort", "Normalize",
         "Nancumsum", "Nancumprod", "Argpartition", "Diff", "Trapezoid", "TopK", "Quantile",
         "Percentile", "Nanquantile", "Nanpercentile", "TakeAlongAxis",
         symbols=("nn.softmax", "nn.log_softmax", "math.cumsum", "sort", "math.l2_normalize",
                  "linalg.l2_normalize", "nn.l2_normalize", "math.top_k"))  # fmt: skip
def along_axis(call: RuleCall) -> list[TensorLabels]:
    """Mixes the values along some axes, which freeze; the others pass where no shape changes."""
    op, labels = call.op, call.inputs[0]
    axis = getattr(op, "axis", None)
    if axis is None:
        axis = call.arguments().get("axis")
    if (axis is None and type(op).__name__ in ("TopK", "Trapezoid")) or _is_softmax(call):
        axis = -1 if axis is None else axis
    axes = range(len(labels)) if axis is None else [a % len(labels) for a in np.atleast_1d(axis)]
    for a in axes:
        call.freeze(labels[a], f"{type(op).__name__} mixes the values of all channels")
    for other in call.inputs[1:]:
        call.freeze(other, f"used by {type(op).__name__}")
    passed = tuple(None if i in axes else known for i, known in enumerate(labels))
    if any(len(shape) != len(labels) for shape in call.output_shapes):
        for known in passed:
            call.freeze(known, f"{type(op).__name__} drops an axis")
        return [(None,) * len(shape) for shape in call.output_shapes]
    return [passed for _ in call.output_shapes]


def _is_softmax(call: RuleCall) -> bool:
    """TensorFlow's softmax takes "no axis" for the last one, where others flatten."""
    return "softmax" in str(getattr(call.op, "symbol", "")) or "Softmax" in type(call.op).__name__
