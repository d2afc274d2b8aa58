"""Sparse LiteRT files: which tensors are encoded, and what XNNPACK would make of them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tfprune.errors import FileError
from tfprune.litert.delegates import left_by_xnnpack
from tfprune.litert.flatbuffer import read_graph
from tfprune.litert.report import SparseTensor
from tfprune.sparse_path import Kind, Network, Node, SparsePathReport, Window, judge, same_padding


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UNARY = _words(
    """
    ABS CEIL COS ELU EXP FLOOR GELU HARD_SWISH LEAKY_RELU LOG LOGISTIC NEG RELU RELU6 RELU_N1_TO_1
    RELU_0_TO_1 ROUND RSQRT SIGN SIN SQRT SQUARE TANH
    """
)
_WEIGHTED = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"})
_FLOATS = frozenset({"float32", "float16"})


def sparse_path(file: str | os.PathLike[str] | bytes) -> SparsePathReport:
    """Whether XNNPACK, LiteRT's CPU delegate, would compute a file sparsely on a phone.

    It follows XNNPACK's own search (see :mod:`tfprune.sparse_path.clusters` for what was read and
    what was measured). Nothing is run: the sparse path does not exist on a processor with AVX.

    Args:
        file: A ``.tflite`` file, or its bytes.

    Returns:
        The verdict, the first layer in the way, and the remedy.

    Raises:
        FileError: The file cannot be read.
        ModelError: It is no LiteRT model.
        ExportError: LiteRT refuses it.
    """
    return judge_file(_content(file))


def judge_file(content: bytes, layers: Collection[str] = ()) -> SparsePathReport:
    """As :func:`sparse_path`; ``layers`` are the names of the Keras model's layers."""
    graph = read_graph(content)
    if not any(o.op == "DENSIFY" for o in graph.operations):
        return SparsePathReport(
            "dense",
            "",
            "the file stores all weights densely",
            "Export with sparse=True; XNNPACK does not look for zeros in a dense file",
            (),
            0,
            0,
        )
    return judge(_network(content, layers))


def encoded_tensors(content: bytes, layers: Collection[str] = ()) -> tuple[SparseTensor, ...]:
    """The tensors that a file stores in a sparse encoding, in the file's order."""
    return tuple(
        SparseTensor(
            layer_in(tensor.name, layers), tensor.shape, tensor.zeros / max(1, tensor.size), block
        )
        for tensor, block in _File(content).sparse()
    )


def weight_sparsity(content: bytes) -> float:
    """The fraction of zeros among the kernels of convolutions and dense layers of a file."""
    file = _File(content)
    kernels = {tensor.index: tensor for tensor in file.kernels()}
    size = sum(tensor.size for tensor in kernels.values())
    return sum(tensor.zeros for tensor in kernels.values()) / size if size else 0.0


def layer_in(name: str, layers: Collection[str] = ()) -> str:
    """The Keras layer that a tensor's name mentions; the name itself where there is none."""
    for path in reversed(name.split(";")):
        for scope in reversed(path.split("/")):
            plain = scope if scope in layers else re.sub(r"_\d+$", "", scope)
            if plain in layers:
                return plain
    return name.rsplit(";", 1)[-1]


def _content(file: str | os.PathLike[str] | bytes) -> bytes:
    if isinstance(file, bytes):
        return file
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise FileError(
            f"Cannot read {os.fspath(file)!r}: {error.strerror or error}. "
            "Expected a .tflite file, as tfprune.export writes it."
        ) from error


class _Tensor:
    """One tensor of the main graph, with the numbers in it."""

    def __init__(self, file: _File, index: int) -> None:
        raw = file.subgraph.Tensors(index)
        self.index = index
        self.raw = raw
        self.name = (raw.Name() or b"").decode("utf-8", "replace")
        self.shape = tuple(raw.Shape(i) for i in range(raw.ShapeLength()))
        self.size = int(np.prod(self.shape))
        self.dtype = file.types[raw.Type()]
        self.data = file.data(raw)
        self.sparse = raw.Sparsity() is not None
        self.constant = self.data is not None or self.sparse

    @property
    def zeros(self) -> int:
        """How many elements are zero; a sparse encoding stores the others, and few zeros."""
        if self.data is None:
            return self.size if self.sparse else 0
        if self.dtype not in ("float32", "float16", "int8"):
            return 0
        return self.size - int(np.count_nonzero(self.data.view(self.dtype)))


