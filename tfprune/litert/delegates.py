"""What the CPU delegate takes of a model, and what stands against a GPU delegate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tfprune.errors import ExportError
from tfprune.litert.flatbuffer import Graph, Operation, Tensor
from tfprune.litert.quiet import captured_output
from tfprune.litert.report import CpuDelegation, GpuAudit, GpuObstacle


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The list in LiteRT's documentation of the GPU delegate, for float models.
_DOCUMENTED = _words(
    """
    ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D EXP FULLY_CONNECTED LOGICAL_AND
    LOGISTIC LSTM MAX_POOL_2D MAXIMUM MINIMUM MUL PAD PRELU RELU RELU6 RESHAPE RESIZE_BILINEAR
    SOFTMAX STRIDED_SLICE SUB TRANSPOSE_CONV
    """
)
# What the delegate's code takes beyond it (without DENSIFY, which its successor, ML Drift, lacks).
_IN_CODE = _words(
    """
    ABS ADD_N BATCH_MATMUL CAST COS CUMSUM DEPTH_TO_SPACE DEQUANTIZE DIV EQUAL ELU FLOOR FLOOR_DIV
    FLOOR_MOD GATHER GELU GREATER GREATER_EQUAL HARD_SWISH LEAKY_RELU LESS LESS_EQUAL LOG MEAN
    MIRROR_PAD NEG NOT_EQUAL ONE_HOT PACK PADV2 POW QUANTIZE REDUCE_MAX REDUCE_MIN REDUCE_PROD
    RELU_0_TO_1 RELU_N1_TO_1 RESIZE_NEAREST_NEIGHBOR RSQRT SELECT SELECT_V2 SIGN SIN SLICE
    SPACE_TO_DEPTH SPLIT SPLIT_V SQRT SQUARE SQUARED_DIFFERENCE SUM TANH TILE TRANSPOSE UNPACK
    """
)
# What ML Drift, the engine of current GPU accelerators, adds.
_IN_ML_DRIFT = _words(
    """
    ARG_MAX ATAN2 BROADCAST_TO CEIL DYNAMIC_UPDATE_SLICE EMBEDDING_LOOKUP LOGICAL_NOT LOGICAL_OR
    REDUCE_ALL REDUCE_ANY REVERSE_V2 ROUND STABLEHLO_COMPOSITE TOPK_V2
    """
)
_LARGEST_RANK = 4


def cpu_delegation(content: bytes) -> CpuDelegation:
    """Asks LiteRT which operations of the main graph XNNPACK takes on this machine.

    Args:
        content: A LiteRT model.

    Raises:
        ExportError: LiteRT cannot run it here.
    """
    # Without fusion every operation that is taken is replaced by a delegate node of its own,
    # which writes the same tensors; with fusion the nodes are the partitions.
    operations, alone = _nodes(content, fused=False)
    taken_outputs = {tensor for node in alone for tensor in node}
    taken: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for op, outputs in operations:
        (taken if taken_outputs.issuperset(outputs) else left)[op] += 1
    partitions = len(_nodes(content, fused=True)[1])
    return CpuDelegation(_frozen(taken), _frozen(left), partitions)


def left_by_xnnpack(content: bytes) -> frozenset[int]:
    """The tensors written by operations of the main graph that XNNPACK leaves to LiteRT.

    Args:
        content: A LiteRT model.

    Returns:
        Indices of tensors in the file.

    Raises:
        ExportError: LiteRT cannot run it here.
    """
    operations, delegated = _nodes(content, fused=False)
    taken = set().union(*delegated)
    return frozenset(t for _, outputs in operations if not taken >= outputs for t in outputs)


def gpu_audit(graph: Graph) -> GpuAudit:
    """Holds a model's operations against what GPU delegates are known to take."""
    obstacles = [
        GpuObstacle(operation.op, short_name(operation.name), reason)
        for operation in graph.operations
        for reason in _reasons(operation)
    ]
    kinds = {operation.op for operation in graph.operations}
    undocumented = sorted(kinds & (_IN_CODE | _IN_ML_DRIFT))
    return GpuAudit(tuple(obstacles), tuple(_hazards(graph)), tuple(undocumented))


