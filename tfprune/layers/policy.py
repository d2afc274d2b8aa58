"""Which layers to prune so that XNNPACK, LiteRT's CPU delegate, computes them faster."""

from __future__ import annotations

import weakref
from typing import Any

from tfprune.errors import ModelError
from tfprune.graph.trace import framework_of
from tfprune.schedules.tfmot import load
from tfprune.sparse_path import judge, keras_network

_tfmot = load().sparsity.keras


class PruneForLatencyOnXNNPack(_tfmot.PruningPolicy):  # type: ignore[misc, name-defined]
    """Prunes only 1x1 convolutions that XNNPACK's sparse kernels make faster.

    For Keras 3 it refuses a model that XNNPACK would compute densely, or wrongly, however many
    zeros it has. XNNPACK's rules and what differs from them in practice are in
    :mod:`tfprune.sparse_path`. For models and layers of tf_keras it is tfmot's class of the same
    name.

    Departures, for Keras 3, from tfmot's class, each of them measured with LiteRT 2.3.0. *Wider*:
    silu, hard silu, tanh, GELU and exponential as activations; ``Dense`` on the channels of an
    image; means over height and width, as in squeeze and excitation. *Narrower*: a convolution
    behind ``GlobalAveragePooling2D(keepdims=True)``, or another output of the sparse part, makes a
    file that does not load or computes wrong outputs; subtraction, and batch normalisation that
    does not follow a convolution, are not in the sparse path.

    Example:
        >>> pruned = tfprune.prune_low_magnitude(  # doctest: +SKIP
        ...     model, schedule, pruning_policy=tfprune.layers.PruneForLatencyOnXNNPack()
        ... )
    """

    def __init__(self) -> None:
        self._keras2 = _tfmot.PruneForLatencyOnXNNPack()
        self._chosen: weakref.WeakSet[Any] | None = None

    def allow_pruning(self, layer: Any) -> bool:
        """Whether to prune a layer.

        Args:
            layer: A layer of the model that :meth:`ensure_model_supports_pruning` has seen last.
                Before it has seen one, every 1x1 ``Conv2D`` is allowed, as in tfmot.
        """
        if framework_of(layer) == "tf_keras":
            return bool(self._keras2.allow_pruning(layer))
        if self._chosen is not None:
            return layer in self._chosen
        return _is_pointwise(layer)

    def ensure_model_supports_pruning(self, model: Any) -> None:
        """Refuses a model that zeros cannot make faster on a phone.

        Args:
            model: A functional or sequential model, built.

        Raises:
            ModelError: A layer stands in the way (the message names it, by its path, and the
                remedy), or the model is subclassed or unbuilt. For tf_keras a ValueError, tfmot's.
        """
        if framework_of(model) == "tf_keras":
            self._keras2.ensure_model_supports_pruning(model)
            return
        network, layers = keras_network(model, sparsity=1.0)
        report = judge(network)
        if report.verdict != "sparse":
            raise ModelError(
                f"Expected a model that XNNPACK can compute sparsely. In {model.name!r} this is in "
                f"the way: {report.blocker}. To prune it for its size alone, leave the policy out."
            )
        chosen = [layers[path] for path in report.convolutions]
        self._chosen = weakref.WeakSet(c for c in chosen if _is_pointwise(c) or _is_dense(c))


def _is_pointwise(layer: Any) -> bool:
    import keras

    return isinstance(layer, keras.layers.Conv2D) and tuple(layer.kernel_size) == (1, 1)


def _is_dense(layer: Any) -> bool:
    import keras

    return isinstance(layer, keras.layers.Dense)
