"""Attention: heads and widths are axes of the projections' kernels.

A score is a dot product of a query and a key: no kernel reads their shared width, so the masked
model zeroes the query's slices. The layer divides scores by the square root of that width, which
pruning changes: the query's projection makes up for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfprune.graph.context import RuleCall
from tfprune.graph.labels import AxisLabels, Keep, Labels, TensorLabels
from tfprune.graph.rules.registry import layer_rule
from tfprune.graph.trace import Ref, leaves

Width = AxisLabels | int


def _operands(call: RuleCall) -> tuple[TensorLabels, TensorLabels, TensorLabels]:
    """Labels of query, value and key; everything else (masks) may not carry channels."""
    arguments = call.arguments()
    named = [arguments.get(name) for name in ("query", "value", "key")]
    query, value, key = named[0], named[1], named[1] if named[2] is None else named[2]
    if not isinstance(query, Ref) or not isinstance(value, Ref) or not isinstance(key, Ref):
        raise TypeError(f"Expected symbolic query, value and key at {call.path!r}.")
    used = {query.key, value.key, key.key}
    for ref, labels in zip(call.call.inputs, call.inputs, strict=True):
        if ref.key not in used:
            call.freeze(labels, "used as an attention mask")
    return call.labels_of(query), call.labels_of(value), call.labels_of(key)


def _query_scale(width: Labels) -> Any:
    """Makes up for the layer's division by the square root of the query's width."""

    def scale(keep: Keep) -> float:
        return math.sqrt(int(keep(width).sum()) / len(width))

    return scale


def _project(
    call: RuleCall, layer: Any, name: str, inputs: AxisLabels, heads: AxisLabels,
    width: Labels, query: bool = False,
) -> None:  # fmt: skip
    """A projection into heads: kernel ``(inputs, heads, width)``, bias ``(heads, width)``."""
    scale = _query_scale(width) if query else None
    call.weight(
        layer.kernel, f"{name}/kernel", consumes={0: inputs}, produces={1: heads, 2: width},
        masked=[2] if query else [], scale=scale,
    )  # fmt: skip
    call.weight(
        layer.bias, f"{name}/bias", produces={0: heads, 1: width}, scored=False,
        masked=[1] if query else [], scale=scale,
    )  # fmt: skip


def _width(labels: AxisLabels, size: int | None) -> Any:
    return size if labels is None else labels


def _count(
    call: RuleCall,
    operands: Sequence[tuple[TensorLabels, tuple[int | None, ...]]],
    attended: Sequence[int],
    heads: Width,
    key_width: Labels,
    value_width: Labels,
    shared: Width,
    outputs: Sequence[Width],
    gate: bool,
) -> None:
    """MACs of the projections and of both products.

    ``operands``: labels and shapes of query, value and key; ``attended``: the axes over which
    they attend; ``shared``: the heads of keys and values, fewer where queries share them.
    """
    (query, query_shape), (value, value_shape), (key, key_shape) = operands
    targets = call.product(query_shape[1:-1])
    sources = call.product(key_shape[1:-1])
    call.macs(targets, _width(query[-1], query_shape[-1]), heads, key_width)
    call.macs(sources, _width(key[-1], key_shape[-1]), shared, key_width)
    call.macs(sources, _width(value[-1], value_shape[-1]), shared, value_width)
    if gate:
        call.macs(targets, _width(query[-1], query_shape[-1]), heads, value_width)
    attended_sources = call.product([key_shape[axis] for axis in attended])
    pairs = call.product([targets, attended_sources])
    call.macs(pairs, heads, key_width)
    call.macs(pairs, heads, value_width)
    call.macs(targets, heads, value_width, *outputs)


@layer_rule("MultiHeadAttention")
def multi_head_attention(call: RuleCall) -> TensorLabels | list[TensorLabels]:
    """Heads, key width, value width and outputs can go, each by itself."""
    op = call.op
    query, value, key = _operands(call)
    kernel, output_kernel = op._query_dense.kernel, op._output_dense.kernel
    heads = call.fresh(int(kernel.shape[1]), "heads")
    key_width = call.fresh(int(kernel.shape[2]), "key width")
    value_width = call.fresh(int(output_kernel.shape[1]), "value width")
    outputs = [call.fresh(int(size), "output") for size in output_kernel.shape[2:]]
    gate = getattr(op, "_gate_dense", None)
    _project(call, op._query_dense, "query", query[-1], heads, key_width, query=True)
    _project(call, op._key_dense, "key", key[-1], heads, key_width)
    _project(call, op._value_dense, "value", value[-1], heads, value_width)
    if gate is not None:
        _project(call, gate, "gate", query[-1], heads, value_width)
    call.weight(
        output_kernel, "attention_output/kernel", consumes={0: heads, 1: value_width},
        produces={2 + i: labels for i, labels in enumerate(outputs)},
    )  # fmt: skip
    call.weight(
        op._output_dense.bias, "attention_output/bias", scored=False,
        produces=dict(enumerate(outputs)),
    )  # fmt: skip
    call.size("num_heads", heads)
    call.size("key_dim", key_width)
    call.size("value_dim", value_width)
    _output_shape(call, outputs)
    _signature(call, {"query_shape": query, "value_shape": value, "key_shape": key})
    shapes = {ref.key: ref.shape for ref in call.call.inputs}
    arguments = call.arguments()
    source = arguments["value"]
    operands = [
        (query, shapes[arguments["query"].key]),
        (value, shapes[source.key]),
        (key, shapes[(arguments.get("key") or source).key]),
    ]
    _count(
        call, operands, list(op._attention_axes), heads, key_width, value_width, heads, outputs,
        gate is not None,
    )  # fmt: skip
    projected = (*query[:-1], *outputs)
    if len(call.output_shapes) == 1:
        return projected
    return [projected, _scores(call, heads)]


def _scores(call: RuleCall, heads: AxisLabels) -> TensorLabels:
    """Attention scores: ``(batch, heads, ...)``."""
    return tuple(heads if axis == 1 else None for axis in range(len(call.output_shapes[1])))


def _output_shape(call: RuleCall, outputs: Sequence[Labels]) -> None:
    """Always explicit: left out, the layer would take the width of its query."""
    known = [call.attribute(f"output {i}", labels) for i, labels in enumerate(outputs)]
    call.config(
        "output_shape",
        lambda keep: {
            "output_shape": tuple(int(keep(labels).sum()) for labels in known if labels is not None)
        },
    )


def _signature(call: RuleCall, shapes: dict[str, TensorLabels]) -> None:
    """tf_keras keeps the shapes of the inputs in the configuration, and builds from them."""
    for key, labels in shapes.items():
        built = getattr(call.op, f"_{key}", None)
        last = call.attribute(key, labels[-1])
        if built is None or last is None:
            continue
        leading = tuple(built)[:-1]

        def rewrite(
            keep: Keep, key: str = key, leading: Any = leading, last: Labels = last
        ) -> dict[str, Any]:
            return {key: (*leading, int(keep(last).sum()))}

        call.config(key, rewrite)


@layer_rule("GroupedQueryAttention", "GroupQueryAttention")
def grouped_query_attention(call: RuleCall) -> TensorLabels | list[TensorLabels]:
    """Query heads go with the key head that they share; the output is as wide as the query."""
    op = call.op
    query, value, key = _operands(call)
    heads_count, width_count = (int(size) for size in op._query_dense.kernel.shape[1:])
    shared_count = int(op._key_dense.kernel.shape[1])
    # A query head i uses the key head i // repeats. With a single key head, any may go.
    shared: AxisLabels = None
    if shared_count > 1:
        shared = call.fresh(shared_count, "heads")
        heads = np.repeat(shared, heads_count // shared_count)
        call.size("num_key_value_heads", shared)
    else:
        heads = call.fresh(heads_count, "heads")
    width = call.fresh(width_count, "head width")
    _project(call, op._query_dense, "query", query[-1], heads, width, query=True)
    _project(call, op._key_dense, "key", key[-1], shared, width)
    _project(call, op._value_dense, "value", value[-1], shared, width)
    gate = getattr(op, "_gate_dense", None)
    if gate is not None:
        _project(call, gate, "gate", query[-1], heads, width)
    outputs = call.fresh(int(op._output_dense.kernel.shape[2]), "output")
    call.weight(
        op._output_dense.kernel, "attention_output/kernel", consumes={0: heads, 1: width},
        produces={2: outputs},
    )  # fmt: skip
    call.weight(op._output_dense.bias, "attention_output/bias", produces={0: outputs}, scored=False)
    call.size("num_query_heads", heads)
    call.size("head_dim", width)
    # The layer insists that query, value and output are equally wide.
    for known in (query[-1], value[-1]):
        if known is None:
            call.freeze(outputs, "as wide as an input whose channels cannot be removed")
        call.unite(outputs, known)
    refs = {ref.key: ref.shape for ref in call.call.inputs}
    arguments = call.arguments()
    source = arguments["value"]
    operands = [
        (query, refs[arguments["query"].key]),
        (value, refs[source.key]),
        (key, refs[(arguments.get("key") or source).key]),
    ]
    _count(
        call, operands, [1], heads, width, width, shared_count if shared is None else shared,
        [outputs], gate is not None,
    )  # fmt: skip
    projected = (*query[:-1], outputs)
    if len(call.output_shapes) == 1:
        return projected
    return [projected, _scores(call, heads)]


def _triple(call: RuleCall) -> list[int]:
    """Positions among the call's inputs of query, value and key of a dot-product layer."""
    first = [leaf for leaf in leaves(call.call.args[:1]) if isinstance(leaf, Ref)]
    keys = [ref.key for ref in call.call.inputs]
    positions = [keys.index(ref.key) for ref in first]
    for position, labels in enumerate(call.inputs):
        if position not in positions and keys[position] not in {ref.key for ref in first}:
            call.freeze(labels, "used as an attention mask")
    return positions if len(positions) == 3 else [*positions, positions[1]]


