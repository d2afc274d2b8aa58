"""Operations that act on every value by itself, and those that combine tensors element by element.

Labels pass through the former; the latter unite them position by position, with broadcasting.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfprune.errors import ModelError
from tfprune.graph.context import RuleCall, constant_array
from tfprune.graph.labels import AxisLabels, Keep, TensorLabels
from tfprune.graph.rules.registry import layer_rule, op_rule
from tfprune.graph.trace import Ref, framework_of, leaves, map_leaves


@layer_rule(
    "Activation", "ReLU", "LeakyReLU", "ELU", "ThresholdedReLU", "Identity", "Dropout",
    "AlphaDropout", "GaussianDropout", "GaussianNoise", "SpatialDropout1D", "SpatialDropout2D",
    "SpatialDropout3D", "ActivityRegularization",
)  # fmt: skip
@op_rule(
    "Absolute", "Abs", "Fabs", "Arccos", "Arccosh", "Arcsin", "Arcsinh", "Arctan", "Arctanh",
    "Cast", "Cbrt", "Ceil", "Celu", "ConvertToTensor", "Copy", "Cos", "Cosh", "Elu", "Erf", "Erfc",
    "Erfinv", "Exp", "Exp2", "Expm1", "Floor", "Gelu", "HardShrink", "HardSigmoid", "HardSilu",
    "HardTanh", "LeakyRelu", "Log", "Log10", "Log1p", "Log2", "LogSigmoid", "LogicalNot",
    "Angle", "BitwiseInvert", "BitwiseNot", "Conj", "Conjugate", "Deg2rad", "EmptyLike", "FullLike",
    "I0", "Imag", "Isfinite", "Isinf", "Isnan", "Isneginf", "Isposinf", "Isreal", "Digitize",
    "Negative", "NanToNum", "OnesLike", "Rad2deg", "Real", "Signbit", "Sinc",
    "Reciprocal", "Relu", "Relu6", "Round", "Rsqrt",
    "SaturateCast", "Selu", "Sigmoid", "Sign", "Silu", "Sin", "Sinh", "SoftShrink", "Softplus",
    "Softsign", "SparsePlus", "SparseSigmoid", "Sqrt", "Square", "Squareplus", "StopGradient",
    "Tan", "Tanh", "TanhShrink", "Threshold", "Trunc", "ZerosLike",
    symbols=(
        "abs", "math.abs", "cast", "math.ceil", "math.cos", "math.erf", "math.exp", "exp",
        "math.floor", "identity", "math.log", "math.negative", "__operators__.neg", "nn.elu",
        "nn.gelu", "nn.leaky_relu", "nn.relu", "nn.relu6", "nn.selu", "nn.sigmoid", "nn.silu",
        "nn.softplus", "nn.softsign", "nn.swish", "nn.tanh", "math.reciprocal", "math.round",
        "math.rsqrt", "math.sigmoid", "sigmoid", "math.sign", "math.sin", "math.softplus",
        "math.sqrt", "sqrt", "math.square", "square", "stop_gradient", "tanh", "math.tanh",
        "nn.dropout", "clip_by_value", "nn.hard_swish", "keras.activations.swish",
        "keras.activations.relu", "keras.activations.sigmoid", "keras.activations.tanh",
        "keras.activations.gelu", "keras.activations.hard_sigmoid", "keras.backend.relu",
    ),
)  # fmt: skip
def elementwise(call: RuleCall) -> TensorLabels:
    """Labels pass through."""
    activation = getattr(call.op, "activation", None)
    for labels in call.inputs[1:]:
        call.freeze(labels, f"an argument of {type(call.op).__name__}")
    if activation is not None:
        return through_activation(call, activation, call.inputs[0])
    return call.inputs[0]


@layer_rule("Masking")
def masking(call: RuleCall) -> TensorLabels:
    """A step is masked, and zeroed, if all its channels have one value: it looks at all of them."""
    call.freeze(call.inputs[0][-1], "Masking compares all channels with its value")
    return (*call.inputs[0][:-1], None)


# Functions of one value that layers are given as activations, of either framework or TensorFlow.
_ACTIVATIONS = frozenset(
    [
        "celu",
        "elu",
        "exp",
        "exponential",
        "gelu",
        "hard_shrink",
        "hard_sigmoid",
        "hard_silu",
        "hard_swish",
        "hard_tanh",
        "leaky_relu",
        "linear",
        "log_sigmoid",
        "mish",
        "relu",
        "relu6",
        "selu",
        "sigmoid",
        "silu",
        "sin",
        "soft_shrink",
        "softplus",
        "softsign",
        "sparse_plus",
        "sparse_sigmoid",
        "squareplus",
        "swish",
        "tanh",
        "tanh_shrink",
        "threshold",
    ]
)  # fmt: skip


def through_activation(call: RuleCall, activation: Any, labels: TensorLabels) -> TensorLabels:
    """The labels behind an activation function that a layer applies to its own output.

    Well-known functions act element by element. Others (softmax; a user's own) may mix channels:
    they freeze all axes. A layer in the place of a function has its rule.
    """
    if activation is None:
        return labels
    if framework_of(activation) is not None:
        # Keras 3 gives such a layer its weights when the model first runs, too late to fill them.
        late = framework_of(activation) == "keras" and hasattr(activation, "built")
        if late and (not activation.built or activation.variables):
            raise ModelError(
                f"Expected activations without weights. Received: {type(activation).__name__} "
                f"as the activation of {call.path!r}. Make it a layer of its own, behind it."
            )
        shape = call.output_shapes[0]
        return call.apply(activation, [labels], [shape], [shape], name="activation")[0]
    name = getattr(activation, "__name__", None) or type(activation).__name__
    root = str(getattr(activation, "__module__", "")).partition(".")[0]
    known = root in ("keras", "tf_keras", "tensorflow")
    if known and name.removesuffix("_v2") in _ACTIVATIONS:
        return labels
    call.freeze(
        labels,
        f"the activation {name!r} mixes the values of several channels" if known
        else f"the activation {name!r} is not a built-in one",
    )  # fmt: skip
    return tuple(None for _ in labels)


@layer_rule("PReLU")
def prelu(call: RuleCall) -> TensorLabels:
    """The slopes follow the channels; shared axes have size one."""
    labels = call.inputs[0]
    alpha = call.op.alpha
    follows = {
        axis: labels[axis + 1]
        for axis, size in enumerate(alpha.shape)
        if labels[axis + 1] is not None and int(size) != 1
    }
    call.weight(alpha, "alpha", follows=follows)
    return labels


@layer_rule("LayerScale")
def layer_scale(call: RuleCall) -> TensorLabels:
    """ConvNeXt's scale: one factor per channel."""
    labels = call.inputs[0]
    call.weight(call.op.gamma, "gamma", follows={0: labels[-1]})
    call.size("projection_dim", labels[-1])
    return labels


@layer_rule("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "CustomScaleLayer")
@op_rule(
    "Add", "Subtract", "Multiply", "Divide", "DivideNoNan", "TrueDivide", "FloorDivide", "Power",
    "Maximum", "Minimum", "Fmax", "Fmin", "Mod", "Fmod", "Arctan2", "Hypot", "Logaddexp", "Where",
    "Logaddexp2", "Equal", "NotEqual", "Greater", "GreaterEqual", "Less", "LessEqual",
    "LogicalAnd", "LogicalOr", "LogicalXor", "Clip", "BitwiseAnd", "BitwiseOr", "BitwiseXor",
    "BitwiseLeftShift", "BitwiseRightShift", "LeftShift", "RightShift", "Gcd", "Lcm", "Ldexp",
    "Heaviside", "Isclose", "Nextafter", "Polar",
    symbols=(
        "__operators__.add", "__operators__.radd", "__operators__.sub", "__operators__.rsub",
        "__operators__.mul", "__operators__.rmul", "__operators__.truediv",
        "__operators__.rtruediv", "__operators__.pow", "__operators__.mod", "math.add", "add",
        "math.subtract", "subtract",
        "math.multiply", "multiply", "math.divide", "divide", "math.truediv", "math.divide_no_nan",
        "math.maximum", "maximum", "math.minimum", "minimum", "math.pow", "pow", "where",
        "math.add_n", "math.squared_difference", "math.equal", "math.greater", "math.less",
        "math.greater_equal",
        "math.less_equal", "math.logical_and", "math.logical_or",
    ),
)  # fmt: skip
def combine(call: RuleCall) -> TensorLabels:
    """Unites the operands' labels, aligned at the last axis, with broadcasting."""
    rank = len(call.output_shapes[0])
    operands: list[tuple[TensorLabels, tuple[int | None, ...]]] = list(
        zip(call.inputs, call.input_shapes, strict=True)
    )
    output: list[AxisLabels] = []
    for axis in range(rank):
        from_end = axis - rank
        size = call.output_shapes[0][axis]
        merged: AxisLabels = None
        untracked = False
        for labels, shape in operands:
            if -from_end > len(shape):
                continue
            if shape[from_end] == 1 and size != 1:
                call.freeze(labels[from_end], "broadcast over the channels of another tensor")
                continue
            if labels[from_end] is None:
                untracked = True
            elif merged is None:
                merged = labels[from_end]
            else:
                call.unite(merged, labels[from_end])
        if untracked and merged is not None:
            call.freeze(merged, "meets a tensor whose channels cannot be removed")
            merged = None
        output.append(merged)
    _slice_constants(call, tuple(output))
    return tuple(output)


def _slice_constants(call: RuleCall, output: TensorLabels) -> None:
    """Constants and variables among the operands: cut with the channels, or freeze them."""
    rank = len(output)
    cuts: list[tuple[Any, int, AxisLabels]] = []
    for leaf in [*leaves(call.call.args), *leaves(call.call.kwargs)]:
        if isinstance(leaf, Ref) or leaf is None or isinstance(leaf, str):
            continue
        array = constant_array(leaf)
        shape = tuple(getattr(leaf, "shape", ())) if array is None else array.shape
        for axis in range(-len(shape), 0):
            if -axis > rank or output[axis] is None or int(shape[axis]) == 1:
                continue
            if array is None:
                call.freeze(output[axis], "combined with a variable outside of any layer")
            else:
                cuts.append((leaf, axis, output[axis]))
    if cuts:

        def rewrite(keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            def cut(leaf: Any) -> Any:
                for constant, axis, labels in cuts:
                    if leaf is constant and labels is not None:
                        value = constant_array(leaf)
                        leaf = np.compress(keep(labels), np.asarray(value), axis=axis)
                return leaf

            return map_leaves(cut, args), map_leaves(cut, kwargs)

        call.call_arguments(rewrite)