def short_name(name: str) -> str:
    """The last of the layer paths that the converter joined in a tensor's name."""
    return name.rsplit(";", 1)[-1]


def _reasons(operation: Operation) -> Iterator[str]:
    """Why GPU delegates refuse an operation; nothing where they take it."""
    if operation.custom:
        yield "a custom or TensorFlow Select operation"
    elif operation.op == "SHAPE":
        yield "no GPU delegate has it; it comes with an open batch size"
    elif operation.op == "DENSIFY":
        yield "sparse weights; export with dense ones for the GPU"
    elif operation.op not in _DOCUMENTED | _IN_CODE | _IN_ML_DRIFT:
        yield "no GPU delegate has it"
    moving = [t for t in (*operation.inputs, *operation.outputs) if not t.constant]
    if any(size < 0 for tensor in moving for size in tensor.shape):
        yield "a tensor whose size is known at run time only"
    if _ranks(moving) > _LARGEST_RANK:
        yield f"a tensor of more than {_LARGEST_RANK} axes"
    if any(tensor.dtype == "int16" for tensor in moving):
        yield "int16 activations"
    if operation.op == "GATHER" and len(operation.inputs[1].shape) != 1:
        yield "indices of more or fewer than one axis, as an embedding has them"
    if operation.op == "STRIDED_SLICE" and _ranks(operation.outputs) < _ranks(operation.inputs[:1]):
        yield "a slice that drops an axis"
    if operation.op == "DEQUANTIZE" and _stored_as_integers(operation.inputs[0]):
        yield "integer weights that are dequantised explicitly"


def _ranks(tensors: Iterable[Tensor]) -> int:
    return max((len(tensor.shape) for tensor in tensors), default=0)


def _stored_as_integers(tensor: Tensor) -> bool:
    return tensor.constant and tensor.dtype in ("int8", "int4", "uint8")


def _hazards(graph: Graph) -> Iterator[GpuObstacle]:
    splits = {
        output.name: operation
        for operation in graph.operations
        if operation.op in ("SPLIT", "SPLIT_V")
        for output in operation.outputs
    }
    for operation in graph.operations:
        names = [tensor.name for tensor in operation.inputs]
        if operation.op == "CONCATENATION":
            sources = {id(splits[name]) for name in names if name in splits}
            for name in names:
                if name not in splits or id(splits[name]) not in sources:
                    continue
                sources.remove(id(splits[name]))
                before = [output.name for output in splits[name].outputs]
                through = [n for n in names if n in before]
                if through != [n for n in before if n in through]:
                    yield GpuObstacle(
                        operation.op,
                        short_name(operation.name),
                        "the parts of a SPLIT come straight back in another order, which LiteRT's "
                        "GPU accelerator computes wrongly; use keras.ops.take",
                    )
        elif operation.op == "BATCH_MATMUL" and len(names) == 2 and names[0] == names[1]:
            yield GpuObstacle(
                operation.op,
                short_name(operation.name),
                "one tensor as both factors ends the process in LiteRT's GPU accelerator; "
                "add zero to one of them",
            )


def _nodes(content: bytes, *, fused: bool) -> tuple[list[tuple[str, set[int]]], list[set[int]]]:
    """The model's operations with the tensors they write, and what each delegate node writes."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        with captured_output():
            interpreter = Interpreter(
                model_content=content,
                num_threads=1,
                experimental_disable_delegate_node_fusion=not fused,
            )
            interpreter.allocate_tensors()
            # private, but the only way from Python to the nodes that really run
            details: list[dict[str, Any]] = interpreter._get_ops_details()
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            f"Expected a model that LiteRT can run. It refuses this one: {error}. "
            "Try another quantize."
        ) from error
    operations: list[tuple[str, set[int]]] = []
    delegated: list[set[int]] = []
    for node in details:
        outputs = {int(index) for index in node["outputs"]}
        if node["op_name"] == "DELEGATE":
            delegated.append(outputs)
        else:
            operations.append((str(node["op_name"]), outputs))
    return operations, delegated


def _frozen(counts: Counter[str]) -> Mapping[str, int]:
    return dict(sorted(counts.items(), key=lambda i: (-i[1], i[0])))