def _attended(call: RuleCall, positions: Sequence[int]) -> TensorLabels | list[TensorLabels]:
    """Counts the two products; the output has the query's steps and the value's width."""
    query, value, key = positions
    targets = call.product(call.input_shapes[query][1:-1])
    sources = call.input_shapes[key][-2]
    pairs = call.product([targets, sources])
    for position in (query, value):
        width = _width(call.inputs[position][-1], call.input_shapes[position][-1])
        call.macs(pairs, width)
    output = (*call.inputs[query][:-1], call.inputs[value][-1])
    if len(call.output_shapes) == 1:
        return output
    return [output, tuple(None for _ in call.output_shapes[1])]


@layer_rule("Attention")
def attention(call: RuleCall) -> TensorLabels | list[TensorLabels]:
    """Queries and keys meet in a product without weights: their channels stay."""
    positions = _triple(call)
    for position in (positions[0], positions[2]):
        call.freeze(call.inputs[position][-1], "queries and keys are multiplied with each other")
    return _attended(call, positions)


@layer_rule("AdditiveAttention")
def additive_attention(call: RuleCall) -> TensorLabels | list[TensorLabels]:
    """The scale reads the sum of query and key, channel by channel."""
    positions = _triple(call)
    query, key = call.inputs[positions[0]][-1], call.inputs[positions[2]][-1]
    scale = getattr(call.op, "scale", None)
    if scale is None:
        for known in (query, key):
            call.freeze(known, "queries and keys are summed over their channels without weights")
    elif query is not None or key is not None:
        united = call.unite(query, key)
        call.weight(scale, "scale", consumes={0: query if united is None else united})
    return _attended(call, positions)
