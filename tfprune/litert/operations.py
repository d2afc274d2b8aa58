"""An estimate of what each operation of a model costs.

LiteRT's Python packages have no way to read its profiler, so every operation is cut out into a
model of its own, with the shapes, weights and options it has in the whole, and timed alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np

from tfprune.errors import ModelError
from tfprune.litert.delegates import short_name
from tfprune.litert.latency import CpuRunner, measure
from tfprune.litert.report import OperationLatency


def operation_latencies(
    content: bytes, *, runs: int, warmup: int, seed: int
) -> tuple[OperationLatency, ...]:
    """Times every operation of a model's main graph alone, with one thread.

    Operations that only unpack constants are timed with the operation that reads them, as the
    delegates fold them away.

    Args:
        content: A LiteRT model.
        runs: How often each operation is timed.
        warmup: How often each runs untimed before.
        seed: Of the random inputs.

    Returns:
        In the order they run; the time is NaN for an operation that cannot run alone, such as a
        loop.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    _inline(model, content)
    graph = model.subgraphs[0]
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    constants = {i for i, t in enumerate(graph.tensors) if _has_data(model.buffers[t.buffer])}
    unpacking: dict[int, Any] = {}
    found = []
    for operator in graph.operators:
        reads = [i for i in operator.inputs if i >= 0]
        if reads and all(i in constants or i in unpacking for i in reads):
            unpacking.update(dict.fromkeys(operator.outputs, operator))
            continue
        code = model.operatorCodes[operator.opcodeIndex]
        op = names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "CUSTOM")
        alone = _alone(model, [*_needed(reads, unpacking), operator], constants)
        name = short_name(graph.tensors[operator.outputs[0]].name.decode("utf-8", "replace"))
        found.append(OperationLatency(op, name, _median_us(alone, runs, warmup, seed)))
    return tuple(found)


def _inline(model: Any, content: bytes) -> None:
    """Brings constants into their buffers: larger ones may stand behind the flatbuffer."""
    for buffer in model.buffers:
        if buffer.data is None and buffer.offset > 1:
            end = buffer.offset + buffer.size
            buffer.data = np.frombuffer(content[buffer.offset : end], np.uint8)
            buffer.offset = buffer.size = 0


def _needed(reads: Iterable[int], unpacking: dict[int, Any]) -> list[Any]:
    """The operations that unpack the constants among ``reads``, in the order they run."""
    operators: list[Any] = []
    for index in reads:
        operator = unpacking.get(index)
        if operator is None or operator in operators:
            continue
        operators += [o for o in _needed(operator.inputs, unpacking) if o not in operators]
        operators.append(operator)
    return operators


def _alone(model: Any, operators: list[Any], constants: set[int]) -> bytes:
    """A model of some neighbouring operations, whose inputs are what they read from elsewhere."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    graph = model.subgraphs[0]
    used = sorted({int(i) for o in operators for i in (*o.inputs, *o.outputs) if i >= 0})
    place = {index: new for new, index in enumerate(used)}
    written = {int(i) for o in operators for i in o.outputs}

    small = schema.ModelT()
    small.version = model.version
    small.description = "one operation"
    small.operatorCodes = model.operatorCodes
    small.buffers = [schema.BufferT()]
    part = schema.SubGraphT()
    part.name = "main"
    part.tensors = []
    for index in used:
        tensor = copy.copy(graph.tensors[index])
        if index in constants:
            small.buffers.append(model.buffers[tensor.buffer])
            tensor.buffer = len(small.buffers) - 1
        else:
            tensor.buffer = 0
        part.tensors.append(tensor)
    part.operators = []
    for operator in operators:
        moved = copy.copy(operator)
        moved.inputs = [place[int(i)] if i >= 0 else -1 for i in operator.inputs]
        moved.outputs = [place[int(i)] for i in operator.outputs]
        part.operators.append(moved)
    part.inputs = [place[i] for i in used if i not in constants and i not in written]
    part.outputs = [place[int(i)] for i in operators[-1].outputs]
    small.subgraphs = [part]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(small))


def _median_us(content: bytes, runs: int, warmup: int, seed: int) -> float:
    try:
        runner = CpuRunner(content, threads=1, seed=seed)
        return measure({"": runner}, threads=1, runs=runs, warmup=warmup)[""].cpu.median_ms * 1e3
    except (ModelError, RuntimeError):
        return float("nan")


def _has_data(buffer: Any) -> bool:
    return buffer.data is not None and len(buffer.data) > 0
