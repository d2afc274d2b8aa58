"""Concatenation, splitting, slicing, padding, gathering and stacking."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import numpy as np

from tfprune.graph.context import RuleCall, constant_array
from tfprune.graph.labels import AxisLabels, Keep, Labels, TensorLabels, concatenate
from tfprune.graph.rules.registry import layer_rule, op_rule


def _axis(call: RuleCall, default: int = -1) -> int:
    axis = getattr(call.op, "axis", None)
    if axis is None:
        axis = call.arguments().get("axis", default)
    return int(default if axis is None else axis)


@layer_rule("Concatenate")
@op_rule("Concatenate", "Hstack", "Append", symbols=("concat",))
def concat(call: RuleCall) -> TensorLabels:
    """Label arrays are concatenated; along the other axes the inputs' labels are united."""
    rank = len(call.output_shapes[0])
    if any(len(shape) != rank for shape in call.input_shapes):
        for labels in call.inputs:
            call.freeze(labels, "flattened before it is joined")
        return (None,) * rank
    axis = (1 if rank > 1 else 0) if type(call.op).__name__ == "Hstack" else _axis(call) % rank
    output: list[AxisLabels] = []
    for a in range(rank):
        parts = [labels[a] for labels in call.inputs]
        if a == axis:
            sizes = [shape[a] for shape in call.input_shapes]
            if any(size is None for size in sizes):
                for part in parts:
                    call.freeze(part, "concatenated along an axis of free size")
                output.append(None)
            else:
                output.append(concatenate(parts, [int(s) for s in sizes if s is not None]))
        else:
            merged = parts[0]
            for part in parts[1:]:
                if merged is not None or part is not None:
                    merged = call.unite(merged, part)
            output.append(merged)
    return tuple(output)


@op_rule("Stack", symbols=("stack",))
def stack(call: RuleCall) -> TensorLabels:
    """A new axis without labels; the inputs' labels are united."""
    rank = len(call.output_shapes[0])
    axis = _axis(call, 0) % rank
    merged = list(call.inputs[0])
    for labels in call.inputs[1:]:
        for a, known in enumerate(labels):
            if merged[a] is not None or known is not None:
                merged[a] = call.unite(merged[a], known)
    merged.insert(axis, None)
    return tuple(merged)


@op_rule("Glu")
def gated(call: RuleCall) -> TensorLabels:
    """The first half times a function of the second: a channel owns a position in either."""
    labels = list(call.inputs[0])
    axis = int(call.op.axis) % len(labels)
    known = labels[axis]
    if known is not None:
        first, second = np.split(known, 2)
        call.unite(first, second)
        labels[axis] = first
    return tuple(labels)


@op_rule("Unstack", symbols=("unstack",))
def unstack(call: RuleCall) -> list[TensorLabels]:
    """The axis that is taken apart keeps its size."""
    labels = call.inputs[0]
    axis = _axis(call, 0) % len(labels)
    call.freeze(labels[axis], "unstacked along the channels")
    rest = tuple(known for i, known in enumerate(labels) if i != axis)
    return [rest for _ in call.output_shapes]


@op_rule("Split", "ArraySplit", "Hsplit", "Dsplit", symbols=("split",))
def split(call: RuleCall) -> list[TensorLabels]:
    """Label arrays are cut where the tensor is; the cuts move with the kept channels."""
    labels = call.inputs[0]
    axis = {"Hsplit": 1, "Dsplit": 2}.get(type(call.op).__name__, _axis(call, 0)) % len(labels)
    sizes = [shape[axis] for shape in call.output_shapes]
    known = labels[axis]
    if known is None or any(size is None for size in sizes):
        call.freeze(known, "split along an axis of free size")
        return [tuple(None if i == axis else k for i, k in enumerate(labels)) for _ in sizes]
    known = call.attribute("split", known)
    if known is None:
        return [labels for _ in sizes]
    channels: Labels = known
    cuts = np.cumsum([0, *[int(size) for size in sizes if size is not None]])
    parts = [channels[a:b] for a, b in pairwise(cuts.tolist())]
    if type(call.op).__name__ == "ArraySplit":
        # It knows equal parts only.
        split_class = vars(sys.modules[type(call.op).__module__])["Split"]

        def build(keep: Keep, _: Any) -> Any:
            counts = np.cumsum([int(keep(part).sum()) for part in parts])
            return split_class(counts[:-1].tolist(), axis=axis, name=call.op.name)

        call.build(build)
    elif hasattr(call.op, "indices_or_sections"):

        def config(keep: Keep) -> dict[str, Any]:
            counts = np.cumsum([int(keep(part).sum()) for part in parts])
            return {"indices_or_sections": [int(c) for c in counts[:-1]]}

        call.config("indices_or_sections", config)
    else:
        call.argument("num_or_size_splits", lambda keep: [int(keep(part).sum()) for part in parts])
    return [tuple(part if i == axis else k for i, k in enumerate(labels)) for part in parts]


def _slice_of(item: Any) -> Any:
    """tf_keras records a slice as a dict."""
    if isinstance(item, dict) and set(item) == {"start", "stop", "step"}:
        return slice(item["start"], item["stop"], item["step"])
    return item


