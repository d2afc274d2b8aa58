"""Evaluates a traced model call by call, so that single calls can be watched or replaced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfprune.graph.trace import Call, Ref, Trace, is_model, is_sequential, map_leaves, trace

if TYPE_CHECKING:
    from tfprune.graph.groups import ChannelGraph

Override = Callable[..., Any]
Observer = Callable[[Call, Sequence[Any]], None]
Key = tuple[int, int, int]


def evaluate(
    graph: ChannelGraph,
    batch: Sequence[Any],
    *,
    override: Mapping[int, Override] | None = None,
    observe: Observer | None = None,
) -> list[Any]:
    """The model's outputs, flattened, in inference mode.

    Args:
        graph: the analysed model; nested models are walked in place.
        batch: one array per input, batch axis first.
        override: ``id`` of a call -> function of the call's input tensors, used in its place.
        observe: sees every call with its input tensors before it is made.
    """
    return _evaluate(graph.record.traces, graph.model, batch, override or {}, observe, {})


def shapes_of(
    traces: dict[int, Trace], model: Any, batch: Sequence[Any]
) -> dict[Key, tuple[int, ...]]:
    """The shapes that the model's tensors have for one batch, by their key."""
    shapes: dict[Key, tuple[int, ...]] = {}
    _evaluate(traces, model, batch, {}, None, shapes)
    return shapes


def _evaluate(
    traces: dict[int, Trace],
    model: Any,
    batch: Sequence[Any],
    override: Mapping[int, Override],
    observe: Observer | None,
    shapes: dict[Key, tuple[int, ...]],
) -> list[Any]:
    traced = traces.get(id(model))
    if traced is None:
        traced = traces[id(model)] = trace(model)
    known: dict[Key, Any] = {}

    def learn(ref: Ref, value: Any) -> None:
        known[ref.key] = value
        shapes[ref.key] = tuple(int(size) for size in value.shape)

    for ref, value in zip(traced.inputs, batch, strict=True):
        learn(ref, value)
    for call in traced.calls:
        tensors = [known[ref.key] for ref in call.inputs]
        if is_model(call.op):
            outputs = _evaluate(traces, call.op, tensors, override, observe, shapes)
        else:
            if observe is not None:
                observe(call, tensors)
            replaced = override.get(id(call))
            outputs = [replaced(*tensors)] if replaced else run_call(call, tensors)
        for ref, value in zip(call.outputs, outputs, strict=True):
            learn(ref, value)
    return [known[ref.key] for ref in traced.outputs]


def run_call(call: Call, tensors: Sequence[Any]) -> list[Any]:
    """The outputs of one call on other inputs, flattened, in inference mode.

    Args:
        call: of an operation that is no model.
        tensors: one per entry of ``call.inputs``.
    """
    known = {ref.key: tensor for ref, tensor in zip(call.inputs, tensors, strict=True)}

    def fill(leaf: Any) -> Any:
        return known[leaf.key] if isinstance(leaf, Ref) else leaf

    kwargs = {k: v for k, v in map_leaves(fill, call.kwargs).items() if v is not None}
    if kwargs.get("training") or _takes_training(call.op):
        kwargs["training"] = False
    return flatten(call.op(*map_leaves(fill, call.args), **kwargs))


def _takes_training(op: Any) -> bool:
    """Layers for augmentation would otherwise think that they are in training."""
    return "training" in inspect.signature(op.call).parameters


def flatten(structure: Any) -> list[Any]:
    """The leaves of nested lists, tuples and dicts of tensors (dicts in sorted order of keys)."""
    if isinstance(structure, list | tuple):
        return [leaf for item in structure for leaf in flatten(item)]
    if isinstance(structure, Mapping):
        return [leaf for key in sorted(structure) for leaf in flatten(structure[key])]
    return [structure]


def call_model(model: Any, batch: Sequence[Any]) -> list[Any]:
    """Calls a model in inference mode on one array per input; the outputs, flattened."""
    traced = trace(model)
    known = {ref.key: value for ref, value in zip(traced.inputs, batch, strict=True)}
    if is_sequential(model):
        return flatten(model(batch[0], training=False))
    inputs = map_leaves(lambda ref: known[ref.key], traced.input_structure)
    return flatten(model(inputs, training=False))
