"""A Keras model as XNNPACK would see it after conversion."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import numpy as np

from tfprune.graph.trace import Call, Ref, is_model, leaves, trace
from tfprune.sparse_path.clusters import judge
from tfprune.sparse_path.nodes import Kind, Network, Node, Window, same_padding
from tfprune.sparse_path.report import SparsePathReport


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What the converter makes one or more unary operations of. A softplus, a hard sigmoid or a SELU
# leaves additions of constants behind.
_ACTIVATIONS = _words(
    """
    relu relu6 leaky_relu elu sigmoid tanh silu swish hard_silu hard_swish exponential gelu
    """
)
_NOTHING = frozenset({"linear", "Dropout", "SpatialDropout2D", "GaussianNoise", "Identity"})
_UNARY_OPS = _words(
    """
    Abs Ceil Cos Elu Exp Floor Gelu HardSilu LeakyRelu Log Negative Relu Relu6 Round Rsqrt Sign
    Sigmoid Silu Sin Sqrt Square Tanh Absolute
    """
)


def keras_sparse_path(model: Any, *, sparsity: float | None = None) -> SparsePathReport:
    """Whether XNNPACK would compute a model sparsely on a phone, before it is converted.

    Args:
        model: A functional or sequential model of Keras 3 or tf_keras. Pruning wrappers are looked
            through.
        sparsity: The fraction of zeros that ``Conv2D`` and ``Dense`` layers are going to have;
            ``None`` counts those that they have.

    Returns:
        The verdict, with the first layer in the way. It is ``"sparse"`` only if the exported file's
        is; where the converter finds something simpler (a multiplication by a number that it draws
        into a convolution, say) it may be stricter than :func:`tfprune.litert.sparse_path`, and
        call ``"broken"`` what is dense or sparse.

    Raises:
        ModelError: A subclassed or unbuilt model.
    """
    return judge(keras_network(model, sparsity=sparsity)[0])


def keras_network(
    model: Any, *, sparsity: float | None = None
) -> tuple[Network, Mapping[str, Any]]:
    """The operations of a model as records; arguments as for :func:`keras_sparse_path`.

    Dropout and batch normalisation that the converter folds into a convolution are left out.

    Returns:
        The records, and the layers by the paths that the records call them by.
    """
    found = _Found(sparsity)
    outputs = found.walk(model, None, (), "")
    return Network(tuple(_without_keep_dims(found.nodes, outputs)), outputs), found.layers


def _without_keep_dims(nodes: list[Node], outputs: frozenset[Hashable]) -> Iterator[Node]:
    """The converter makes one operation of a mean with keepdims and the flattening behind it."""
    flattened: dict[Hashable, Node] = {}
    for node in nodes:
        readers = [n for n in nodes if set(node.outputs).intersection(n.inputs)]
        flat = len(readers) == 1 and readers[0].operator == "flatten"
        if (
            node.kind == "mean"
            and node.keep_dims
            and flat
            and not outputs.intersection(node.outputs)
        ):
            flattened[node.outputs[0]] = node
    for node in nodes:
        if node.inputs and node.inputs[0] in flattened:
            mean = flattened[node.inputs[0]]
            yield Node("mean", mean.layer, mean.what, mean.inputs, node.outputs, axes=mean.axes)
        elif not (node.outputs and node.outputs[0] in flattened):
            yield node


class _Found:
    """The operations found so far."""

    def __init__(self, sparsity: float | None) -> None:
        self.nodes: list[Node] = []
        self.same: dict[Hashable, Hashable] = {}  # tensors that conversion makes one of
        self.sparsity = sparsity
        self.layers: dict[str, Any] = {}

    def key(self, ref: Ref, path: tuple[Hashable, ...]) -> Hashable:
        tensor: Hashable = (*path, ref.key)
        while tensor in self.same:
            tensor = self.same[tensor]
        return tensor

    def walk(
        self, model: Any, given: list[Hashable] | None, path: tuple[Hashable, ...], prefix: str
    ) -> frozenset[Hashable]:
        """Adds a model's operations; the keys of its outputs."""
        traced = trace(model)
        if given is not None:
            for ref, tensor in zip(traced.inputs, given, strict=True):
                self.same[(*path, ref.key)] = tensor
        for number, call in enumerate(traced.calls):
            inputs = [self.key(ref, path) for ref in call.inputs]
            if is_model(call.op):
                inner = (*path, number)
                self.walk(call.op, inputs, inner, f"{prefix}{call.op.name}/")
                for mine, its in zip(call.outputs, trace(call.op).outputs, strict=True):
                    self.same[(*path, mine.key)] = self.key(its, inner)
                continue
            self.add(call, inputs, path, prefix)
        return frozenset(self.key(ref, path) for ref in traced.outputs)

    def add(
        self, call: Call, inputs: list[Hashable], path: tuple[Hashable, ...], prefix: str
    ) -> None:
        layer = call.op
        place = f"{prefix}{getattr(layer, 'name', type(layer).__name__)}"
        self.layers[place] = layer
        while getattr(layer, "is_pruning_wrapper", False) or (
            type(layer).__name__ == "PruneLowMagnitude"
        ):
            layer = layer.layer
        outputs: list[Hashable] = [(*path, ref.key) for ref in call.outputs]
        what = type(layer).__name__
        shape = call.inputs[0].shape if call.inputs else ()
        if len(inputs) == 1 and self._vanishes(layer, what, inputs[0]):
            self.same[outputs[0]] = inputs[0]
            return
        steps = _steps(layer, what, call)
        if getattr(layer, "data_format", None) == "channels_first":
            steps = [("other", _hint("it is channels-first", "Build it channels-last"))]
        activation = _name(getattr(layer, "activation", None))
        if what != "Activation" and activation not in ("", "linear"):
            steps.append(_activation(activation))
        tensor = inputs
        for number, (kind, attributes) in enumerate(steps):
            last = number == len(steps) - 1
            made: list[Hashable] = outputs if last else [(*outputs, number)]
            self.nodes.append(self._node(kind, place, what, tensor, made, shape, attributes))
            tensor = made

    def _node(
        self,
        kind: Kind,
        name: str,
        what: str,
        inputs: list[Hashable],
        outputs: list[Hashable],
        shape: tuple[int | None, ...],
        attributes: dict[str, Any],
    ) -> Node:
        kernel = attributes.pop("weights", None)
        parameters, zeros = 0, 0
        if kernel is not None:
            parameters = int(np.prod(kernel.shape))
            zeros = parameters - int(np.count_nonzero(kernel.numpy()))
            if self.sparsity is not None and what != "SeparableConv2D":
                zeros = round(self.sparsity * parameters)
        return Node(
            kind,
            name,
            what,
            # a product of a tensor with itself is a square
            tuple(dict.fromkeys(inputs)) if kind == "unary" else tuple(inputs),
            tuple(outputs),
            rank=len(shape),
            zeros=zeros,
            parameters=parameters,
            **attributes,
        )

    def _vanishes(self, layer: Any, what: str, tensor: Hashable) -> bool:
        """Whether nothing is left of a layer after conversion."""
        if what in _NOTHING or (what == "Activation" and _name(layer.activation) == "linear"):
            return True
        if what != "BatchNormalization":
            return False
        axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
        maker = next((n for n in self.nodes if tensor in n.outputs), None)
        return list(axes) in ([-1], [3]) and maker is not None and maker.window is not None


