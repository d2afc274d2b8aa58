"""Where at the end of a residual branch a factor on all of the branch can be."""

from __future__ import annotations

from typing import Any

from tfprune.graph import ChannelGraph
from tfprune.graph.blocks import Block
from tfprune.graph.trace import Call, Ref, Trace, attention_parts

# Operations through which a factor on the input is a factor on the output; through the others if it
# is not negative.
_LINEAR = (
    "Dropout", "SpatialDropout", "GaussianDropout", "Identity", "ZeroPadding", "Cropping",
    "AveragePooling", "GlobalAveragePooling", "UpSampling", "Reshape", "Permute", "Flatten",
)  # fmt: skip
_POSITIVE = ("MaxPooling", "GlobalMaxPooling", "LeakyReLU")
_CONVOLUTIONS = ("Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose",
                 "Conv3DTranspose", "DepthwiseConv1D", "DepthwiseConv2D", "Dense",
                 "EinsumDense")  # fmt: skip
_SEPARABLE = ("SeparableConv1D", "SeparableConv2D")
_NORMALISATIONS = ("BatchNormalization", "LayerNormalization", "GroupNormalization")


def end_of(graph: ChannelGraph, block: Block, *, positive: bool = True) -> tuple[list[Any], str]:
    """The weights at the end of a branch in which a factor on all of the branch can be.

    Args:
        graph: the analysed model.
        block: of this graph.
        positive: whether the factor is never negative.

    Returns:
        The weights and an empty string; or no weights, and why.
    """
    traced = _trace_of(graph, block.call)
    call = _maker(traced, block.call.inputs[block.operand])
    while _passes(call.op, positive) and len(call.inputs) == 1:
        before = _maker(traced, call.inputs[0])
        if before is None or _reads(traced, before.outputs[0]) != 1:
            return [], f"{call.op.name} is all that it ends in"
        call = before
    op = call.op
    uses = sum(other.op is op for each in graph.record.traces.values() for other in each.calls)
    if uses > 1:
        return [], f"{op.name} at its end is used elsewhere, too"
    weights = _affine(op, positive)
    if weights is None:
        return [], f"a factor cannot be on {op.name} at its end ({type(op).__name__})"
    if not all(variable.trainable for variable in weights):
        return [], f"{op.name} at its end does not train"
    return weights, ""


def _affine(op: Any, positive: bool) -> list[Any] | None:
    """The weights on which a factor is one on a layer's output; ``None`` if there are no such."""
    kind = type(op).__name__
    if kind == "MultiHeadAttention":
        return _affine(attention_parts(op).output, positive)
    if kind in _NORMALISATIONS:
        return None if op.gamma is None else [v for v in (op.gamma, op.beta) if v is not None]
    if kind in _CONVOLUTIONS or kind in _SEPARABLE:
        if not _is_homogeneous(op.activation, positive):
            return None
        kernel = op.pointwise_kernel if kind in _SEPARABLE else op.kernel
        return [v for v in (kernel, op.bias) if v is not None]
    return [op.gamma] if kind == "LayerScale" else None


def _passes(op: Any, positive: bool) -> bool:
    """Whether a factor on the input of an operation is one on its output."""
    kind = type(op).__name__
    if kind == "Activation":
        return _is_homogeneous(op.activation, positive)
    if kind == "ReLU":
        return positive and op.max_value is None and not op.threshold
    return kind.startswith(_LINEAR) or (positive and kind.startswith(_POSITIVE))


def _is_homogeneous(activation: Any, positive: bool) -> bool:
    name = getattr(activation, "__name__", "")
    return activation is None or name == "linear" or (positive and name == "relu")


def _trace_of(graph: ChannelGraph, call: Call) -> Trace:
    return next(
        traced
        for traced in graph.record.traces.values()
        if any(other is call for other in traced.calls)
    )


def _maker(traced: Trace, ref: Ref) -> Any:
    """The call that makes a tensor; ``None`` for an input."""
    makers = (call for call in traced.calls if any(out.key == ref.key for out in call.outputs))
    return next(makers, None)


def _reads(traced: Trace, ref: Ref) -> int:
    """How often a tensor is read."""
    inside = sum(other.key == ref.key for call in traced.calls for other in call.inputs)
    return inside + sum(other.key == ref.key for other in traced.outputs)
