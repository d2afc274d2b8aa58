r"""Residual branches: where a reader's output is added to other tensors.

He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017 (the
residual part; sheet step 6a): the sum matters, not the branch alone. With the branch's response
:math:`Y_2` and the shortcut :math:`Y_1` of the original network and the shortcut :math:`Y_1'` of
the present one, the target is :math:`Y_1 - Y_1' + Y_2`: the branch makes up for the drift of the
other summands.

Where a batch normalisation stands between the reader and the sum, the drift is divided by its scale
:math:`\gamma / \sqrt{\sigma^2 + \epsilon}`, which brings it into the reader's units. Outputs with a
scale below 1e-6 of the largest get no correction: the sum hardly sees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.criteria.reconstruction.readers import Reader
from tfprune.graph import ChannelGraph
from tfprune.graph.trace import Call, Ref, Trace, symbol_of

Vector = NDArray[np.float64]

_SMALLEST_SCALE = 1e-6


@dataclass(frozen=True, eq=False)
class Sum:
    """An addition of a reader's output.

    Attributes:
        call: ``id`` of the addition's call.
        others: which of its inputs the reader does not make.
        factor: shape (filters,): what the other summands' drift is multiplied by.
    """

    call: int
    others: tuple[int, ...]
    factor: Vector


def sum_behind(graph: ChannelGraph, reader: Reader) -> Sum | None:
    """The addition that a reader's output goes to, or ``None``.

    Directly, or through one batch normalisation, and nowhere else; a layer with an activation or
    with several calls is left out.
    """
    if len(reader.calls) != 1 or not _is_linear(reader.op):
        return None
    for traced in graph.record.traces.values():
        for call in traced.calls:
            if id(call) == reader.calls[0]:
                return _follow(traced, call, reader)
    return None


def _follow(traced: Trace, call: Call, reader: Reader) -> Sum | None:
    ref = call.outputs[0]
    factor = np.ones(int(reader.site.variable.shape[-1]))
    found = _only_reader(traced, ref)
    if found is not None and type(found.op).__name__ == "BatchNormalization":
        factor = _inverse(scale_of(found.op))
        ref = found.outputs[0]
        found = _only_reader(traced, ref)
    if found is None or not _adds(found.op):
        return None
    others = tuple(i for i, other in enumerate(found.inputs) if other.key != ref.key)
    same = all(other.shape == ref.shape for other in found.inputs)
    # A sum of a tensor with itself doubles it, which is no drift of another summand.
    return Sum(id(found), others, factor) if same and len(others) == len(found.inputs) - 1 else None


def scale_of(norm: Any) -> Vector:
    """What a batch normalisation multiplies by at inference, shape (channels,)."""
    variance = np.asarray(norm.moving_variance).astype(np.float64)
    gamma = 1.0 if norm.gamma is None else np.asarray(norm.gamma).astype(np.float64)
    return np.asarray(gamma / np.sqrt(variance + norm.epsilon))


def _inverse(scale: Vector) -> Vector:
    seen = np.abs(scale) >= _SMALLEST_SCALE * np.abs(scale).max(initial=0.0)
    seen &= scale != 0
    return np.where(seen, 1 / np.where(seen, scale, 1), 0)


def _only_reader(traced: Trace, ref: Ref) -> Call | None:
    """The call that alone takes a tensor; ``None`` if several do, or the model hands it out."""
    takers = [call for call in traced.calls if any(other.key == ref.key for other in call.inputs)]
    handed_out = any(other.key == ref.key for other in traced.outputs)
    return takers[0] if len(takers) == 1 and not handed_out else None


def _adds(op: Any) -> bool:
    symbol = symbol_of(op)
    if symbol is not None:
        return symbol in ("__operators__.add", "math.add")
    return type(op).__name__ == "Add"


def _is_linear(op: Any) -> bool:
    return op.activation is None or getattr(op.activation, "__name__", "") == "linear"
