"""Blocks: the branches of residual additions, which can be left out whole.

Where tensors are added, the sum without one of them is still a tensor of the same shape, so that
the operations that made that one, and that nobody else needs, can go. What the sum needs to stay is
its *shortcut*: of the operands that have the shape of the sum, the one with the fewest layers with
weights of its own (then the fewest parameters, then the first). So the projection at the start of a
stage is a shortcut, and stays when its block goes; a sum always keeps a path through it.

The labels of the full graph stay as they are without a block: channels that the addition united
remain united, which is a restriction and never an error.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from tfprune.graph.groups import ChannelGraph
from tfprune.graph.trace import (
    Call,
    Ref,
    Trace,
    is_model,
    is_of_framework,
    symbol_of,
    with_values,
)

# Of TensorFlow's functions in tf_keras models.
_SYMBOLS = frozenset(["__operators__.add", "__operators__.radd", "math.add", "add", "math.add_n"])


@dataclass(frozen=True)
class Block:
    """The branch of a residual addition.

    Attributes:
        name: the path of the addition; ``"path#2"`` for a second branch of the same path.
        path: the path of the addition.
        operand: which of the tensors that are added, from 0.
        layers: paths of the operations that go with the block, in the order of the model.
        last: path of the operation that makes the operand.
        call: the addition.
    """

    name: str
    path: str
    operand: int
    layers: tuple[str, ...]
    last: str
    call: Call = field(repr=False, compare=False)


@dataclass(frozen=True)
class Removal:
    """What is left of the calls of a graph when blocks are removed.

    Attributes:
        skipped: ``id`` of a call that is not made -> the input that stands for its output; ``None``
            where nobody reads that.
        operands: ``id`` of an addition -> numbers of the operands that stay.
    """

    skipped: Mapping[int, Ref | None]
    operands: Mapping[int, tuple[int, ...]]

    def arguments(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments without the operands that are gone."""
        stay = self.operands.get(id(call))
        if stay is None:
            return args, kwargs
        number = -1

        def left(structure: Any) -> Any:
            nonlocal number
            if not isinstance(structure, list | tuple):
                return structure
            items = []
            for item in structure:
                number += isinstance(item, Ref)
                if not isinstance(item, Ref) or number in stay:
                    items.append(left(item))
            return items if isinstance(structure, list) else tuple(items)

        return left(args), {key: left(value) for key, value in kwargs.items()}


# A graph does not change, and a plan asks for its blocks more than once.
_KNOWN: WeakKeyDictionary[ChannelGraph, tuple[Block, ...]] = WeakKeyDictionary()


def blocks_of(graph: ChannelGraph) -> tuple[Block, ...]:
    """Every block that can be removed, in the order of the model.

    A block needs a layer with weights that nobody else uses. A branch that is all that reads an
    input of the model is none. Blocks are found in nested models, too; one inside a model that is
    called twice is missing in both calls. Inside of wrappers (``TimeDistributed``) and of layers of
    one's own there are none.

    Args:
        graph: the analysed model.
    """
    if graph not in _KNOWN:
        _KNOWN[graph] = tuple(_found(graph))
    return _KNOWN[graph]


def _found(graph: ChannelGraph) -> list[Block]:
    found: list[Block] = []
    used: dict[str, int] = {}
    seen: set[int] = set()
    for path, traced, call, _ in _walk(graph, {}):
        if id(call) in seen:  # of a model that is called twice
            continue
        seen.add(id(call))
        if not _is_addition(call.op) or len(call.inputs) < 2:
            continue
        for number, layers in _branches(graph, traced, call):
            used[path] = used.get(path, 0) + 1
            name = path if used[path] == 1 else f"{path}#{used[path]}"
            last = path.removesuffix(call.op.name) + _maker(traced, call.inputs[number]).op.name
            found.append(Block(name, path, number, tuple(layers.values()), last, call))
    return found


def removal(graph: ChannelGraph, names: Collection[str]) -> Removal:
    """What is left of the calls without some blocks.

    Args:
        graph: the analysed model.
        names: of blocks of this graph.

    Raises:
        KeyError: a name of no block.
    """
    if not names:
        return Removal({}, {})
    by_name = {block.name: block for block in blocks_of(graph)}
    cut: dict[int, set[int]] = {}
    for name in names:
        cut.setdefault(id(by_name[name].call), set()).add(by_name[name].operand)
    return _removal(graph, cut)


def unread_inputs(graph: ChannelGraph, removed: Removal) -> bool:
    """Whether a model, or one nested in it, has an input that only removed calls read."""
    return any(
        _unread(traced, removed.skipped, removed.operands)
        for traced in graph.record.traces.values()
    )


def calls_of(graph: ChannelGraph, removed: Removal) -> Iterator[tuple[str, Call, bool]]:
    """Every call as often as it is made, nested models in place, in the order of the graph's rules.

    Yields:
        The path, the call, and whether it is gone.
    """
    for path, _, call, gone in _walk(graph, removed.skipped):
        yield path, call, gone