@op_rule("GetItem", symbols=("__operators__.getitem",))
def get_item(call: RuleCall) -> TensorLabels:
    """Basic indexing: slices cut labels, integers pick one, ``None`` adds an axis."""
    labels, shape = call.inputs[0], call.input_shapes[0]
    rank_out = len(call.output_shapes[0])
    key = call.call.args[1] if len(call.call.args) > 1 else call.call.kwargs.get("key")
    items = [_slice_of(item) for item in (key if isinstance(key, list | tuple) else [key])]
    plain = all(
        item is None or item is Ellipsis or isinstance(item, slice)
        or (isinstance(item, int | np.integer) and not isinstance(item, bool))
        for item in items
    )  # fmt: skip
    if not plain:
        call.freeze(labels, "indexed with a tensor or a mask")
        return (None,) * rank_out
    taken = sum(item is not None and item is not Ellipsis for item in items)
    fill: list[Any] = [slice(None)] * (len(labels) - taken)
    at = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    full = [*items[:at], *fill, *items[at + 1 :]]
    output: list[AxisLabels] = []
    edits: dict[int, tuple[AxisLabels, Any]] = {}
    axis = 0
    for position, item in enumerate(full):
        if item is None:
            output.append(None)
            continue
        known = labels[axis]
        if known is None or item == slice(None):
            if isinstance(item, slice):
                output.append(known)
        elif isinstance(item, slice):
            start, stop, step = item.indices(int(shape[axis] or 0))
            if step == 1:
                output.append(known[start:stop])
                edits[position] = (call.attribute(f"axis {axis}", known), slice(start, stop))
            else:
                call.freeze(known, "sliced along the channels with a step")
                output.append(None)
        else:
            index = int(item) % len(known)
            call.freeze(known[index : index + 1], "picked by its index")
            edits[position] = (call.attribute(f"axis {axis}", known), index)
        axis += 1
    if edits:
        _rewrite_key(call, full, edits)
    return tuple(output)


def _rewrite_key(call: RuleCall, full: list[Any], edits: dict[int, tuple[AxisLabels, Any]]) -> None:
    dicts = type(call.op).__name__ == "SlicingOpLambda"

    def rewrite(keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = list(full)
        for position, (known, item) in edits.items():
            if known is None:
                continue
            before = np.concatenate([[0], np.cumsum(keep(known))])
            if isinstance(item, slice):
                key[position] = slice(int(before[item.start]), int(before[item.stop]))
            else:
                key[position] = int(before[item])
        if dicts:
            key = [
                {"start": k.start, "stop": k.stop, "step": k.step} if isinstance(k, slice) else k
                for k in key
            ]
        return (args[0], tuple(key)), {k: v for k, v in kwargs.items() if k != "key"}

    call.call_arguments(rewrite)


@op_rule("Pad", symbols=("pad",))
def pad(call: RuleCall) -> TensorLabels:
    """Constant padding along the channels makes new channels, which can go like any other."""
    labels = call.inputs[0]
    arguments = call.arguments()
    widths = getattr(call.op, "pad_width", None)
    widths = arguments.get("paddings") if widths is None else widths
    array = _pairs(widths, len(labels))
    mode = str(getattr(call.op, "mode", arguments.get("mode", "constant"))).lower()
    if array is None:
        call.freeze(labels, "padded by amounts that cannot be followed")
        return tuple(None for _ in labels)
    output: list[AxisLabels] = []
    parts: dict[int, tuple[Labels, Labels]] = {}
    for axis, known in enumerate(labels):
        before, after = (int(amount) for amount in array[axis])
        if known is None or not before + after:
            output.append(known)
        elif mode != "constant":
            call.freeze(known, f"padded along the channels in {mode} mode")
            output.append(None)
        else:
            parts[axis] = (call.fresh(before), call.fresh(after))
            full = np.concatenate([parts[axis][0], known, parts[axis][1]])
            output.append(call.attribute(f"pad {axis}", full))
            parts[axis] = (full[:before], full[len(full) - after :])
    if parts:

        def amounts(keep: Keep) -> list[list[int]]:
            result = [[int(a), int(b)] for a, b in array]
            for axis, (front, back) in parts.items():
                result[axis] = [int(keep(front).sum()), int(keep(back).sum())]
            return result

        if hasattr(call.op, "pad_width"):
            call.config("pad_width", lambda keep: {"pad_width": amounts(keep)})
        else:
            call.argument("paddings", amounts)
    return tuple(output)


def _pairs(widths: Any, rank: int) -> Any:
    """Padding before and after every axis, int array of shape ``(rank, 2)``; ``None``: unknown."""
    try:
        array = np.asarray(widths, dtype=np.int64)
    except (TypeError, ValueError):
        return None
    return np.broadcast_to(array, (rank, 2)) if array.ndim in (0, 2) else None


@op_rule("Take", symbols=("gather",))
def take(call: RuleCall) -> TensorLabels:
    """Constant indices along the channels pick labels, and are renumbered with them."""
    labels = call.inputs[0]
    arguments = call.arguments()
    indices = arguments.get("indices")
    array = (
        constant_array(np.asarray(indices))
        if isinstance(indices, list | tuple)
        else (constant_array(indices))
    )
    axis = getattr(call.op, "axis", arguments.get("axis"))
    if array is None or array.ndim != 1 or axis is None:
        call.freeze(labels, "gathered with indices that cannot be followed")
        return (None,) * len(call.output_shapes[0])
    axis = int(axis) % len(labels)
    known = labels[axis]
    if known is None:
        return labels
    chosen = array.astype(np.int64) % len(known)
    source = call.attribute("take", known)
    if source is None:
        return tuple(None for _ in labels)
    picked: Labels = source[chosen]

    def renumbered(keep: Keep) -> Any:
        position = np.cumsum(keep(source)) - 1
        return position[chosen[keep(picked)]].astype(array.dtype)

    call.argument("indices", renumbered)
    return tuple(picked if i == axis else k for i, k in enumerate(labels))
