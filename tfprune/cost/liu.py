"""The FLOPs of Liu et al., by which Scratch-B training is sized."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tfprune.cost.model import CostModel
from tfprune.graph import analyse
from tfprune.graph.trace import Call, Trace, is_model, symbol_of

_RECTIFIERS = ("relu", "relu6")


def liu_flops(model: Any, *, input_shape: Any = None) -> int:
    """Operations of one example, counted as *Rethinking the Value of Network Pruning* does.

    For an output of ``m`` channels and ``h w`` positions:

    | layer | operations |
    |---|---|
    | convolution, kernel ``k k``, ``n`` inputs, ``g`` groups | ``(2 k k n / g + bias) m h w`` |
    | dense | ``2 n m + bias m`` |
    | batch normalisation of images | 2 per value |
    | ReLU, alone or as a layer's activation | 1 per value |
    | maximum and average pooling | ``k k`` per value that comes out |

    ``bias`` is 1 with a bias and 0 without. Batch normalisation of vectors, global pooling, sums,
    other activations and everything else count nothing. This is neither MACs nor twice the MACs:
    use :func:`tfprune.cost.measure` for all but the epochs of Scratch-B.

    The paper's code knows the layers of the table in two dimensions. Beyond it, whatever
    :func:`tfprune.cost.measure` knows the MACs of (one and three dimensions, depthwise and
    transposed convolutions, attention, recurrent cells) counts two per MAC here. A layer that is
    called twice counts twice.

    Args:
        model: a built functional or sequential model of Keras 3 or tf_keras.
        input_shape: shape of one example, for a model that leaves sizes free.

    Returns:
        Operations for one example (no unit; a "FLOP" each).

    Raises:
        ModelError: a subclassed or unbuilt model, or one whose sizes are free.

    References:
        Liu, Sun, Zhou, Huang, Darrell, arXiv:1810.05270; the counter is in the official code, from
        which the rules above were noted down. Checked: the Scratch-B epochs recounted for the
        paper's networks. Not checked: the paper's own text.
    """
    graph = analyse(model, input_shape=input_shape)
    costs = CostModel(graph)
    multiplications = costs.macs(costs.full_mask())
    return 2 * multiplications + sum(
        _besides(call) for call in _calls(graph.record.traces, graph.model)
    )


def _calls(traces: dict[int, Trace], model: Any) -> Iterator[Call]:
    """Every call in a model, those in nested models included, as often as it is made."""
    for call in traces[id(model)].calls:
        if is_model(call.op):
            yield from _calls(traces, call.op)
        else:
            yield call


def _besides(call: Call) -> int:
    """What a call counts besides two for every MAC."""
    # Of a wrapper, such as TimeDistributed, what is inside.
    layer = getattr(call.op, "layer", call.op)
    kind = type(layer).__name__
    values = sum(math.prod(size or 0 for size in ref.shape[1:]) for ref in call.outputs)
    count = 0
    if getattr(layer, "use_bias", False) and ("Conv" in kind or kind == "Dense"):
        count += values
    if kind.startswith("BatchNormalization") and len(call.inputs[0].shape) > 3:
        count += 2 * values
    if _rectifies(layer):
        count += values
    if kind.startswith(("MaxPool", "AveragePooling")):
        count += math.prod(_as_tuple(layer.pool_size)) * values
    return count


def _rectifies(layer: Any) -> bool:
    """A ReLU: a layer, an operation, or the activation of another layer."""
    names = (
        type(layer).__name__,
        getattr(getattr(layer, "activation", None), "__name__", ""),
        (symbol_of(layer) or "").rpartition(".")[2],
    )
    return any(name.lower() in _RECTIFIERS for name in names)


def _as_tuple(size: Any) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)
