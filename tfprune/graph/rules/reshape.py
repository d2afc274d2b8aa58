"""Reshape, flatten, permute and their kin: labels move by index arithmetic."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfprune.graph.context import RuleCall
from tfprune.graph.labels import AxisLabels, Keep, TensorLabels
from tfprune.graph.rules.registry import layer_rule, op_rule

Shape = Sequence[int | None]


def blocks(source: Shape, target: Shape) -> list[tuple[range, range]] | None:
    """Splits two shapes of equal size into the smallest runs of axes of equal size.

    Args:
        source, target: sizes without the batch axis; free sizes (``None``) are matched in order.

    Returns:
        Pairs of axis ranges, or ``None`` if the free sizes cannot be matched.
    """
    if sum(s is None for s in source) != sum(s is None for s in target):
        return None
    # A free size can only equal itself: a prime that no real axis has stands for it.
    primes = iter((1_000_003, 1_000_033, 1_000_037, 1_000_039, 1_000_081, 1_000_099))
    known = [1_000_003, 1_000_033, 1_000_037, 1_000_039, 1_000_081, 1_000_099]
    left = [next(primes) if s is None else s for s in source]
    order = iter(known)
    right = [next(order) if s is None else s for s in target]
    if math.prod(left) != math.prod(right):
        return None
    result = []
    i = j = 0
    while i < len(left) or j < len(right):
        start_i, start_j = i, j
        a = b = 1
        while True:
            if i < len(left) and (a <= b or j == len(right)):
                a *= left[i]
                i += 1
            elif j < len(right):
                b *= right[j]
                j += 1
            if a == b and i > start_i and (j > start_j or j == len(right)):
                break
            if i == len(left) and j == len(right):
                break
        # Axes of size one belong to the run before them.
        while i < len(left) and left[i] == 1:
            i += 1
        while j < len(right) and right[j] == 1:
            j += 1
        result.append((range(start_i, i), range(start_j, j)))
    return result


def reshaped(
    call: RuleCall, labels: TensorLabels, source: Shape, target: Shape
) -> list[AxisLabels]:
    """Labels of a reshaped tensor; all arguments without the batch axis."""
    output: list[AxisLabels] = [None] * len(target)
    if all(axis is None for axis in labels):
        return output
    runs = blocks(source, target)
    if runs is None:
        for axis in labels:
            call.freeze(axis, "reshaped with sizes that are not known")
        return output
    for left, right in runs:
        tracked = [a for a in left if labels[a] is not None]
        if not tracked:
            continue
        sizes = [source[a] for a in left]
        out_sizes = [target[a] for a in right]
        if len(left) == len(right) and sizes == out_sizes:
            for a, b in zip(left, right, strict=True):
                output[b] = labels[a]
            continue
        if any(size is None for size in [*sizes, *out_sizes]):
            for a in tracked:
                call.freeze(labels[a], "merged with an axis of free size")
            continue
        for a in tracked[:-1]:
            # One flat position would have two owners.
            call.freeze(labels[a], "merged with another axis that has channels")
        found = _run(call, labels, tracked[-1], left, sizes, out_sizes)
        output[right.start : right.stop] = found
    return output


def _run(
    call: RuleCall,
    labels: TensorLabels,
    axis: int,
    left: range,
    sizes: list[Any],
    out_sizes: list[Any],
) -> list[AxisLabels]:
    """Labels of one run of merged or split axes, of which ``axis`` is the tracked one."""
    known = labels[axis]
    if known is None:
        raise TypeError("Expected labels. Received: None.")
    shape = [len(known) if a == axis else 1 for a in left]
    flat = np.broadcast_to(known.reshape(shape), sizes).ravel()
    result: list[AxisLabels] = [None] * len(out_sizes)
    wide = [i for i, size in enumerate(out_sizes) if size != 1] or [len(out_sizes) - 1]
    if len(wide) == 1:
        result[wide[0]] = flat
        return result
    grid = flat.reshape(out_sizes)
    for i in wide:
        first = np.moveaxis(grid, i, -1).reshape(-1, out_sizes[i])
        if (first == first[0]).all():
            result[i] = first[0]
            return result
    # No axis owns the labels alone: the last one does if positions along the others are tied.
    last = wide[-1]
    rows = np.moveaxis(grid, last, -1).reshape(-1, out_sizes[last])
    for row in rows[1:]:
        call.unite(rows[0], row)
    result[last] = rows[0].copy()
    return result


def new_sizes(keep: Keep, sizes: Sequence[Any], labels: Sequence[AxisLabels]) -> tuple[Any, ...]:
    """Sizes with those of labelled axes replaced by kept counts; free ones (-1, None) stay."""
    return tuple(
        size if known is None or size is None or int(size) < 0 else int(keep(known).sum())
        for size, known in zip(sizes, labels, strict=True)
    )


@layer_rule("Reshape")
@op_rule("Reshape", symbols=("reshape",))
def reshape(call: RuleCall) -> TensorLabels:
    """Target sizes that count channels are rewritten."""
    source, target = call.input_shapes[0][1:], call.output_shapes[0][1:]
    if call.inputs[0][0] is not None:
        call.freeze(call.inputs[0][0], "channels on the batch axis")
    output = reshaped(call, call.inputs[0][1:], source, target)
    output = [
        None if axis is None else call.attribute(f"target {i}", axis)
        for i, axis in enumerate(output)
    ]
    for key in ("target_shape", "newshape"):
        sizes = getattr(call.op, key, None)
        if sizes is None:
            continue
        given = list(sizes)
        labels = list(output) if len(given) == len(output) else [None, *output]
        call.config(
            key, lambda keep, key=key, given=given, labels=labels: {  # type: ignore[misc]
                key: new_sizes(keep, given, labels)
            }
        )  # fmt: skip
        break
    else:
        _rewrite_tf_shape(call, [None, *output])
    return (None, *output)


def _rewrite_tf_shape(call: RuleCall, labels: list[AxisLabels]) -> None:
    """``tf.reshape``: the shape is an argument."""
    shape = call.arguments().get("shape")
    if not isinstance(shape, list | tuple) or not all(isinstance(s, int | None) for s in shape):
        for axis in labels:
            call.freeze(axis, "reshaped to a shape that is computed")
        return

    call.argument("shape", lambda keep: new_sizes(keep, shape, labels))


@op_rule("Rearrange")
def rearrange(call: RuleCall) -> TensorLabels:
    """An einops pattern: axes are split into atoms, which change places and are merged."""
    arguments = call.arguments()
    lengths = dict(arguments.get("axes_lengths", {}))
    left, right = (
        [token.strip("()").split() for token in re.findall(r"\w+|\(.*?\)", side)]
        for side in str(arguments["pattern"]).split("->")
    )
    if len(left[0]) != 1 or left[0] != right[0]:
        call.freeze(call.inputs[0], "rearranged together with the batch axis")
        return (None,) * len(call.output_shapes[0])
    sizes: dict[str, int | None] = {name: int(size) for name, size in lengths.items()}
    for group, size in zip(left, call.input_shapes[0], strict=True):
        known = call.product([sizes[atom] for atom in group if atom in sizes]) or 1
        for atom in group:
            sizes.setdefault(atom, None if size is None else size // known)
    atoms = [atom for group in left[1:] for atom in group]
    found = reshaped(
        call, call.inputs[0][1:], call.input_shapes[0][1:], [sizes[atom] for atom in atoms]
    )
    of = {
        atom: call.attribute(f"atom {atom}", labels)
        for atom, labels in zip(atoms, found, strict=True)
    }

    def rewrite(keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {
            name: value if of.get(name) is None else int(keep(of[name]).sum())  # type: ignore[arg-type]
            for name, value in kwargs.items()
        }

    call.call_arguments(rewrite)
    atoms = [atom for group in right[1:] for atom in group]
    output = reshaped(
        call, tuple(of[atom] for atom in atoms), [sizes[atom] for atom in atoms],
        call.output_shapes[0][1:],
    )  # fmt: skip
    return (None, *output)


@layer_rule("Flatten")
@op_rule("Ravel")
def flatten(call: RuleCall) -> TensorLabels:
    """All axes but the batch become one; a channel owns many positions of it."""
    labels, shape = call.inputs[0], call.input_shapes[0]
    if getattr(call.op, "data_format", None) == "channels_first" and len(shape) > 2:
        # Keras transposes to channels last before it flattens.
        labels = (labels[0], *labels[2:], labels[1])
        shape = (shape[0], *shape[2:], shape[1])
    return (None, *reshaped(call, labels[1:], shape[1:], call.output_shapes[0][1:]))


@layer_rule("Permute")
@op_rule("Transpose", "Moveaxis", "Swapaxes", symbols=("transpose",))
def permute(call: RuleCall) -> TensorLabels:
    """Axes change places, labels with them."""
    labels, rank, op = call.inputs[0], len(call.inputs[0]), call.op
    name = type(op).__name__
    order = list(range(rank))
    if name == "Permute":
        order = [0, *op.dims]
    elif name == "Moveaxis":
        sources = [a % rank for a in np.atleast_1d(op.source).tolist()]
        targets = [a % rank for a in np.atleast_1d(op.destination).tolist()]
        order = [a for a in order if a not in sources]
        for target, source in sorted(zip(targets, sources, strict=True)):
            order.insert(target, source)
    elif name == "Swapaxes":
        order[op.axis1 % rank], order[op.axis2 % rank] = op.axis2 % rank, op.axis1 % rank
    else:
        axes = getattr(op, "axes", None)
        if axes is None:
            axes = call.arguments().get("perm")
        order = order[::-1] if axes is None else [a % rank for a in axes]
    return tuple(labels[a] for a in order)


@op_rule("ExpandDims", symbols=("expand_dims",))
def expand_dims(call: RuleCall) -> TensorLabels:
    """New axes have no labels."""
    axis: Any = getattr(call.op, "axis", None)
    axis = call.arguments().get("axis") if axis is None else axis
    rank = len(call.output_shapes[0])
    new = {int(a) % rank for a in np.atleast_1d(axis)}
    rest = iter(call.inputs[0])
    return tuple(None if i in new else next(rest) for i in range(rank))


@op_rule("Squeeze", symbols=("squeeze",))
def squeeze(call: RuleCall) -> TensorLabels:
    """An axis of size one that had a label must keep its channel."""
    labels, shape = call.inputs[0], call.input_shapes[0]
    axis = getattr(call.op, "axis", None)
    axis = call.arguments().get("axis") if axis is None else axis
    if axis is None:
        gone = {i for i, size in enumerate(shape) if size == 1}
    else:
        gone = {a % len(shape) for a in (axis if isinstance(axis, list | tuple) else [axis])}
    for i in gone:
        call.freeze(labels[i], "squeezed away")
    return tuple(known for i, known in enumerate(labels) if i not in gone)


@layer_rule("RepeatVector")
def repeat_vector(call: RuleCall) -> TensorLabels:
    """A vector per time step: ``(batch, channels)`` to ``(batch, steps, channels)``."""
    return (None, None, call.inputs[0][-1])


@op_rule("Repeat", symbols=("repeat",))
def repeat(call: RuleCall) -> TensorLabels:
    """Repeated channels carry their label several times."""
    labels = list(call.inputs[0])
    arguments = call.arguments()
    axis = getattr(call.op, "axis", arguments.get("axis"))
    repeats = getattr(call.op, "repeats", arguments.get("repeats"))
    if axis is None:
        call.freeze(call.inputs[0], "repeated after flattening")
        return tuple(None for _ in call.output_shapes[0])
    known = labels[axis]
    if known is not None:
        if not isinstance(repeats, int):
            call.freeze(known, "repeated a different number of times each")
            labels[axis] = None
        else:
            labels[axis] = np.repeat(known, repeats)
    return tuple(labels)


@op_rule("Tile", symbols=("tile",))
def tile(call: RuleCall) -> TensorLabels:
    """Tiled axes carry their labels several times."""
    arguments = call.arguments()
    repeats = getattr(call.op, "repeats", None)
    repeats = arguments.get("multiples") if repeats is None else repeats
    rank = len(call.output_shapes[0])
    if (
        not isinstance(repeats, list | tuple)
        or len(repeats) != len(call.inputs[0])
        or not all(isinstance(r, int) for r in repeats)
    ):
        call.freeze(call.inputs[0], "tiled in a way that cannot be followed")
        return (None,) * rank
    return tuple(
        None if known is None else np.tile(known, times)
        for known, times in zip(call.inputs[0], repeats, strict=True)
    )


@op_rule("Flip", "Fliplr", "Flipud", symbols=("reverse",))
def flip(call: RuleCall) -> TensorLabels:
    """Reversed axes carry their labels in reverse."""
    labels = list(call.inputs[0])
    axis = {"Fliplr": 1, "Flipud": 0}.get(type(call.op).__name__, getattr(call.op, "axis", None))
    axis = call.arguments().get("axis") if axis is None else axis
    axes = range(len(labels)) if axis is None else np.atleast_1d(axis).tolist()
    for a in axes:
        known = labels[a]
        if known is not None:
            labels[a] = known[::-1]
    return tuple(labels)


@op_rule("Roll", symbols=("roll",))
def roll(call: RuleCall) -> TensorLabels:
    """Rolling along the channels freezes them: the distance would change."""
    labels = call.inputs[0]
    axis = getattr(call.op, "axis", None)
    axis = call.arguments().get("axis") if axis is None else axis
    axes = range(len(labels)) if axis is None else [a % len(labels) for a in np.atleast_1d(axis)]
    for a in axes:
        call.freeze(labels[a], "rolled along the channels")
    return tuple(None if i in axes else known for i, known in enumerate(labels))


@op_rule("BroadcastTo", symbols=("broadcast_to",))
def broadcast_to(call: RuleCall) -> TensorLabels:
    """Sizes that count channels are rewritten; broadcast axes have no labels."""
    labels, shape = call.inputs[0], call.output_shapes[0]
    output: list[AxisLabels] = [None] * len(shape)
    for axis in range(-len(labels), 0):
        known = labels[axis]
        if known is not None and shape[axis] == len(known):
            output[axis] = known
        else:
            call.freeze(known, "broadcast to another size")
    sizes = getattr(call.op, "shape", None)
    if sizes is None:
        _rewrite_tf_shape(call, output)
    else:
        call.config("shape", lambda keep: {"shape": new_sizes(keep, list(sizes), output)})
    return tuple(output)


@op_rule("DepthToSpace", symbols=("nn.depth_to_space",))
def depth_to_space(call: RuleCall) -> TensorLabels:
    """Output channel ``c`` is made of the input channels at offset ``c`` of every sub-pixel."""
    axis = call.channel_axis()
    known = call.inputs[0][axis]
    width = call.output_shapes[0][axis]
    if known is None or width is None:
        return tuple(None for _ in call.output_shapes[0])
    rows = known.reshape(-1, width)
    for row in rows[1:]:
        call.unite(rows[0], row)
    return tuple(rows[0] if i == axis else None for i in range(len(call.inputs[0])))


@op_rule("SpaceToDepth", symbols=("nn.space_to_depth",))
def space_to_depth(call: RuleCall) -> TensorLabels:
    """A channel appears once per sub-pixel."""
    axis = call.channel_axis()
    known = call.inputs[0][axis]
    width = call.output_shapes[0][axis]
    if known is None or width is None:
        return tuple(None for _ in call.output_shapes[0])
    tiled = np.tile(known, width // len(known))
    return tuple(tiled if i == axis else None for i in range(len(call.inputs[0])))
