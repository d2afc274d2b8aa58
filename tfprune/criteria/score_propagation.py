r"""Scores of a call's outputs, handed down to its inputs through absolute weights.

For one layer :math:`y = \sigma(W x + b)` whose activation changes no difference by more than its
size, :math:`s_x = |W|^\top s_y` bounds what an error of x does to y. In general a call hands down
the product of its outputs' scores with the transposed Jacobian of its *absolute twin*:

- convolutions and dense layers: the same layer with :math:`|W|`, without bias and activation;
- batch normalisation: :math:`|\gamma| / \sqrt{\sigma^2 + \epsilon}`;
- activations, dropout: as they are, nothing changes;
- max pooling: every input of a window receives the window's score, the sum over its windows;
- sums, concatenations, padding, flattening, average pooling: their own Jacobian, which has no
  negative entry;
- products of tensors (squeeze-and-excitation gates): for each factor, the mean absolute value of
  the others on the data;
- everything else (attention, recurrent layers, layer normalisation, softmax, wrappers): the
  absolute value of the product with the call's own Jacobian at some examples, their mean.

The last two are ours; the others are those of NISP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tfprune.graph.evaluate import run_call
from tfprune.graph.remake import remake
from tfprune.graph.rules import convolution, dense, elementwise, find_rule, normalization, reduction
from tfprune.graph.rules import reshape as reshapes
from tfprune.graph.rules import selection as selections
from tfprune.graph.trace import Call, symbol_of

Array = NDArray[Any]
Way = Callable[[Sequence[Array | None]], list[Array | None]]
"""From scores of a call's outputs to those of its inputs; ``None`` stands for zeros.

