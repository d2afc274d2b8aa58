"""Evaluates a traced model call by call, so that single calls can be watched or replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tfprune.graph.groups import ChannelGraph
from tfprune.graph.trace import Call, Ref, is_model, map_leaves

Override = Callable[..., Any]
Observer = Callable[[Call, Sequence[Any]], None]


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
    return _evaluate(graph, graph.model, batch, override or {}, observe)


def _evaluate(
    graph: ChannelGraph,
    model: Any,
    batch: Sequence[Any],
    override: Mapping[int, Override],
    observe: Observer | None,
) -> list[Any]:
    traced = graph.record.traces[id(model)]
    known: dict[tuple[int, int, int], Any] = {
        ref.key: value for ref, value in zip(traced.inputs, batch, strict=True)
    }
    for call in traced.calls:
        tensors = [known[ref.key] for ref in call.inputs]
        if is_model(call.op):
            outputs = _evaluate(graph, call.op, tensors, override, observe)
        else:
            if observe is not None:
                observe(call, tensors)
            replaced = override.get(id(call))
            outputs = [replaced(*tensors)] if replaced else _call(call, known)
        for ref, value in zip(call.outputs, outputs, strict=True):
            known[ref.key] = value
    return [known[ref.key] for ref in traced.outputs]


def _call(call: Call, known: dict[tuple[int, int, int], Any]) -> list[Any]:
    def fill(leaf: Any) -> Any:
        return known[leaf.key] if isinstance(leaf, Ref) else leaf

    kwargs = {k: v for k, v in map_leaves(fill, call.kwargs).items() if v is not None}
    if kwargs.get("training"):
        kwargs["training"] = False
    return flatten(call.op(*map_leaves(fill, call.args), **kwargs))


def flatten(structure: Any) -> list[Any]:
    """The leaves of nested lists, tuples and dicts of tensors (dicts in sorted order of keys)."""
    if isinstance(structure, list | tuple):
        return [leaf for item in structure for leaf in flatten(item)]
    if isinstance(structure, Mapping):
        return [leaf for key in sorted(structure) for leaf in flatten(structure[key])]
    return [structure]


def call_model(model: Any, batch: Sequence[Any]) -> list[Any]:
    """Calls a model in inference mode on one array per input; the outputs, flattened."""
    structure = getattr(model, "_inputs_struct", None)
    if isinstance(structure, dict):
        named = dict(zip(sorted(structure), batch, strict=True))
        return flatten(model(named, training=False))
    return flatten(model(list(batch) if len(batch) > 1 else batch[0], training=False))
