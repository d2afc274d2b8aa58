"""Normalisations: their parameters follow the channels.

Batch normalisation treats every channel by itself. Layer, RMS, unit and group normalisation take
statistics across channels: without some of them the rest come out differently. Such groups are
marked inexact, and the masked model leaves removed channels out of the statistics.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.graph.context import RuleCall
from tfprune.graph.labels import AxisLabels, Keep, Labels, TensorLabels
from tfprune.graph.rules.convolution import tie_groups
from tfprune.graph.rules.registry import layer_rule

Array = NDArray[np.floating[Any]]


@layer_rule("BatchNormalization", "SyncBatchNormalization", "BatchNormalizationV1",
            "BatchNormalizationV2", "BatchNormalizationBase")  # fmt: skip
def batch_normalization(call: RuleCall) -> TensorLabels:
    """Exact: one scale, offset, mean and variance per channel."""
    op, labels = call.op, call.inputs[0]
    axes = [op.axis] if isinstance(op.axis, int) else list(op.axis)
    if len(axes) > 1:  # tf_keras
        call.freeze(labels, "normalised with statistics per channel and position")
        return tuple(None for _ in labels)
    channels = labels[call.axis(axes[0])]
    for name in ("gamma", "beta", "moving_mean", "moving_variance", "moving_stddev",
                 "renorm_mean", "renorm_stddev"):  # fmt: skip
        call.weight(getattr(op, name, None), name, follows={0: channels}, scored=name == "gamma")
    return labels


def _axes(call: RuleCall) -> list[int]:
    axis = call.op.axis
    return sorted(call.axis(a) for a in ([axis] if isinstance(axis, int) else list(axis)))


def _across(call: RuleCall, parameters: tuple[str, ...], formula: Any, why: str) -> TensorLabels:
    """A normalisation with statistics over whole axes, parameters shaped like those axes."""
    labels, axes = call.inputs[0], _axes(call)
    for name in parameters:
        follows = {i: labels[axis] for i, axis in enumerate(axes) if labels[axis] is not None}
        call.weight(getattr(call.op, name, None), name, follows=follows, scored=False)
    tracked = [axis for axis in axes if labels[axis] is not None]

    def masked(keep: Keep, tensor: Any) -> Array:
        x = np.asarray(tensor, np.float64)
        kept = [np.flatnonzero(keep(_known(labels[a]))) if a in tracked else np.arange(n)
                for a, n in enumerate(x.shape)]  # fmt: skip
        values: list[Array | None] = []
        for name in parameters:
            weight = getattr(call.op, name, None)
            if weight is None:
                values.append(None)
                continue
            full = np.asarray(weight).astype(np.float64)[np.ix_(*[kept[a] for a in axes])]
            values.append(full.reshape([len(kept[a]) if a in axes else 1 for a in range(x.ndim)]))
        result = np.zeros_like(x)
        result[np.ix_(*kept)] = formula(x[np.ix_(*kept)], tuple(axes), *values)
        return result.astype(str(call.op.compute_dtype))

    for axis in tracked:
        call.inexact(labels[axis], why, masked)
    return labels


def _known(labels: AxisLabels) -> Labels:
    if labels is None:
        raise TypeError("Expected labels. Received: None.")
    return labels


@layer_rule("LayerNormalization")
def layer_normalization(call: RuleCall) -> TensorLabels:
    """Mean and variance over the normalised axes."""
    epsilon, rms = call.op.epsilon, getattr(call.op, "rms_scaling", False)

    def formula(x: Array, axes: tuple[int, ...], gamma: Any, beta: Any) -> Array:
        mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        # Keras's rms_scaling divides by the deviation without subtracting the mean.
        y: Array = (x if rms else x - mean) / np.sqrt(variance + epsilon)
        y = y if gamma is None else y * gamma
        return y if beta is None else y + beta

    return _across(call, ("gamma", "beta"), formula, "layer normalisation")


@layer_rule("RMSNormalization")
def rms_normalization(call: RuleCall) -> TensorLabels:
    """Root mean square over the normalised axes."""
    epsilon = call.op.epsilon

    def formula(x: Array, axes: tuple[int, ...], scale: Any) -> Array:
        y: Array = x / np.sqrt((x**2).mean(axes, keepdims=True) + epsilon)
        return y if scale is None else y * scale

    return _across(call, ("scale",), formula, "RMS normalisation")


@layer_rule("UnitNormalization")
def unit_normalization(call: RuleCall) -> TensorLabels:
    """Euclidean norm over the normalised axes."""

    def formula(x: Array, axes: tuple[int, ...]) -> Array:
        y: Array = x / np.sqrt(np.maximum((x**2).sum(axes, keepdims=True), 1e-12))
        return y

    return _across(call, (), formula, "unit normalisation")


@layer_rule("GroupNormalization")
def group_normalization(call: RuleCall) -> TensorLabels:
    """Statistics per group: groups lose the same offsets; a group per channel is exact."""
    op, labels = call.op, call.inputs[0]
    axis = call.axis(op.axis)
    channels = call.channels(axis)
    for name in ("gamma", "beta"):
        call.weight(getattr(op, name, None), name, follows={0: channels}, scored=name == "gamma")
    if channels is None:
        return labels
    groups = int(op.groups)
    if groups == len(channels):
        call.size("groups", channels)
        return labels
    tie_groups(call, channels, groups)
    epsilon = op.epsilon

    def masked(keep: Keep, tensor: Any) -> Array:
        x = np.moveaxis(np.asarray(tensor, np.float64), axis, -1)
        kept = np.flatnonzero(keep(channels))
        y = x[..., kept].reshape(*x.shape[:-1], groups, -1)
        over = (*range(1, y.ndim - 2), y.ndim - 1)
        y = (y - y.mean(over, keepdims=True)) / np.sqrt(y.var(over, keepdims=True) + epsilon)
        y = y.reshape(*x.shape[:-1], -1)
        if op.gamma is not None:
            y = y * np.asarray(op.gamma).astype(np.float64)[kept]
        if op.beta is not None:
            y = y + np.asarray(op.beta).astype(np.float64)[kept]
        result = np.zeros_like(x)
        result[..., kept] = y
        return np.moveaxis(result, -1, axis).astype(str(op.compute_dtype))

    call.inexact(channels, "group normalisation", masked)
    return labels


def _copy_statistics(op: Any, tracked: dict[int, AxisLabels], keep: Keep, new: Any) -> None:
    """The layer computes with arrays that it makes from its weights when it sees fit to."""
    for name in ("mean", "variance"):
        value = np.asarray(getattr(op, name))
        for axis, known in tracked.items():
            value = np.compress(keep(_known(known)), value, axis=axis)
        setattr(new, name, value)


@layer_rule("Normalization")
def normalization(call: RuleCall) -> TensorLabels:
    """Given statistics stand in the configuration, those of data are weights; both follow."""
    op, labels = call.op, call.inputs[0]
    axes = sorted(call.axis(axis) for axis in op.axis)
    if op.input_mean is None:
        follows = {i: labels[axis] for i, axis in enumerate(axes)}
        for name in ("adapt_mean", "adapt_variance"):
            call.weight(getattr(op, name), name, follows=follows, scored=False)
        tracked = {axis: labels[axis] for axis in axes if labels[axis] is not None}
        call.finish(functools.partial(_copy_statistics, op, tracked))
        return labels
    for key, value in (("mean", op.input_mean), ("variance", op.input_variance)):
        shape = np.shape(value)
        cut = {
            axis: labels[axes[axis]]
            for axis in range(-len(shape), 0)
            if labels[axes[axis]] is not None and shape[axis] > 1
        }
        known = {axis: call.attribute(f"{key} {axis}", found) for axis, found in cut.items()}

        def rewrite(
            keep: Keep, key: str = key, value: Any = value, known: Any = known
        ) -> dict[str, Any]:
            array = np.asarray(value)
            for axis, found in known.items():
                array = np.compress(keep(found), array, axis=axis)
            return {key: array.tolist()}

        call.config(key, rewrite)
    return labels