Each has its tensor's shape for a batch of one.
"""

Kind = Literal["kernel", "scale", "pass", "maximum", "product", "linear", "data"]

_KERNELS = (
    convolution.convolution,
    convolution.transposed_convolution,
    convolution.depthwise_convolution,
    convolution.separable_convolution,
    dense.dense,
    dense.einsum_dense,
)
_LINEAR = (
    reduction.spatial,
    reduction.global_pooling,
    reshapes.reshape,
    reshapes.rearrange,
    reshapes.flatten,
    reshapes.permute,
    reshapes.expand_dims,
    selections.concat,
    selections.stack,
    selections.unstack,
    selections.split,
    selections.get_item,
    selections.pad,
)
_SUMS = frozenset(["add", "addv2", "average", "subtract", "repeatvector", "mean", "reducemean"])
_PRODUCTS = frozenset(["multiply", "mul"])
# Functions of one value whose slope is at most about one.
_CONTRACTIONS = frozenset(
    [
        "abs", "absolute", "cast", "celu", "converttotensor", "copy", "elu", "gelu", "hardsigmoid",
        "hardsilu", "hardswish", "hardtanh", "identity", "leakyrelu", "logsigmoid", "neg",
        "negative", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softsign",
        "stopgradient", "swish", "tanh",
    ]
)  # fmt: skip


def kind_of(call: Call) -> Kind:
    """How a call hands scores down; ``"data"`` and ``"product"`` need its inputs on data."""
    op = call.op
    rule, _ = find_rule(op)
    name = _name(op)
    if rule in _KERNELS:
        return "kernel"
    if rule is normalization.batch_normalization:
        return "scale"
    if rule is elementwise:
        activation = getattr(getattr(op, "activation", None), "__name__", "")
        is_layer = hasattr(op, "weights") and symbol_of(op) is None
        known = activation != "softmax" if is_layer else name in _CONTRACTIONS
        return "pass" if known and len(call.inputs) == 1 else "data"
    if rule in (reduction.spatial, reduction.global_pooling) and "max" in name:
        is_global = rule is reduction.global_pooling
        return "maximum" if is_global or hasattr(op, "pool_size") else "data"
    if name in _PRODUCTS and len(call.inputs) > 1:
        return "product"
    if rule is not None and (rule in _LINEAR or (name in _SUMS and len(call.outputs) == 1)):
        return "linear"
    return "data"


def way_back(call: Call, points: Sequence[Sequence[Any]]) -> Way:
    """How this call hands scores down.

    Args:
        call: of an operation that is no model.
        points: values of the call's inputs for a batch of one, at which Jacobians are taken: some
            examples for ``"data"``, means of absolute values for ``"product"``; for all other kinds
            only the shapes of the first count.
    """
    kind = kind_of(call)
    if kind == "pass":
        return lambda scores: [scores[0]]
    if kind == "scale":
        factor = _normalization_scale(call.op, np.ndim(points[0][0]))
        return lambda scores: [None if scores[0] is None else scores[0] * factor]
    if kind == "data" or kind == "product":
        return _pulled(lambda tensors: run_call(call, tensors), points)
    flat = [np.broadcast_to(np.zeros((), _dtype(v)), np.shape(v)) for v in points[0]]
    if kind == "linear":
        return _pulled(lambda tensors: run_call(call, tensors), [flat])
    if kind == "maximum":
        return _pulled(lambda tensors: [_window_sums(call.op, tensors[0])], [flat])
    twin = _absolute(call.op, flat[0].shape)
    return _pulled(lambda tensors: [twin(tensors[0])], [flat])


def _pulled(function: Callable[[list[Any]], list[Any]], points: Sequence[Sequence[Any]]) -> Way:
    """The mean, over points, of absolute products with the transposed Jacobian."""
    import tensorflow as tf

    def way(scores: Sequence[Array | None]) -> list[Array | None]:
        total: list[Array | None] = [None] * len(points[0])
        for point in points:
            tensors = [tf.convert_to_tensor(value) for value in point]
            sources = [n for n, tensor in enumerate(tensors) if tensor.dtype.is_floating]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([tensors[n] for n in sources])
                outputs = function(tensors)
            targets = [
                (output, tf.cast(tf.constant(score), output.dtype))
                for output, score in zip(outputs, scores, strict=True)
                if score is not None and output.dtype.is_floating
            ]
            found = tape.gradient(
                [output for output, _ in targets],
                [tensors[n] for n in sources],
                output_gradients=[score for _, score in targets],
            )
            for n, gradient in zip(sources, found, strict=True):
                if gradient is not None:
                    part = np.abs(np.asarray(tf.convert_to_tensor(gradient), np.float64))
                    known = total[n]
                    total[n] = part if known is None else known + part
        return [None if part is None else part / len(points) for part in total]

    return way


def _absolute(layer: Any, shape: Sequence[int]) -> Any:
    """The layer with absolute kernels, without bias and activation, in float32."""

    def plain(config: dict[str, Any]) -> dict[str, Any]:
        # Fixed initial values: the random numbers are the user's.
        initial = {key: "zeros" for key in config if key.endswith("initializer")}
        bias = {"bias_axes": None} if "bias_axes" in config else {"use_bias": False}
        return {**config, **initial, **bias, "activation": None, "dtype": "float32"}

    twin = remake(layer, plain)
    twin.build(tuple(shape))
    kernels = [weight for weight in layer.weights if weight is not layer.bias]
    twin.set_weights([np.abs(np.asarray(kernel).astype(np.float32)) for kernel in kernels])
    return twin


def _normalization_scale(layer: Any, rank: int) -> Array:
    axes = np.ravel(np.asarray(layer.axis)) % rank
    variance = np.asarray(layer.moving_variance).astype(np.float64)
    scale = 1 / np.sqrt(variance + layer.epsilon)
    gamma = getattr(layer, "gamma", None)
    if gamma is not None:
        scale = scale * np.abs(np.asarray(gamma).astype(np.float64))
    shape = [1] * rank
    for axis, size in zip(axes, np.shape(scale), strict=True):
        shape[axis] = size
    return np.asarray(scale.reshape(shape))


def _window_sums(layer: Any, tensor: Any) -> Any:
    """Sums over the windows of a max pooling, which hand every input its windows' scores."""
    import tensorflow as tf

    rank = len(tensor.shape)
    first = layer.data_format == "channels_first"
    pool = getattr(layer, "pool_size", None)
    if pool is None:  # over all positions
        axes = [a for a in range(1, rank) if a != (1 if first else rank - 1)]
        return tf.reduce_sum(tensor, axes, keepdims=bool(layer.keepdims))
    dimensions = rank - 2
    pool = [pool] * dimensions if isinstance(pool, int) else list(pool)
    strides = layer.strides or pool
    strides = [strides] * dimensions if isinstance(strides, int) else list(strides)
    # Channels take the place of the batch, and the windows one of a convolution with ones.
    order = [1, *range(2, rank), 0] if first else [rank - 1, *range(1, rank - 1), 0]
    moved = tf.transpose(tensor, order)
    ones = tf.ones([*pool, 1, 1], tensor.dtype)
    form = {1: "NWC", 2: "NHWC", 3: "NDHWC"}[dimensions]
    sums = tf.nn.convolution(moved, ones, strides, layer.padding.upper(), data_format=form)
    back = [rank - 1, 0, *range(1, rank - 1)] if first else [rank - 1, *range(1, rank - 1), 0]
    return tf.transpose(sums, back)


def _dtype(value: Any) -> Any:
    kind = np.asarray(value).dtype
    return kind if kind.kind in "iub" else np.float32


def _name(op: Any) -> str:
    """In small letters without underscores: of the class, or of TensorFlow's function."""
    symbol = symbol_of(op)
    name = type(op).__name__ if symbol is None else symbol.rpartition(".")[2]
    return name.replace("_", "").lower()