_Step = tuple[Kind, dict[str, Any]]


def _steps(layer: Any, what: str, call: Call) -> list[_Step]:
    """What the converter makes of a layer or operation, without its activation."""
    maker = _MAKERS.get(what)
    if maker is not None:
        return [*maker(layer, call)]
    if what in _UNARY_OPS:
        return [("unary", {})]
    return [("other", {})]


def _hint(reason: str, remedy: str) -> dict[str, Any]:
    return {"hint": (reason, remedy)}


def _activation(name: str) -> _Step:
    if name in _ACTIVATIONS:
        return "unary", {}
    return "other", _hint(
        f"its activation {name!r} is no operation of the sparse path",
        "Use relu, relu6, leaky_relu, elu, sigmoid, tanh, silu or hard_silu",
    )


def _name(activation: Any) -> str:
    """The name of an activation function, or of an activation layer used as one."""
    if activation is None:
        return ""
    named = getattr(activation, "__name__", None) or getattr(activation, "name", "")
    return str(named or type(activation).__name__)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1]))


def _window(layer: Any, call: Call, groups: int = 1, multiplier: int = 1) -> Window:
    kernel, strides = _pair(layer.kernel_size), _pair(layer.strides)
    dilation = _pair(layer.dilation_rate)
    same = layer.padding == "same"
    return Window(
        kernel,
        strides,
        dilation,
        same_padding(kernel, strides, dilation) if same else (0, 0, 0, 0),
        int(call.inputs[0].shape[-1] or 0),
        groups,
        multiplier,
    )


