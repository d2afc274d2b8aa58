"""What stands in a LiteRT model file: operations, tensors, signature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tfprune.errors import ModelError

_FILE_IDENTIFIER = b"TFL3"


@dataclass(frozen=True)
class Tensor:
    """One tensor of a graph.

    Attributes:
        name: As the converter wrote it; usually the path of a Keras layer.
        shape: Its axes; -1 where the size is known at run time only.
        dtype: Such as ``"float32"`` or ``"int8"``.
        constant: Whether the file holds its values.
        sparse: Whether they are stored in a sparse encoding.
        scale: Of a tensor quantised as a whole: ``value = scale * (integer - zero_point)``;
            0 for one that is not quantised, or quantised per channel.
        zero_point: See ``scale``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    constant: bool
    sparse: bool
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Operation:
    """One operation of a graph.

    Attributes:
        op: LiteRT's name, such as ``"CONV_2D"``; a custom operation's own name.
        inputs: The tensors it reads; an optional input that is absent is left out.
        outputs: The tensors it writes.
        custom: Whether it is no built-in operation of LiteRT.
    """

    op: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    custom: bool = False

    @property
    def name(self) -> str:
        """Where it comes from: the name of the first tensor it writes."""
        return self.outputs[0].name if self.outputs else ""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a model.

    Attributes:
        name: In the signature.
        shape: Static, the batch size first.
        dtype: Such as ``"float32"``.
        scale: ``value = scale * (integer - zero_point)``; 0 where nothing is quantised.
        zero_point: See ``scale``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float = 0.0
    zero_point: int = 0

    def __str__(self) -> str:
        text = f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"
        if self.scale:
            text += f", scale {self.scale:.6g}, zero point {self.zero_point}"
        return text


@dataclass(frozen=True)
class Graph:
    """The contents of a LiteRT model.

    Attributes:
        operations: Of all subgraphs, the main one first, in the order they run.
        inputs: Of the signature, in the order of the main subgraph's inputs.
        outputs: Likewise.
        signature: The signature's key; empty where the file has none.
    """

    operations: tuple[Operation, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    signature: str

    def counts(self) -> Mapping[str, int]:
        """How often each operation occurs, the most frequent first."""
        counted = Counter(operation.op for operation in self.operations)
        return dict(sorted(counted.items(), key=lambda i: (-i[1], i[0])))


def read_graph(content: bytes) -> Graph:
    """Reads a LiteRT model.

    Raises:
        ModelError: ``content`` is not a LiteRT model.
    """
    if content[4:8] != _FILE_IDENTIFIER:
        raise ModelError(
            "Expected a LiteRT model (a .tflite file). "
            f"Received {len(content)} bytes without its mark {_FILE_IDENTIFIER.decode()!r}."
        )
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(content, 0)
    op_names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    type_names = {v: k.lower() for k, v in vars(schema.TensorType).items() if isinstance(v, int)}
    codes = [_op_name(model.OperatorCodes(i), op_names) for i in range(model.OperatorCodesLength())]

    operations: list[Operation] = []
    tensors_of: list[list[Tensor]] = []
    for number in range(model.SubgraphsLength()):
        subgraph = model.Subgraphs(number)
        tensors = [
            _tensor(model, subgraph.Tensors(i), type_names) for i in range(subgraph.TensorsLength())
        ]
        tensors_of.append(tensors)
        for index in range(subgraph.OperatorsLength()):
            operator = subgraph.Operators(index)
            op, custom = codes[operator.OpcodeIndex()]
            reads = [operator.Inputs(i) for i in range(operator.InputsLength())]
            writes = [operator.Outputs(i) for i in range(operator.OutputsLength())]
            operations.append(
                Operation(
                    op,
                    tuple(tensors[i] for i in reads if i >= 0),
                    tuple(tensors[i] for i in writes if i >= 0),
                    custom,
                )
            )
    inputs, outputs, key = _ports(model, tensors_of[0])
    return Graph(tuple(operations), inputs, outputs, key)


def _op_name(code: Any, names: Mapping[int, str]) -> tuple[str, bool]:
    # files written before there were more than 127 operations have only the older, short field
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    name = names.get(number, f"OP_{number}")
    if name == "CUSTOM":
        return (code.CustomCode() or b"CUSTOM").decode(), True
    return name, False


def _tensor(model: Any, tensor: Any, types: Mapping[int, str]) -> Tensor:
    static = [tensor.Shape(i) for i in range(tensor.ShapeLength())]
    open_axes = [tensor.ShapeSignature(i) for i in range(tensor.ShapeSignatureLength())]
    quantization = tensor.Quantization()
    scale, zero_point = 0.0, 0
    if quantization is not None and quantization.ScaleLength() == 1:
        scale = float(quantization.Scale(0))
        zero_point = int(quantization.ZeroPoint(0)) if quantization.ZeroPointLength() else 0
    buffer = model.Buffers(tensor.Buffer())
    return Tensor(
        name=(tensor.Name() or b"").decode("utf-8", "replace"),
        shape=tuple(open_axes or static),
        dtype=types.get(tensor.Type(), str(tensor.Type())),
        constant=bool(buffer is not None and (buffer.DataLength() or buffer.Offset() > 1)),
        sparse=tensor.Sparsity() is not None,
        scale=scale,
        zero_point=zero_point,
    )


def _ports(
    model: Any, tensors: list[Tensor]
) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...], str]:
    main = model.Subgraphs(0)
    reads = [main.Inputs(i) for i in range(main.InputsLength())]
    writes = [main.Outputs(i) for i in range(main.OutputsLength())]
    if not model.SignatureDefsLength():
        named_reads = [(i, tensors[i].name) for i in reads]
        named_writes = [(i, tensors[i].name) for i in writes]
        key = ""
    else:
        signature = model.SignatureDefs(0)
        key = (signature.SignatureKey() or b"").decode()
        entries = [signature.Inputs(i) for i in range(signature.InputsLength())]
        named_reads = [(entry.TensorIndex(), entry.Name().decode()) for entry in entries]
        entries = [signature.Outputs(i) for i in range(signature.OutputsLength())]
        named_writes = [(entry.TensorIndex(), entry.Name().decode()) for entry in entries]

    def info(index: int, name: str) -> TensorInfo:
        tensor = tensors[index]
        return TensorInfo(name, tensor.shape, tensor.dtype, tensor.scale, tensor.zero_point)

    return (
        tuple(info(*port) for port in sorted(named_reads, key=lambda port: reads.index(port[0]))),
        tuple(info(*port) for port in sorted(named_writes, key=lambda port: writes.index(port[0]))),
        key,
    )
