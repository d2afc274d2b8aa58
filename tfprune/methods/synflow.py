r"""SynFlow: prune before training, without any data, by conserving the flow through the network.

Reference: Tanaka, Kunin, Yamins and Ganguli, "Pruning neural networks without any data by
iteratively conserving synaptic flow", NeurIPS 2020, arXiv:2006.05467. The algorithm was read in
the authors' code; the conservation law is checked by the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tfprune.arguments import check_whole
from tfprune.errors import ArgumentError, ModelError
from tfprune.graph.trace import all_layers, raw_variable
from tfprune.layers.masks import Masks
from tfprune.layers.prunable import prunable_weights
from tfprune.methods.copies import FLOATS, altered_copy, linear_form, remade
from tfprune.methods.method import OneShotMethod, plain_copy
from tfprune.methods.ranking import (
    check_sparsity,
    kept_count,
    largest,
    require_no_empty,
)

_layers = keras.layers
_NOT_HOMOGENEOUS: tuple[Any, ...] = (
    _layers.LayerNormalization,
    _layers.GroupNormalization,
    _layers.RMSNormalization,
    _layers.UnitNormalization,
    _layers.SpectralNormalization,
    _layers.MultiHeadAttention,
    _layers.GroupQueryAttention,
    _layers.Attention,
    _layers.AdditiveAttention,
    _layers.RNN,
)
"""Layers through which no flow can be conserved: they normalise, or gate, by their input."""

_FUNCTIONS = frozenset(
    {
        *("Relu6", "Sigmoid", "HardSigmoid", "LogSigmoid", "Silu", "HardSilu", "Gelu", "Tanh"),
        *("HardTanh", "TanhShrink", "SoftShrink", "HardShrink", "Softplus", "Softsign", "Selu"),
        *("Elu", "Celu", "SparsePlus", "SquarePlus", "Softmax", "LogSoftmax", "Sparsemax"),
    }
)
"""Operations of ``keras.ops`` that are replaced by the identity."""


@dataclass(frozen=True)
class SynFlow(OneShotMethod):
    r"""Keeps the weights that carry most of the flow, and chooses in many small steps.

    Every weight, offset and statistic is replaced by its absolute value, activations by ones that
    are homogeneous, and an input of ones is sent through the network in inference mode:

    .. math:: R = \textstyle\sum f_{|\theta|}(\mathbf 1), \qquad
        S = \frac{\partial R}{\partial |w|} \odot |w| .

    In step k of n the fraction :math:`\rho^{k/n}` with the largest scores stays,
    :math:`\rho = 1 - \mathrm{sparsity}`, and scores are computed anew without the weights that
    went. The scores of every layer that all flow must pass sum to the same number, R in a network
    without offsets, so a layer that shrinks gets larger scores; the steps let that act, and no
    layer is emptied before it must be. With ``iterations=1`` that is lost.

    It is computed in float64 in a copy of the model, because R is a product over the layers and
    leaves the range of float32 in deep networks. The model itself is never touched.

    Departures: exactly ``round(N rho^(k/n))`` weights stay in step k, ties broken by position (the
    authors drop all weights at the threshold). Sigmoid, tanh, swish, softmax and the like become
    the identity, and ReLU loses its upper bound; preprocessing layers (``Rescaling``,
    ``Normalization``) become the identity. With gates (squeeze and excitation) R is no longer of
    first degree in every layer, and the sums differ. It is meant for a network at its initial
    values: in a trained one, batch normalisation subtracts the absolute value of its mean.

    Args:
        sparsity: fraction of zeros among all prunable weights, in [0, 1).
        iterations: n. The paper uses 100; the authors' code has 1 as its default, to be changed.
        input_shape: without the batch, for a model with free sizes.
        allow_empty_layers: a layer may lose all its weights, which happens only where fewer weights
            stay than a path through the network needs.

    Raises:
        ArgumentError: a value out of range; a model with free sizes, with inputs that are no
            floats, or with layers that normalise or gate by their input (attention, recurrence,
            layer and group normalisation); a sparsity at which a layer would be left empty.
    """

    sparsity: float
    iterations: int = 100
    input_shape: tuple[int, ...] | None = None
    allow_empty_layers: bool = False

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_whole("iterations", self.iterations, 1)

    def scores(self, model: Any, masks: Masks | None = None) -> dict[str, Any]:
        """The scores S of one step: path -> float64 array, from 0.

        Args:
            model: a Keras 3 model; it stays as it is.
            masks: of the weights that are left; ``None`` for all.

        Raises:
            ModelError: no Keras 3 model, or a flow outside the range of float64.
            ArgumentError: as the class says.
        """
        return _Flow(model, self.input_shape).scores(masks)

    def masks(self, model: Any) -> Masks:
        """Which weights stay. ``model`` stays as it is."""
        flow = _Flow(model, self.input_shape)
        total = sum(weight.size for weight in flow.magnitudes.values())
        last = kept_count(total, self.sparsity)
        masks: Masks | None = None
        for step in range(1, self.iterations + 1):
            scores = flow.scores(masks)
            if masks is not None:
                scores = {path: np.where(masks[path], s, -np.inf) for path, s in scores.items()}
            part = (1 - self.sparsity) ** (step / self.iterations)
            kept = last if step == self.iterations else max(last, round(total * part))
            masks = Masks(largest(scores, kept))
        return require_no_empty(masks or Masks.ones(model), self.allow_empty_layers)


class _Flow:
    """A copy of a model in float64, all of its variables positive."""

    def __init__(self, model: Any, input_shape: Sequence[int] | None) -> None:
        plain = plain_copy(model)
        _require_homogeneous(plain)
        copy = altered_copy(plain, _homogeneous, "float64")
        for variable in copy.variables:
            if variable.dtype in FLOATS:
                variable.assign(np.abs(np.asarray(variable)))
        self._weights = prunable_weights(copy)
        self.magnitudes = {path: np.asarray(v).copy() for path, v in self._weights.items()}
        self._gradient = _gradient(copy, list(self._weights.values()), _ones(copy, input_shape))

    def scores(self, masks: Masks | None = None) -> dict[str, Any]:
        weights = self.magnitudes
        if masks is not None:
            weights = {path: weight * masks[path] for path, weight in weights.items()}
        for path, variable in self._weights.items():
            variable.assign(weights[path])
        flow, gradients = self._gradient()
        if not np.isfinite(flow) or not all(np.isfinite(part).all() for part in gradients):
            raise ModelError(
                f"Expected a flow that float64 can hold. Received: R = {flow}. The network is too "
                "deep, or its weights too large, for SynFlow; an initialiser with smaller values "
                "(glorot_uniform, lecun_normal) may do."
            )
        return {
            path: gradient * weight
            for gradient, (path, weight) in zip(gradients, weights.items(), strict=True)
        }


def _gradient(model: Any, variables: Sequence[Any], inputs: Any) -> Callable[[], Any]:
    import tensorflow as tf

    raw = [raw_variable(variable) for variable in variables]

    @tf.function  # type: ignore[untyped-decorator,unused-ignore]
    def gradient() -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(raw)
            outputs = tf.nest.flatten(model(inputs, training=False))
            flow = tf.add_n([tf.reduce_sum(tf.cast(output, tf.float64)) for output in outputs])
        return flow, tape.gradient(flow, raw, unconnected_gradients="zero")

    def run() -> Any:
        flow, gradients = gradient()
        return float(flow), [np.asarray(part) for part in gradients]

    return run


def _ones(model: Any, input_shape: Sequence[int] | None) -> Any:
    """One example of ones for every input, in the structure that the model takes."""
    import tensorflow as tf

    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    if input_shape is not None and len(model.inputs) != 1:
        raise ArgumentError(
            f"Expected input_shape for a model with one input only. Received: {model.name!r}, "
            f"which has {len(model.inputs)}. Give its inputs fixed sizes instead."
        )

    def ones(tensor: Any) -> Any:
        shape = tuple(tensor.shape[1:]) if input_shape is None else tuple(input_shape)
        if tensor.dtype not in FLOATS:
            raise ArgumentError(
                f"Expected inputs that are floats, which can all be one. Received: {tensor.name!r} "
                f"of {tensor.dtype}."
            )
        if None in shape:
            raise ArgumentError(
                f"Expected fixed sizes. Received: input {tensor.name!r} of shape "
                f"{tuple(tensor.shape)}. Pass input_shape=, without the batch."
            )
        return tf.ones((1, *shape), tf.float64)

    return keras.tree.map_structure(ones, structure)


def _require_homogeneous(model: Any) -> None:
    found = [layer for layer in all_layers(model) if isinstance(layer, _NOT_HOMOGENEOUS)]
    if found:
        names = ", ".join(f"{layer.name!r} ({type(layer).__name__})" for layer in found[:6])
        raise ArgumentError(
            "Expected a network through which flow is conserved: linear layers, batch "
            "normalisation, pooling, activations. Received layers that normalise or gate by their "
            f"input: {names}. Use SNIP or GraSP, which need data."
        )


def _homogeneous(op: Any) -> Any:
    """What stands in for an operation so that positive numbers pass in proportion."""
    if isinstance(op, _layers.InputLayer):
        return None
    if isinstance(op, _layers.Rescaling | _layers.Normalization | _layers.Softmax):
        return _layers.Activation("linear", name=op.name, dtype="float64")
    if isinstance(op, _layers.ReLU):
        return remade(op, {"max_value": None, "threshold": 0.0}, "float64")
    if isinstance(op, keras.layers.Layer):
        activation = getattr(op, "activation", None)
        if getattr(activation, "__name__", None) in (None, "linear", "relu", "leaky_relu"):
            return None
        return linear_form(op, "float64")
    return linear_form(op, "float64") if type(op).__name__ in _FUNCTIONS else None