class _File:
    """The main graph of a LiteRT file, with options and weights."""

    def __init__(self, content: bytes) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema = schema
        self.content = np.frombuffer(content, np.uint8)
        self.model = schema.Model.GetRootAs(content, 0)
        self.subgraph = self.model.Subgraphs(0)
        self.types = {
            v: k.lower() for k, v in vars(schema.TensorType).items() if isinstance(v, int)
        }
        self.ops = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
        self.tensors = [_Tensor(self, i) for i in range(self.subgraph.TensorsLength())]
        self.unpacked: dict[int, int] = {}  # what DENSIFY and DEQUANTIZE make of stored tensors
        for op, _, reads, writes in self.operators():
            if op in ("DENSIFY", "DEQUANTIZE") and self.source(reads[0]).constant:
                self.unpacked[writes[0]] = self.unpacked.get(reads[0], reads[0])

    def data(self, tensor: Any) -> Any:
        buffer = self.model.Buffers(tensor.Buffer())
        if buffer is None:
            return None
        if buffer.DataLength():
            return buffer.DataAsNumpy()
        if buffer.Offset() > 1:  # files of more than 2 GB keep data behind the flatbuffer
            return self.content[buffer.Offset() : buffer.Offset() + buffer.Size()]
        return None

    def operators(self) -> Iterator[tuple[str, Any, list[int], list[int]]]:
        """Each operation's name, itself, and the indices of what it reads and writes."""
        for index in range(self.subgraph.OperatorsLength()):
            operator = self.subgraph.Operators(index)
            code = self.model.OperatorCodes(operator.OpcodeIndex())
            number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
            reads = [operator.Inputs(i) for i in range(operator.InputsLength())]
            writes = [operator.Outputs(i) for i in range(operator.OutputsLength())]
            yield self.ops.get(number, f"OP_{number}"), operator, reads, writes

    def source(self, index: int) -> _Tensor:
        """The stored tensor behind one that is unpacked on loading."""
        return self.tensors[self.unpacked.get(index, index)]

    def kernels(self) -> Iterator[_Tensor]:
        for op, _, reads, _ in self.operators():
            if op in _WEIGHTED and self.source(reads[1]).constant:
                yield self.source(reads[1])

    def sparse(self) -> Iterator[tuple[_Tensor, tuple[int, ...]]]:
        """Sparse tensors, each with the sizes of its blocks, all 1 where there are none."""
        for tensor in self.tensors:
            parameters = tensor.raw.Sparsity()
            if parameters is None:
                continue
            block = [1] * len(tensor.shape)
            for number in range(parameters.BlockMapLength()):
                dimension = parameters.DimMetadata(len(tensor.shape) + number)
                block[parameters.BlockMap(number)] = dimension.DenseSize()
            yield tensor, tuple(block)

    def options(self, operator: Any, kind: str) -> Any:
        table = operator.BuiltinOptions()
        options = getattr(self.schema, kind)()
        options.Init(table.Bytes, table.Pos)
        return options


def _network(content: bytes, layers: Collection[str]) -> Network:
    file = _File(content)
    left = left_by_xnnpack(content)
    nodes: list[Node] = []
    part: dict[int, tuple[int, bool]] = {}
    for op, operator, reads, writes in file.operators():
        if writes[0] in file.unpacked:
            continue
        reads = [i for i in reads if i >= 0]
        moving = [i for i in reads if not file.source(i).constant]
        taken = not left.issuperset(writes)
        # the delegate gets operations in parts; one left to LiteRT's own kernels lies between two
        number = max(
            (p if was == taken else p + 1 for p, was in (part.get(i, (0, taken)) for i in moving)),
            default=0,
        )
        part.update((i, (number, taken)) for i in writes)
        kind, attributes = _attributes(file, op, operator, reads)
        nodes.append(
            Node(
                kind=kind,
                layer=layer_in(file.tensors[writes[0]].name, layers),
                what=op,
                inputs=tuple(dict.fromkeys(moving)) if kind == "unary" else tuple(moving),
                outputs=tuple(writes),
                rank=len(file.tensors[reads[0]].shape) if reads else 0,
                floats=all(file.source(i).dtype in _FLOATS for i in (*_values(op, reads), *writes)),
                part=2 * number + taken,
                **attributes,
            )
        )
    outputs = frozenset(file.subgraph.Outputs(i) for i in range(file.subgraph.OutputsLength()))
    return Network(tuple(nodes), outputs)


