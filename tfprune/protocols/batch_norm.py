"""Estimating the statistics of batch normalisation anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfprune.batches import iterate
from tfprune.errors import DataError, ModelError
from tfprune.graph.trace import all_layers
from tfprune.protocols.framework import as_array, framework

Array = np.ndarray[Any, Any]


def recalibrate_batch_norm(
    model: Any, data: Any, *, batches: int | None = None, batch_size: int = 128
) -> int:
    """Replaces the moving statistics of every batch normalisation by those of the data.

    Channels that go change what the layers after them receive, and the moving averages of the
    training no longer fit. One forward pass repairs that, without labels and without gradients.

    For every batch each layer normalises with the mean and variance *of that batch*, as in
    training, and the new statistics are pooled over the batches without any decay:

        mean     = sum_b n_b m_b / N
        variance = sum_b n_b (v_b + (m_b - mean)^2) / N

    with m_b and v_b the mean and the (population, not Bessel-corrected) variance of a channel of
    the layer's input in batch b, n_b the values that it has there and N = sum_b n_b; in float64.
    With one batch this is exactly the data's own mean and variance at every depth. With several,
    layers below others see inputs that were normalised batch by batch, so that larger batches
    come nearer to the statistics at inference; this is PyTorch's cumulative average
    (``momentum=None``), weighted by the batches' sizes.

    Everything else behaves as at inference: dropout is off, and no other weight, flag or optimizer
    state changes, nor is the model compiled. Layers with ``trainable=False`` are estimated
    as well, for frozen statistics fit a pruned network no better. A layer called several times
    pools all its calls. If anything fails, the old statistics are back.

    Args:
        model: a built Keras 3 or tf_keras model, nested or not, in any precision.
        data: images alone or with labels, which are ignored: a ``tf.data.Dataset`` of batches,
            or arrays. Training data, in random order if its order means something.
        batches: read only so many batches; all of them if ``None``.
        batch_size: of the batches cut from arrays.

    Returns:
        The number of layers whose statistics were estimated; 0 for a model without batch
        normalisation, whose data are not read.

    Raises:
        DataError: the data are empty, do not fit the model, or lead to NaN or infinity.
        ModelError: not a Keras model, not built, or a layer that cannot be observed.

    References:
        The procedure is folklore; Wu, Johnson, *Rethinking "Batch" in BatchNorm*,
        arXiv:2105.07576, section 3, examines it as "precise batch normalisation". Not checked
        against its text.
    """
    keras = framework(model)
    layers = [layer for layer in all_layers(model) if _has_moving_statistics(layer)]
    if not layers:
        return 0
    observed = [_Statistics(layer) for layer in layers]
    finished = False
    try:
        for statistics in observed:
            statistics.attach(keras)
        shape = getattr(model, "input_shape", None)
        for x, _ in iterate(data, batch_size=batch_size, limit=batches, input_shape=shape):
            model(x, training=False)
        estimated = [statistics for statistics in observed if statistics.count]
        for statistics in estimated:
            statistics.check()
        finished = True
    finally:
        for statistics in observed:
            statistics.detach(keep=finished)
    return len(estimated)


def _has_moving_statistics(layer: Any) -> bool:
    """Batch normalisation of either Keras, or a layer built on it."""
    return all(hasattr(layer, name) for name in ("moving_mean", "moving_variance", "axis"))


@dataclass(eq=False)
class _Statistics:
    """The pooled statistics of one layer, which it collects while attached to its ``call``."""

    layer: Any
    count: int = 0
    mean: Any = 0.0
    squares: Any = 0.0
    before: tuple[Array, Array] | None = field(default=None, init=False)

    def attach(self, keras: Any) -> None:
        layer = self.layer
        self.before = (
            np.array(as_array(keras, layer.moving_mean)),
            np.array(as_array(keras, layer.moving_variance)),
        )
        axis = _channel_axis(layer)
        inference = layer.call

        def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
            try:
                values = np.moveaxis(as_array(keras, inputs).astype(np.float64), axis, -1)
            except (AttributeError, NotImplementedError, TypeError) as error:
                raise ModelError(
                    f"The batch normalisation {layer.name!r} runs inside a compiled part of the "
                    "model, where its inputs cannot be read."
                ) from error
            values = values.reshape(-1, values.shape[-1])
            if mask is not None:
                values = values[as_array(keras, mask).reshape(-1).astype(bool)]
            if len(values):
                self._add(*_moments(values))
            # tf_keras has layers that take no mask.
            options = {} if mask is None else {"mask": mask}
            return inference(inputs, training=False, **options)

        # Not through Keras's __setattr__, which would track it.
        object.__setattr__(layer, "call", call)

    def _add(self, count: int, mean: Array, variance: Array) -> None:
        """Normalises with this batch and pools it with the earlier ones (Chan et al. 1979)."""
        self.layer.moving_mean.assign(mean)
        self.layer.moving_variance.assign(variance)
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squares = (
            self.squares + variance * count + difference**2 * (self.count * count / total)
        )
        self.count = total

    def check(self) -> None:
        if not (np.isfinite(self.mean).all() and np.isfinite(self.squares).all()):
            raise DataError(
                f"The inputs of the batch normalisation {self.layer.name!r} hold NaN or infinity. "
                "Check the data, and the weights before it."
            )

    def detach(self, *, keep: bool) -> None:
        """Gives the layer its own ``call`` back, and the new statistics or the old ones."""
        if self.before is None:
            return
        if "call" in vars(self.layer):
            object.__delattr__(self.layer, "call")
        mean, variance = self.before
        if keep and self.count:
            mean, variance = self.mean, self.squares / self.count
        self.layer.moving_mean.assign(mean)
        self.layer.moving_variance.assign(variance)


def _moments(values: Array) -> tuple[int, Array, Array]:
    """Count, mean and variance of the columns; centres ``values`` in place."""
    count = len(values)
    # A product with ones is several times faster than numpy's sum along the first axis.
    mean = np.ones(count) @ values / count
    values -= mean
    return count, mean, np.einsum("nc,nc->c", values, values) / count


def _channel_axis(layer: Any) -> int:
    axis = layer.axis
    if isinstance(axis, int):
        return axis
    if len(axis) != 1:
        raise ModelError(
            f"The batch normalisation {layer.name!r} has several channel axes, {list(axis)}; "
            "one is expected."
        )
    return int(axis[0])
