"""Products of tensors with each other: matrix products, einsum, dot products.

Axes that both tensors keep are united, free axes pass. A contracted axis has no weight whose slices
could be set to zero: its channels stay. The same goes for convolutions with a given kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tfprune.graph.context import RuleCall
from tfprune.graph.labels import AxisLabels, TensorLabels
from tfprune.graph.rules.registry import layer_rule, op_rule
from tfprune.graph.trace import Ref, leaves

# Letters of axes; more than any tensor has.
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def contract(
    call: RuleCall, operands: Sequence[Any], terms: Sequence[str], output: str
) -> TensorLabels:
    """An einsum: one letter per axis of each operand (tensors and constants) and of the output."""
    of: dict[str, AxisLabels] = {}
    sizes: dict[str, int | None] = {}
    untracked: set[str] = set()
    for operand, term in zip(operands, terms, strict=True):
        labels = call.labels_of(operand) if isinstance(operand, Ref) else (None,) * len(term)
        for letter, known, size in zip(term, labels, _shape(operand), strict=True):
            if size == 1 and sizes.get(letter, 1) != 1:
                call.freeze(known, "broadcast over the channels of another tensor")
                continue
            if sizes.get(letter) == 1 and size != 1:
                call.freeze(of.pop(letter, None), "broadcast over the channels of another tensor")
                untracked.discard(letter)
            sizes[letter] = size
            if known is None:
                untracked.add(letter)
            elif of.get(letter) is None:
                of[letter] = known
            else:
                call.unite(of[letter], known)
    for letter, known in of.items():
        if letter not in output:
            call.freeze(known, "contracted in a product of two tensors")
        elif letter in untracked:
            call.freeze(known, "meets a tensor whose channels cannot be removed")
            of[letter] = None
    batch = next((term[0] for op, term in zip(operands, terms, strict=True)
                  if isinstance(op, Ref) and term), "")  # fmt: skip
    counted = [letter for letter in sizes if letter != batch]
    tracked = [of[letter] for letter in counted if of.get(letter) is not None]
    call.macs(call.product([sizes[c] for c in counted if of.get(c) is None]), *tracked)
    return tuple(of.get(letter) for letter in output)


def _shape(operand: Any) -> tuple[int | None, ...]:
    return tuple(None if size is None else int(size) for size in getattr(operand, "shape", ()))


def _opaque(call: RuleCall, reason: str) -> TensorLabels:
    for labels in call.inputs:
        call.freeze(labels, reason)
    return (None,) * len(call.output_shapes[0])


def _pair(call: RuleCall) -> tuple[Any, Any]:
    arguments = call.arguments()
    names = [name for name in arguments if name not in ("name", "self")]
    return arguments[names[0]], arguments[names[1]]


@op_rule("Matmul", symbols=("matmul", "linalg.matmul", "__operators__.matmul",
                            "__operators__.rmatmul"))  # fmt: skip
def matmul(call: RuleCall) -> TensorLabels:
    """``(..., i, k) @ (..., k, j)``; vectors lack ``i`` or ``j``."""
    first, second = _pair(call)
    if "rmatmul" in str(getattr(call.op, "symbol", "")):
        first, second = second, first
    arguments = call.arguments()
    ranks = len(_shape(first)), len(_shape(second))
    batch = _LETTERS[: max(ranks) - 2] if max(ranks) > 2 else ""
    left, right = "IK"[2 - min(2, ranks[0]) :], "KJ"[: min(2, ranks[1])]
    terms = [batch[len(batch) - max(0, rank - 2) :] for rank in ranks]
    output = batch + left[:-1] + right[1:]
    if arguments.get("transpose_a") or arguments.get("adjoint_a"):
        left = left[::-1]
    if arguments.get("transpose_b") or arguments.get("adjoint_b"):
        right = right[::-1]
    return contract(call, [first, second], [terms[0] + left, terms[1] + right], output)


@op_rule("Dot")
def dot(call: RuleCall) -> TensorLabels:
    """The last axis of the first meets the last but one of the second; all others are free."""
    first, second = _pair(call)
    ranks = len(_shape(first)), len(_shape(second))
    if 0 in ranks:
        return _opaque(call, "multiplied with a number of unknown size")
    return _tensordot(call, first, second, [ranks[0] - 1], [max(0, ranks[1] - 2)])


@op_rule("Inner")
def inner(call: RuleCall) -> TensorLabels:
    """The last axes meet."""
    first, second = _pair(call)
    ranks = len(_shape(first)), len(_shape(second))
    if 0 in ranks:
        return _opaque(call, "multiplied with a number of unknown size")
    return _tensordot(call, first, second, [ranks[0] - 1], [ranks[1] - 1])


@op_rule("Tensordot", symbols=("tensordot", "linalg.tensordot"))
def tensordot(call: RuleCall) -> TensorLabels:
    """``axes`` is a number, of last and first axes, or two lists."""
    first, second = _pair(call)
    axes = getattr(call.op, "axes", None)
    axes = call.arguments().get("axes") if axes is None else axes
    if isinstance(axes, int):
        rank = len(_shape(first))
        return _tensordot(call, first, second, range(rank - axes, rank), range(axes))
    if isinstance(axes, list | tuple) and len(axes) == 2:
        pair = [[a] if isinstance(a, int) else list(a) for a in axes]
        return _tensordot(call, first, second, pair[0], pair[1])
    return _opaque(call, "contracted along axes that are computed")


def _tensordot(
    call: RuleCall, first: Any, second: Any, left: Sequence[int], right: Sequence[int]
) -> TensorLabels:
    ranks = len(_shape(first)), len(_shape(second))
    a = list(_LETTERS[: ranks[0]])
    b = list(_LETTERS[ranks[0] : ranks[0] + ranks[1]])
    contracted = set()
    for i, j in zip(left, right, strict=True):
        b[j] = a[i]
        contracted.add(a[i])
    output = [letter for letter in a + b if letter not in contracted]
    return contract(call, [first, second], ["".join(a), "".join(b)], "".join(output))


@op_rule("Einsum", symbols=("einsum", "linalg.einsum"))
def einsum(call: RuleCall) -> TensorLabels:
    """Letter by letter; an ellipsis stands for axes aligned at the last of them."""
    arguments = call.arguments()
    subscripts = getattr(call.op, "subscripts", None) or arguments.get("equation")
    operands = list(arguments.get("operands", arguments.get("inputs", ())))
    if not isinstance(subscripts, str) or not operands:
        return _opaque(call, "an einsum with an equation that is computed")
    text = subscripts.replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    plain = left.replace("...", "").replace(",", "")
    spare = [letter for letter in _LETTERS if letter not in text]
    widths = [len(_shape(o)) - len(t.replace("...", ""))
              for o, t in zip(operands, terms, strict=True)]  # fmt: skip
    fill = "".join(spare[: max(widths)])
    terms = [t.replace("...", fill[len(fill) - w :]) for t, w in zip(terms, widths, strict=True)]
    if not arrow:
        right = "..." + "".join(sorted(c for c in set(plain) if plain.count(c) == 1))
    right = right.replace("...", fill)
    if any(len(set(term)) < len(term) for term in terms):
        return _opaque(call, "an einsum that takes a diagonal")
    return contract(call, operands, terms, right)


@layer_rule("Dot")
def dot_layer(call: RuleCall) -> TensorLabels:
    """A product per example along one axis of each tensor."""
    axes = call.op.axes
    first, second = call.call.inputs if len(call.call.inputs) == 2 else call.call.inputs * 2
    ranks = len(first.shape), len(second.shape)
    pair = (axes, axes) if isinstance(axes, int) else axes
    a = list(_LETTERS[: ranks[0]])
    b = [a[0], *_LETTERS[ranks[0] : ranks[0] + ranks[1] - 1]]
    met = a[pair[0] % ranks[0]]
    b[pair[1] % ranks[1]] = met
    output = "".join(letter for letter in a + b[1:] if letter != met)
    labels = contract(call, [first, second], ["".join(a), "".join(b)], output)
    return (*labels, *(None for _ in range(len(call.output_shapes[0]) - len(labels))))


@op_rule("DotProductAttention")
def dot_product_attention(call: RuleCall) -> TensorLabels:
    """``(batch, steps, heads, width)``: heads are united; Keras wants equal widths, which stay."""
    arguments = call.arguments()
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    if not all(isinstance(tensor, Ref) for tensor in (query, key, value)):
        return _opaque(call, "attention over given arrays")
    used = {query.key, key.key, value.key}
    for ref, labels in zip(call.call.inputs, call.inputs, strict=True):
        if ref.key not in used:
            call.freeze(labels, "used as a mask or bias of attention")
    scores = contract(call, [query, key], ["bthk", "bshk"], "bhts")
    if query.shape[2] != key.shape[2]:
        for tensor in (query, key, value):
            call.freeze(call.labels_of(tensor)[2], "heads that several queries share")
        scores = (None,) * 4
    values = call.labels_of(value)
    call.freeze(values[3], "as wide as queries and keys, which are contracted")
    heads = scores[1]
    if heads is not None or values[2] is not None:
        heads = call.unite(heads, values[2])
    call.macs(
        call.product([query.shape[1], key.shape[1]]),
        query.shape[2] if heads is None else heads,
        value.shape[3],
    )
    return (call.labels_of(query)[0], None, heads, None)


@op_rule("Conv", "ConvTranspose", "DepthwiseConv", "SeparableConv", "Outer", "Kron", "Vdot",
         "Cross", "Correlate", "CDist",
         symbols=("nn.conv2d", "nn.convolution", "nn.conv1d", "nn.depthwise_conv2d",
                  "nn.conv2d_transpose", "nn.separable_conv2d", "linalg.cross"))  # fmt: skip
def given_kernel(call: RuleCall) -> TensorLabels:
    """The kernel is an argument and no weight of a layer."""
    name = type(call.op).__name__
    shapes = [_shape(leaf) for leaf in leaves(call.call.args) if hasattr(leaf, "shape")]
    if "Conv" in name and len(shapes) > 1:
        taps = [math.prod(size or 0 for size in shape) for shape in shapes[1:]]
        axis = call.channel_axis()
        spatial = [n for i, n in enumerate(call.output_shapes[0]) if i not in (0, axis)]
        call.macs(call.product([*spatial, sum(taps)]))
    return _opaque(call, "multiplied with arrays that belong to no layer")
