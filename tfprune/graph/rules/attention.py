"""Attention: heads and widths are axes of the projections' kernels.

A score is a dot product of a query and a key: no kernel reads their shared width, so the masked
model zeroes the query's slices. The layer divides scores by the square root of that width, which
pruning changes: the query's projection makes up for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.graph.context import RuleCall, refs_in
from tfprune.graph.labels import AxisLabels, Keep, Labels, TensorLabels
from tfprune.graph.rules.dense import plain
from tfprune.graph.rules.registry import layer_rule
from tfprune.graph.trace import Ref, attention_parts


@dataclass(frozen=True)
class _Operand:
    """Query, key or value: labels and shape, ``(batch, ..., width)``."""

    labels: TensorLabels
    shape: tuple[int | None, ...]

    @property
    def width(self) -> AxisLabels | int | None:
        """What a projection reads: labels, or a size where they are not tracked."""
        return self.shape[-1] if self.labels[-1] is None else self.labels[-1]


def _operands(call: RuleCall) -> tuple[_Operand, _Operand, _Operand]:
    """Query, value and key (the value, if none is given); masks may not carry channels."""
    arguments = call.arguments()
    query, value = arguments["query"], arguments["value"]
    key = arguments.get("key")
    refs: list[Ref] = [query, value, value if key is None else key]
    used = {ref.key for ref in refs}
    for ref, labels in zip(call.call.inputs, call.inputs, strict=True):
        if ref.key not in used:
            call.freeze(labels, "used as an attention mask")
        # Widths of projections are pruned; steps are not.
        elif any(axis is not None for axis in labels[:-1]):
            call.freeze(labels[:-1], "an axis of attended positions")
    first, second, third = (_Operand(call.labels_of(ref), ref.shape) for ref in refs)
    return first, second, third


def _query_scale(width: Labels) -> Callable[[Keep], float]:
    """Makes up for the layer's division by the square root of the query's width."""

    def scale(keep: Keep) -> float:
        return math.sqrt(int(keep(width).sum()) / len(width))

    return scale


def _project(
    call: RuleCall,
    layer: Any,
    name: str,
    operand: _Operand,
    heads: AxisLabels,
    width: Labels,
    is_query: bool = False,
) -> None:
    """A projection into heads: kernel ``(inputs, heads, width)``, bias ``(heads, width)``."""
    scale = _query_scale(width) if is_query else None
    call.weight(
        plain(call, "kernel", layer), f"{name}/kernel", consumes={0: operand.labels[-1]},
        produces={1: heads, 2: width}, masked=[2] if is_query else [], scale=scale,
    )  # fmt: skip
    call.weight(
        layer.bias, f"{name}/bias", produces={0: heads, 1: width}, scored=False,
        masked=[1] if is_query else [], scale=scale,
    )  # fmt: skip


def _merge_heads(
    call: RuleCall, layer: Any, heads: Labels, width: Labels, outputs: Sequence[Labels]
) -> None:
    """The last projection: kernel ``(heads, width, *outputs)``, bias ``(*outputs)``."""
    call.weight(
        plain(call, "kernel", layer), "attention_output/kernel", consumes={0: heads, 1: width},
        produces={2 + i: labels for i, labels in enumerate(outputs)},
    )  # fmt: skip
    call.weight(
        layer.bias, "attention_output/bias", produces=dict(enumerate(outputs)), scored=False
    )


def _count(
    call: RuleCall,
    operands: tuple[_Operand, _Operand, _Operand],
    attended: Sequence[int],
    heads: Labels,
    shared: AxisLabels | int,
    widths: tuple[Labels, Labels],
    outputs: Sequence[Labels],
    gate: bool,
) -> None:
    """MACs of the projections and of both products.

    Args:
        call: the layer's call.
        operands: query, value and key.
        attended: the axes over which they attend.
        heads: those of queries.
        shared: those of keys and values, fewer where several queries share one.
        widths: of keys and of values, per head.
        outputs: axes of the output behind the steps.
        gate: whether queries have a second projection.
    """
    query, value, key = operands
    key_width, value_width = widths
    targets, sources = (call.product(o.shape[1:-1]) for o in (query, key))
    call.macs(targets, query.width, heads, key_width)
    call.macs(sources, key.width, shared, key_width)
    call.macs(sources, value.width, shared, value_width)
    if gate:
        call.macs(targets, query.width, heads, value_width)
    pairs = call.product([targets, *(key.shape[axis] for axis in attended)])
    call.macs(pairs, heads, key_width)
    call.macs(pairs, heads, value_width)
    call.macs(targets, heads, value_width, *outputs)


@layer_rule("MultiHeadAttention")
def multi_head_attention(call: RuleCall) -> list[TensorLabels]:
    """Heads, key width, value width and outputs can go, each by itself."""
    parts = attention_parts(call.op)
    operands = query, value, key = _operands(call)
    kernel, output_kernel = parts.query.kernel, parts.output.kernel
    heads = call.fresh(int(kernel.shape[1]), "heads")
    key_width = call.fresh(int(kernel.shape[2]), "key width")
    value_width = call.fresh(int(output_kernel.shape[1]), "value width")
    outputs = [call.fresh(int(size), "output") for size in output_kernel.shape[2:]]
    gate = parts.gate
    _project(call, parts.query, "query", query, heads, key_width, is_query=True)
    _project(call, parts.key, "key", key, heads, key_width)
    _project(call, parts.value, "value", value, heads, value_width)
    if gate is not None:
        _project(call, gate, "gate", query, heads, value_width)
    _merge_heads(call, parts.output, heads, value_width, outputs)
    call.size("num_heads", heads)
    call.size("key_dim", key_width)
    call.size("value_dim", value_width)
    _output_shape(call, outputs)
    _signature(call, {"query_shape": query, "value_shape": value, "key_shape": key})
    _count(call, operands, list(parts.axes), heads, heads, (key_width, value_width),
           outputs, gate is not None)  # fmt: skip
    return _with_scores(call, (*query.labels[:-1], *outputs), heads)


def _with_scores(call: RuleCall, output: TensorLabels, heads: AxisLabels) -> list[TensorLabels]:
    """The output, and if they are asked for the scores: ``(batch, heads, ...)``."""
    scores = call.output_shapes[1:]
    return [output, *(tuple(heads if a == 1 else None for a in range(len(s))) for s in scores)]


def _output_shape(call: RuleCall, outputs: Sequence[Labels]) -> None:
    """Always explicit: left out, the layer would take the width of its query."""
    known = [call.attribute(f"output {i}", labels) for i, labels in enumerate(outputs)]
    call.config(
        "output_shape",
        lambda keep: {
            "output_shape": tuple(int(keep(labels).sum()) for labels in known if labels is not None)
        },
    )


def _signature(call: RuleCall, operands: dict[str, _Operand]) -> None:
    """tf_keras keeps the shapes of the inputs in the configuration, and builds from them."""
    for key, operand in operands.items():
        built = getattr(call.op, f"_{key}", None)
        last = call.attribute(key, operand.labels[-1])
        if built is None or last is None:
            continue
        leading = tuple(built)[:-1]

        def rewrite(
            keep: Keep, key: str = key, leading: Any = leading, last: Labels = last
        ) -> dict[str, Any]:
            return {key: (*leading, int(keep(last).sum()))}

        call.config(key, rewrite)


@layer_rule("GroupedQueryAttention", "GroupQueryAttention")
def grouped_query_attention(call: RuleCall) -> list[TensorLabels]:
    """Query heads go with the key head that they share; the output is as wide as the query."""
    parts = attention_parts(call.op)
    operands = query, value, key = _operands(call)
    count, width_count = (int(size) for size in parts.query.kernel.shape[1:])
    shared_count = int(parts.key.kernel.shape[1])
    # A query head i uses the key head i // repeats. With a single key head, any may go.
    shared: AxisLabels = None
    if shared_count > 1:
        shared = call.fresh(shared_count, "heads")
        heads = np.repeat(shared, count // shared_count)
        call.size("num_key_value_heads", shared)
    else:
        heads = call.fresh(count, "heads")
    width = call.fresh(width_count, "head width")
    outputs = call.fresh(int(parts.output.kernel.shape[2]), "output")
    gate = parts.gate
    _project(call, parts.query, "query", query, heads, width, is_query=True)
    _project(call, parts.key, "key", key, shared, width)
    _project(call, parts.value, "value", value, shared, width)
    if gate is not None:
        _project(call, gate, "gate", query, heads, width)
    _merge_heads(call, parts.output, heads, width, [outputs])
    call.size("num_query_heads", heads)
    call.size("head_dim", width)
    # The layer insists that query, value and output are equally wide.
    for operand in (query, value):
        call.unite(outputs, operand.labels[-1])
    _count(call, operands, [1], heads, shared_count if shared is None else shared, (width, width),
           [outputs], gate is not None)  # fmt: skip
    return _with_scores(call, (*query.labels[:-1], outputs), heads)


def _listed(call: RuleCall) -> tuple[_Operand, _Operand, _Operand]:
    """Query, value and key of a layer that takes them as a list; masks may not carry channels."""
    refs = refs_in(call.call.args[:1])
    used = {ref.key for ref in refs}
    for ref, labels in zip(call.call.inputs, call.inputs, strict=True):
        call.freeze(labels[:-1], "an axis of attended positions")
        if ref.key not in used:
            call.freeze(labels, "used as an attention mask")
    query, value, *key = (_Operand(call.labels_of(ref), ref.shape) for ref in refs)
    return query, value, key[0] if key else value


def _attended(
    call: RuleCall, query: _Operand, value: _Operand, key: _Operand
) -> list[TensorLabels]:
    """Counts both products; the output has the query's steps and the value's width."""
    pairs = call.product([*query.shape[1:-1], key.shape[-2]])
    call.macs(pairs, query.width)
    call.macs(pairs, value.width)
    untracked: TensorLabels = (None,) * (len(query.shape) - 1)
    return _with_scores(call, (*untracked, value.labels[-1]), None)


@layer_rule("Attention")
def attention(call: RuleCall) -> list[TensorLabels]:
    """Queries and keys meet in a product without weights: their channels stay."""
    query, value, key = _listed(call)
    for operand in (query, key):
        call.freeze(operand.labels[-1], "queries and keys are multiplied with each other")
    return _attended(call, query, value, key)


@layer_rule("AdditiveAttention")
def additive_attention(call: RuleCall) -> list[TensorLabels]:
    """The scale reads the sum of query and key, channel by channel."""
    query, value, key = _listed(call)
    scale = getattr(call.op, "scale", None)
    if scale is None:
        for operand in (query, key):
            call.freeze(
                operand.labels[-1],
                "queries and keys are summed over their channels without weights",
            )
    elif query.labels[-1] is not None or key.labels[-1] is not None:
        call.weight(scale, "scale", consumes={0: call.unite(query.labels[-1], key.labels[-1])})
    return _attended(call, query, value, key)
