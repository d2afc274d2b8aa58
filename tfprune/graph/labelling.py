"""Runs the rules over a traced model, once, from inputs to outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfprune.errors import ArgumentError
from tfprune.graph.context import Record, RuleCall, Term
from tfprune.graph.evaluate import shapes_of
from tfprune.graph.labels import AxisLabels, TensorLabels
from tfprune.graph.rules import find_rule
from tfprune.graph.trace import Trace, is_model, require_unwrapped, trace, with_shapes

_BYTES = {"float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4,
          "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2}  # fmt: skip


def label_model(model: Any, input_shape: Any = None) -> tuple[Record, Trace]:
    """Labels every channel of ``model``.

    Args:
        model: a functional or sequential model.
        input_shape: shape of one example (a list of them for several inputs), where the model
            leaves sizes free; only counts of MACs and bytes depend on it.

    Raises:
        ModelError: the model, or one nested in it, is subclassed or unbuilt, or it still has
            pruning wrappers.
        ArgumentError: ``input_shape`` does not fit the model.
    """
    record = Record()
    traced = trace(model)
    require_unwrapped(model)
    record.traces[id(model)] = traced
    if input_shape is not None:
        _settle_sizes(record, traced, input_shape)
        traced = record.traces[id(model)]
    inputs: list[TensorLabels] = [tuple(None for _ in ref.shape) for ref in traced.inputs]
    for ref in traced.inputs:
        _count_activation(record, "", ref.shape, tuple(None for _ in ref.shape), ref.dtype)
    for labels in _run(record, traced, inputs, ""):
        for axis in labels:
            record.store.freeze(axis, "", "model output")
    return record, traced


def _settle_sizes(record: Record, traced: Trace, input_shape: Any) -> None:
    """Runs the model once on zeros to learn the sizes that it leaves free."""
    given = input_shape if isinstance(input_shape, list) else [input_shape]
    fits = len(given) == len(traced.inputs) and all(
        len(shape) == len(ref.shape) - 1
        and all(b is None or a == b for a, b in zip(shape, ref.shape[1:], strict=True))
        for shape, ref in zip(given, traced.inputs, strict=True)
    )
    if not fits:
        expected = [ref.shape[1:] for ref in traced.inputs]
        raise ArgumentError(
            f"Expected input_shape to fit inputs of shape {expected} (one example each, a list "
            f"for several inputs). Received: {input_shape!r}."
        )
    batch = [
        np.zeros((ref.shape[0] or 1, *shape), ref.dtype)
        for ref, shape in zip(traced.inputs, given, strict=True)
    ]
    shapes = shapes_of(record.traces, traced.model, batch)
    for key, known in record.traces.items():
        record.traces[key] = with_shapes(known, shapes)


def _run(
    record: Record,
    traced: Trace,
    inputs: Sequence[TensorLabels],
    prefix: str,
    repeats: int | None = 1,
) -> list[TensorLabels]:
    """Walks one model's calls; nested models are walked in place, wrapped ones run ``repeats``
    times per example.
    """
    known: dict[tuple[int, int, int], TensorLabels] = {}
    for ref, labels in zip(traced.inputs, inputs, strict=True):
        # A nested model that is called again must lose the same channels at its inputs.
        known[ref.key] = _unite(record, record.tensors.get(ref.key), labels, prefix)
        record.tensors[ref.key] = known[ref.key]
    for call in traced.calls:
        path = f"{prefix}{call.op.name}"
        given = [known[ref.key] for ref in call.inputs]
        rule_call = RuleCall(record, call, path, given, apply_rule, repeats)
        outputs = apply_rule(rule_call)
        for ref, labels in zip(call.outputs, outputs, strict=True):
            known[ref.key] = record.tensors[ref.key] = labels
            _count_activation(record, path, ref.shape, labels, ref.dtype)
    return [known[ref.key] for ref in traced.outputs]


def _unite(
    record: Record, before: TensorLabels | None, labels: TensorLabels, prefix: str
) -> TensorLabels:
    """The labels of a nested model's input, united with those of an earlier call."""
    if before is None:
        return labels
    output: list[AxisLabels] = []
    for first, second in zip(before, labels, strict=True):
        if first is None or second is None:
            known = second if first is None else first
            record.store.freeze(known, prefix.rstrip("/"), "shared with channels that must stay")
            output.append(None)
        else:
            record.store.unite(first, second, prefix.rstrip("/"))
            output.append(first)
    return tuple(output)


def apply_rule(call: RuleCall) -> list[TensorLabels]:
    """The labels of a call's outputs, by its op's rule; an op without one freezes its inputs."""
    op = call.op
    if is_model(op):
        record = call.record
        inner = record.traces.get(id(op))
        if inner is None:
            inner = record.traces[id(op)] = trace(op)
        return _run(record, inner, call.inputs, call.path + "/", call.repeats)
    rule, reason = find_rule(op)
    if rule is None:
        for labels in call.inputs:
            call.freeze(labels, reason)
        return [tuple(None for _ in shape) for shape in call.output_shapes]
    result = rule(call)
    outputs = list(result) if isinstance(result, list) else [result]
    for labels, shape in zip(outputs, call.output_shapes, strict=True):
        sizes = [None if axis is None else len(axis) for axis in labels]
        if len(sizes) != len(shape) or any(
            size is not None and size != expected
            for size, expected in zip(sizes, shape, strict=True)
        ):
            raise ValueError(
                f"Expected labels for an output of shape {shape} from the rule of "
                f"{type(op).__name__} at {call.path!r}. Received: axes of sizes {sizes}. "
                "A rule returns one tuple per output, with one entry per axis: labels, or None."
            )
    return outputs


def _count_activation(
    record: Record, path: str, shape: Sequence[int | None], labels: TensorLabels, dtype: str
) -> None:
    coefficient: float | None = _BYTES.get(dtype, 1)
    factors = []
    for size, axis in zip(shape[1:], labels[1:], strict=True):
        if isinstance(axis, np.ndarray):
            factors.append(axis)
        elif size is None or coefficient is None:
            coefficient = None
        else:
            coefficient *= size
    record.activations.append(Term(path, coefficient, tuple(factors)))
