"""What a candidate is worth: a metric of the masked model on validation data.

A masked model computes what the pruned one would, so that nothing is rebuilt: the channels that
a candidate removes are zero where they are read (sheet A1: "zero the filter and evaluate with
masks"), and batch normalisation may be estimated anew on training data, which comes out as it would
on the pruned model. The statistics and weights of the source are back before every candidate, so
that no result depends on the ones before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.errors import ArgumentError, DataError
from tfprune.graph import ChannelGraph, analyse
from tfprune.graph.evaluate import flatten
from tfprune.graph.masking import Kept, MaskedModel, predict_on
from tfprune.graph.plan import PruningPlan
from tfprune.losses import final_activation
from tfprune.protocols import recalibrate_batch_norm
from tfprune.surgery import apply
from tfprune.workers import Examples, PortableModel


@dataclass(frozen=True)
class Metric:
    """How good outputs are, as one number.

    Attributes:
        function: called once with all labels and all outputs, arrays with the examples first
            (of a model with several outputs, the list of them). A function, a Keras loss, or a
            Keras metric, which is reset before. For other processes a function has to be at the
            top level of a module; losses and metrics travel as their configuration.
        larger_is_better: whether a larger number means a better model.
        name: for tables; by default the function's.
    """

    function: Any
    larger_is_better: bool
    name: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.function, type) or not callable(self.function):
            raise ArgumentError(
                "Expected a function of (labels, outputs), a Keras loss or a Keras metric. "
                f"Received: {self.function!r}."
            )
        if not isinstance(self.larger_is_better, bool):
            raise ArgumentError(
                "Expected larger_is_better to be True (accuracy) or False (a loss). Received: "
                f"{self.larger_is_better!r}."
            )
        if not self.name:
            name = getattr(self.function, "name", None) or getattr(self.function, "__name__", None)
            object.__setattr__(self, "name", str(name or type(self.function).__name__))

    def __call__(self, labels: Any, outputs: Any) -> float:
        """The number, for all examples at once.

        Raises:
            DataError: it is not finite.
        """
        if hasattr(self.function, "update_state"):
            self.function.reset_state()
            self.function.update_state(labels, outputs)
            value = float(np.asarray(self.function.result()))
        else:
            value = float(np.mean(np.asarray(self.function(labels, outputs))))
        if not math.isfinite(value):
            raise DataError(
                f"Expected a finite {self.name}. Received: {value}. Look at the model's outputs "
                "for the validation data; a training that diverged gives such."
            )
        return value

    def drop(self, dense: float, value: float) -> float:
        """How much worse than the dense model; negative if better."""
        return dense - value if self.larger_is_better else value - dense

    def __reduce__(self) -> tuple[Any, ...]:
        function = self.function
        if hasattr(function, "get_config") and hasattr(type(function), "from_config"):
            config = (type(function), function.get_config())
            return _metric_again, (*config, self.larger_is_better, self.name)
        return Metric, (function, self.larger_is_better, self.name)


def _metric_again(cls: Any, config: dict[str, Any], larger_is_better: bool, name: str) -> Metric:
    return Metric(cls.from_config(config), larger_is_better, name)


def resolve_metric(model: Any, metric: Any, labels: Any) -> Metric:
    """``metric``, or the accuracy of a classifier.

    Args:
        model: of Keras 3 or tf_keras.
        metric: a :class:`Metric`, or ``None``.
        labels: of the validation data: class numbers, shape ``(n,)`` or ``(n, 1)`` (or one per
            pixel), one-hot rows ``(n, classes)``, or 0 and 1 for one sigmoid unit.

    Raises:
        ArgumentError: neither, or ``None`` where model and labels are not a classifier's.
    """
    if isinstance(metric, Metric):
        return metric
    advice = (
        "Say what to measure, such as metric=tfprune.search.Metric("
        "keras.losses.MeanSquaredError(), larger_is_better=False)."
    )
    if metric is not None:
        raise ArgumentError(f"Expected metric to be a Metric. Received: {metric!r}. {advice}")
    shape = getattr(model, "output_shape", None)
    if not isinstance(shape, tuple) or not isinstance(labels, np.ndarray):
        raise ArgumentError(
            "Expected a model with one output and one kind of label, for the accuracy. Received: "
            f"outputs {shape} and labels of type {type(labels).__name__}. {advice}"
        )
    if shape[-1] == 1:
        activation = final_activation(model)
        fits = labels.ndim < len(shape) or labels.shape[-1] == 1
        if activation != "sigmoid" or not fits or not np.isin(labels, (0, 1)).all():
            raise ArgumentError(
                "Expected a classifier, for the accuracy: one unit ends in a sigmoid, and its "
                f"labels are 0 and 1. Received: activation {activation!r}, labels of shape "
                f"{labels.shape}. {advice}"
            )
        return Metric(_binary_accuracy, True, "accuracy")
    if labels.ndim == len(shape) and labels.shape[-1] != 1:
        rows = labels.reshape(-1, labels.shape[-1])
        fits = labels.shape[-1] == shape[-1] and ((rows.sum(1) == 1) & (rows.max(1) == 1)).all()
        if not fits:
            raise ArgumentError(
                f"Expected labels in one-hot rows of {shape[-1]}, for the accuracy. Received: "
                f"shape {labels.shape}, with rows that are not. {advice}"
            )
        return Metric(_one_hot_accuracy, True, "accuracy")
    whole = np.equal(np.mod(labels, 1), 0).all() and labels.min() >= 0 and labels.max() < shape[-1]
    places = labels.shape[1:-1] if labels.ndim == len(shape) else labels.shape[1:]
    if not whole or len(places) != len(shape) - 2 or not _fit(places, shape[1:-1]):
        raise ArgumentError(
            f"Expected labels that are class numbers from 0 to {shape[-1] - 1}, for the accuracy. "
            f"Received: shape {labels.shape} of {labels.dtype}, for outputs {shape}. {advice}"
        )
    return Metric(_accuracy, True, "accuracy")


def _fit(sizes: Sequence[int], shape: Sequence[int | None]) -> bool:
    return all(s is None or s == size for size, s in zip(sizes, shape, strict=True))


def _accuracy(labels: NDArray[Any], outputs: NDArray[Any]) -> Any:
    """Fraction of outputs whose largest value is at the label; those with NaN are wrong."""
    right = outputs.argmax(-1) == labels.reshape(outputs.shape[:-1])
    return (right & ~np.isnan(outputs).any(-1)).mean()


def _one_hot_accuracy(labels: NDArray[Any], outputs: NDArray[Any]) -> Any:
    return _accuracy(labels.argmax(-1), outputs)


def _binary_accuracy(labels: NDArray[Any], outputs: NDArray[Any]) -> Any:
    right = (outputs > 0.5) == (labels.reshape(outputs.shape) > 0.5)
    return (right & ~np.isnan(outputs)).mean()


@dataclass(frozen=True, eq=False)
class Measurement:
    """Everything that measuring candidates takes; it can be pickled.

    Attributes:
        model: the dense model.
        validation: with labels.
        metric: of the outputs for them.
        calibration: training examples, on which batch normalisation is estimated anew for every
            candidate; ``None`` leaves the statistics as they are.
    """

    model: PortableModel
    validation: Examples
    metric: Metric
    calibration: Examples | None = None

    def open(self) -> Judge:
        """What measures."""
        return Judge(self)


class Judge:
    """Measures candidates of one model.

    Attributes:
        graph: of the dense model, which stays as it is.
    """

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement
        self.graph: ChannelGraph = analyse(measurement.model.model)
        self._masked = MaskedModel(self.graph)

    def dense(self) -> float:
        """Of the model as it is, statistics of batch normalisation included."""
        self._masked.restore()
        return self._measured(self._masked.outputs)

    def masked(self, kept: Kept, values: Mapping[str, Any] | None = None) -> float:
        """Of the model with only some channels.

        Args:
            kept: group name -> indices of the channels that stay; other groups keep everything.
                Nothing named is the dense model, measured like any other.
            values: new values for some weights, as ``PruningPlan.values``.
        """
        self._masked.restore()
        self._masked.mask(kept, values)
        if self._measurement.calibration is None:
            return self._measured(self._masked.outputs)
        if self._masked.overrides:
            # A normalisation across channels leaves the removed ones out, and batch normalisation
            # is estimated on a model that does so: the pruned one.
            return self.pruned(kept, values)
        self._recalibrate(self._masked.model)
        return self._measured(self._masked.outputs)

    def pruned(
        self,
        kept: Kept,
        values: Mapping[str, Any] | None = None,
        train: Callable[[Any], Any] | None = None,
    ) -> float:
        """Of the model that surgery makes, after ``train(model)`` if that is given."""
        model = apply(self.graph.model, PruningPlan.of(self.graph, kept, None, values))
        if self._measurement.calibration is not None:
            self._recalibrate(model)
        if train is not None:
            train(model)
        return self._measured(lambda batch: predict_on(model, batch))

    def _recalibrate(self, model: Any) -> None:
        examples = self._measurement.calibration
        if examples is not None:
            recalibrate_batch_norm(model, examples.x, batch_size=examples.batch_size)

    def _measured(self, predict: Callable[[Sequence[Any]], Sequence[Any]]) -> float:
        validation = self._measurement.validation
        batches = []
        for x, _ in validation.batches():
            parts = flatten(x)
            count = len(parts[0])
            # Of one size, so that each model is compiled once.
            full = [_filled(part, validation.batch_size) for part in parts]
            batches.append([_wide(output)[:count] for output in predict(full)])
        outputs = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
        single = outputs[0] if len(outputs) == 1 else outputs
        return self._measurement.metric(validation.y, single)


def _filled(part: NDArray[Any], size: int) -> NDArray[Any]:
    """A last, smaller batch with its last example repeated."""
    missing = size - len(part)
    return part if missing <= 0 else np.concatenate([part, np.repeat(part[-1:], missing, 0)])


def _wide(output: Any) -> NDArray[Any]:
    """In a type that numpy knows by itself; float32 holds bfloat16 and float16 exactly."""
    array = np.asarray(output)
    return array.astype(np.float32) if array.dtype.name in ("bfloat16", "float16") else array