def _conv(layer: Any, call: Call) -> Iterator[_Step]:
    yield "conv", {"window": _window(layer, call, groups=layer.groups), "weights": layer.kernel}


def _depthwise(layer: Any, call: Call) -> Iterator[_Step]:
    yield "depthwise", {"window": _window(layer, call, multiplier=layer.depth_multiplier)}


def _separable(layer: Any, call: Call) -> Iterator[_Step]:
    yield from _depthwise(layer, call)
    pointwise = Window((1, 1), (1, 1), (1, 1), (0, 0, 0, 0), layer.pointwise_kernel.shape[2])
    yield "conv", {"window": pointwise, "weights": layer.pointwise_kernel}


def _dense(layer: Any, call: Call) -> Iterator[_Step]:
    rank = len(call.inputs[0].shape)
    yield "dense", {"weights": layer.kernel, "keep_dims": rank > 2}


def _pad(layer: Any, call: Call) -> Iterator[_Step]:
    (above, below), (left, right) = layer.padding
    yield "pad", {"padding": (int(above), int(below), int(left), int(right))}


def _mean(layer: Any, call: Call) -> Iterator[_Step]:
    yield "mean", {"axes": (1, 2), "keep_dims": bool(layer.keepdims)}


def _mean_op(op: Any, call: Call) -> Iterator[_Step]:
    rank = len(call.inputs[0].shape)
    axes = tuple(axis % rank for axis in (op.axis if op.axis is not None else range(rank)))
    yield "mean", {"axes": axes, "keep_dims": bool(op.keepdims)}


def _binary(operator: str) -> Callable[[Any, Call], Iterator[_Step]]:
    def steps(layer: Any, call: Call) -> Iterator[_Step]:
        given = leaves(call.args)
        operands = len(call.inputs)
        ranks = {len(ref.shape) for ref in call.inputs}
        if operands == 1:
            yield "binary", {"operator": operator, "constant": len(given) > 1}
        elif operands > 2 or len(ranks) > 1:
            # the converter makes a chain of more than two operands, all of them alike
            yield ("binary" if len(ranks) == 1 else "other"), {"operator": operator}
        elif operator == "multiplication" and call.inputs[0].key == call.inputs[1].key:
            yield "unary", {}
        else:
            yield "binary", {"operator": operator}

    return steps


def _upsampling(layer: Any, call: Call) -> Iterator[_Step]:
    if layer.interpolation != "bilinear":
        yield (
            "other",
            _hint(
                f"it enlarges by {layer.interpolation!r} interpolation",
                "Use interpolation='bilinear'",
            ),
        )
        return
    height, width = call.inputs[0].shape[1:3]
    yield "resize", {"size": (int(height or 0), int(width or 0))}


def _relu(layer: Any, call: Call) -> Iterator[_Step]:
    if getattr(layer, "threshold", 0):
        yield "other", _hint("a ReLU with a threshold", "Use threshold=0")
    else:
        yield "unary", {}


def _reshape(layer: Any, call: Call) -> Iterator[_Step]:
    yield "other", {"operator": "flatten" if len(call.outputs[0].shape) == 2 else ""}


def _unary(layer: Any, call: Call) -> Iterator[_Step]:
    yield "unary", {}


def _activation_layer(layer: Any, call: Call) -> Iterator[_Step]:
    yield _activation(_name(layer.activation))


def _batch_normalization(layer: Any, call: Call) -> Iterator[_Step]:
    yield "binary", {"operator": "multiplication", "constant": True}


_MAKERS: dict[str, Callable[[Any, Call], Iterator[_Step]]] = {
    "Conv2D": _conv,
    "DepthwiseConv2D": _depthwise,
    "SeparableConv2D": _separable,
    "Dense": _dense,
    "ZeroPadding2D": _pad,
    "GlobalAveragePooling2D": _mean,
    "Mean": _mean_op,
    "Sum": _mean_op,
    "Clip": _unary,
    "Flatten": _reshape,
    "Reshape": _reshape,
    "Add": _binary("addition"),
    "Multiply": _binary("multiplication"),
    "UpSampling2D": _upsampling,
    "ReLU": _relu,
    "LeakyReLU": _unary,
    "ELU": _unary,
    "Activation": _activation_layer,
    "BatchNormalization": _batch_normalization,
}