def _values(op: str, reads: list[int]) -> list[int]:
    """What an operation computes with, without the axes, paddings and sizes that it reads."""
    return reads[:1] if op in ("MEAN", "SUM", "PAD", "PADV2", "RESIZE_BILINEAR") else reads


def _attributes(
    file: _File, op: str, operator: Any, reads: list[int]
) -> tuple[Kind, dict[str, Any]]:
    """What XNNPACK makes of an operation, and what it looks at."""
    if op == "CONV_2D":
        return "conv", _convolution(file, operator, reads, depthwise=False)
    if op == "DEPTHWISE_CONV_2D":
        return "depthwise", _convolution(file, operator, reads, depthwise=True)
    if op == "FULLY_CONNECTED":
        kernel = file.source(reads[1])
        options = file.options(operator, "FullyConnectedOptions")
        keep = bool(options.KeepNumDims())
        return "dense", {"zeros": kernel.zeros, "parameters": kernel.size, "keep_dims": keep}
    if op == "MUL" and reads[0] == reads[1]:  # XNNPACK makes a square of it
        return "unary", {}
    if op in ("ADD", "MUL"):
        constant = any(file.source(i).constant for i in reads)
        ranks = {len(file.tensors[i].shape) for i in reads}
        name = "addition" if op == "ADD" else "multiplication"
        same = constant or len(ranks) == 1
        return ("binary" if same else "other"), {"operator": name, "constant": constant}
    if op in _UNARY or (op in ("MAXIMUM", "MINIMUM") and _scalar(file, reads)):
        return "unary", {}
    if op in ("MEAN", "SUM"):
        axes = file.source(reads[1]).data
        rank = len(file.tensors[reads[0]].shape)
        return "mean", {
            "axes": tuple(int(a) % rank for a in axes.view(np.int32)) if axes is not None else (),
            "keep_dims": bool(file.options(operator, "ReducerOptions").KeepDims()),
        }
    if op == "PAD":
        return "pad", {"padding": _pad(file, reads)}
    if op == "RESIZE_BILINEAR":
        return "resize", {"size": file.tensors[reads[0]].shape[1:3]}
    return ("depth_to_space" if op == "DEPTH_TO_SPACE" else "other"), {}


def _scalar(file: _File, reads: list[int]) -> bool:
    """Whether a maximum or minimum is one with a number, which XNNPACK takes as a clamp."""
    return any(file.source(i).constant and file.source(i).size == 1 for i in reads)


def _convolution(
    file: _File, operator: Any, reads: list[int], *, depthwise: bool
) -> dict[str, Any]:
    image, kernel = file.tensors[reads[0]], file.source(reads[1])
    options = file.options(operator, "DepthwiseConv2DOptions" if depthwise else "Conv2DOptions")
    size = (kernel.shape[1], kernel.shape[2])
    strides = (options.StrideH(), options.StrideW())
    dilation = (options.DilationHFactor(), options.DilationWFactor())
    same = options.Padding() == file.schema.Padding.SAME
    channels = image.shape[-1]
    window = Window(
        kernel=size,
        strides=strides,
        dilation=dilation,
        padding=same_padding(size, strides, dilation) if same else (0, 0, 0, 0),
        channels=channels,
        groups=1 if depthwise else channels // max(1, kernel.shape[3]),
        multiplier=kernel.shape[3] // max(1, channels) if depthwise else 1,
    )
    return {"window": window, "zeros": kernel.zeros, "parameters": kernel.size}


def _pad(file: _File, reads: list[int]) -> tuple[int, int, int, int] | None:
    data = file.source(reads[1]).data
    if data is None:
        return None
    values = data.view(file.source(reads[1]).dtype).reshape(-1, 2)
    if len(values) != 4 or values[0].any() or values[3].any():
        return None
    (above, below), (left, right) = values[1], values[2]
    return (int(above), int(below), int(left), int(right))