def weights_gone(graph: ChannelGraph, removed: Removal) -> set[int]:
    """``id`` of the weights that only calls which are gone have used."""
    stay: set[int] = set()
    dropped: set[int] = set()
    for _, call, gone in calls_of(graph, removed):
        if not is_model(call.op):
            weights = {id(variable) for variable in getattr(call.op, "weights", ())}
            (dropped if gone else stay).update(weights)
    return dropped - stay


def owner(path: str, known: Collection[str]) -> str | None:
    """The innermost of some operations to which a path belongs: itself, or what contains it."""
    while path and path not in known:
        path = path.rpartition("/")[0]
    return path or None


def _walk(
    graph: ChannelGraph, skipped: Mapping[int, Ref | None]
) -> Iterator[tuple[str, Trace, Call, bool]]:
    """Path, trace, call and whether it is not made; a nested model's calls come before its own."""

    def walk(model: Any, prefix: str, gone: bool) -> Iterator[tuple[str, Trace, Call, bool]]:
        traced = graph.record.traces[id(model)]
        for call in traced.calls:
            path, left = f"{prefix}{call.op.name}", gone or id(call) in skipped
            if is_model(call.op):
                yield from walk(call.op, f"{path}/", left)
            yield path, traced, call, left

    return walk(graph.model, "", False)


def _branches(
    graph: ChannelGraph, traced: Trace, call: Call
) -> Iterator[tuple[int, dict[int, str]]]:
    """For every branch of an addition its operand and the paths of what goes, by ``id``."""
    result = call.outputs[0]
    own = [_own(graph, traced, call, number) for number in range(len(call.inputs))]
    whole = [
        number
        for number, ref in enumerate(call.inputs)
        # Others are cast or broadcast by the addition, which cannot be left out then.
        if ref.shape == result.shape and ref.dtype == result.dtype
    ]
    if not whole:
        return
    shortcut = min(whole, key=lambda number: _size(own[number][1]))
    for number, (layers, weighted) in enumerate(own):
        if number != shortcut and weighted:
            yield number, layers


def _own(
    graph: ChannelGraph, traced: Trace, call: Call, number: int
) -> tuple[dict[int, str], list[Any]]:
    """The operations that only one operand needs, with their paths, and those with weights."""
    ref = call.inputs[number]
    readers = sum(other.key == ref.key for each in traced.calls for other in each.inputs)
    if readers > 1 or any(output.key == ref.key for output in traced.outputs):
        return {}, []
    removed = _removal(graph, {id(call): {number}})
    if _unread(traced, removed.skipped, removed.operands):
        return {}, []
    layers: dict[int, str] = {}
    stay: set[int] = set()
    ops: dict[int, Any] = {}
    for path, _, each, gone in _walk(graph, removed.skipped):
        ops[id(each.op)] = each.op
        if gone and each is not call:
            layers.setdefault(id(each.op), path)
        elif not gone:
            stay.add(id(each.op))
    layers = {key: path for key, path in layers.items() if key not in stay}
    weighted = [
        ops[key]
        for key in layers
        if not is_model(ops[key]) and with_values(getattr(ops[key], "weights", []))
    ]
    return layers, weighted


def _size(weighted: Sequence[Any]) -> tuple[int, int]:
    """How many layers, and how many parameters."""
    return len(weighted), sum(
        math.prod(int(size) for size in variable.shape)
        for op in weighted
        for variable in with_values(op.weights)
    )


def _removal(graph: ChannelGraph, cut: Mapping[int, Collection[int]]) -> Removal:
    """From the operands that are cut off, by the ``id`` of the addition."""
    skipped: dict[int, Ref | None] = {}
    operands: dict[int, tuple[int, ...]] = {}
    for traced in graph.record.traces.values():
        if not any(id(call) in cut for call in traced.calls):
            continue
        wanted = {ref.key for ref in traced.outputs}
        for call in reversed(traced.calls):
            if not any(ref.key in wanted for ref in call.outputs):
                skipped[id(call)] = None
                continue
            gone = cut.get(id(call), ())
            stay = tuple(i for i in range(len(call.inputs)) if i not in gone)
            wanted |= {call.inputs[i].key for i in stay}
            if gone:
                operands[id(call)] = stay
                if len(stay) == 1:
                    skipped[id(call)] = call.inputs[stay[0]]
    return Removal(skipped, operands)


def _unread(
    traced: Trace, skipped: Mapping[int, Ref | None], operands: Mapping[int, tuple[int, ...]]
) -> bool:
    """Whether an input was read before, and is not any more."""
    before = {ref.key for call in traced.calls for ref in call.inputs}
    after = {ref.key for ref in traced.outputs}
    for call in traced.calls:
        stay = operands.get(id(call), range(len(call.inputs)))
        if skipped.get(id(call), call) is not None:
            after |= {call.inputs[i].key for i in stay}
    return any(ref.key in before - after for ref in traced.inputs)


def _maker(traced: Trace, ref: Ref) -> Call:
    """The call that makes a tensor."""
    return next(call for call in traced.calls if any(o.key == ref.key for o in call.outputs))


def _is_addition(op: Any) -> bool:
    if type(op).__name__ == "Add":
        return is_of_framework(type(op))
    return symbol_of(op) in _SYMBOLS
