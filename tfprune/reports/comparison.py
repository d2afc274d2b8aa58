"""Dense against pruned: one honest table of accuracy, cost, bytes and latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tfprune.batches import iterate
from tfprune.cost import measure
from tfprune.errors import ArgumentError, DataError
from tfprune.reports.text import count, mega, milliseconds, percent, size, table, terminal_width


@dataclass(frozen=True)
class Row:
    """One model of a comparison.

    Attributes:
        name: as given.
        accuracy: top-1, between 0 and 1; ``None`` without data.
        macs: multiply-accumulates of one example; ``None`` if a size is free.
        parameters: values in all weights; ``None`` for a LiteRT file.
        size_bytes: of the LiteRT model.
        latency_ms: median on this machine's CPU, one thread.
        gpu: whether all of it ran on the GPU delegate, in words; empty if not tried.
    """

    name: str
    accuracy: float | None
    macs: int | None
    parameters: int | None
    size_bytes: int
    latency_ms: float
    gpu: str


@dataclass(frozen=True)
class Comparison:
    """Models side by side, measured in one run.

    Attributes:
        rows: one per model, the first is what the others are compared with.
        processor: the CPU that the latencies are from.
        examples: how many examples the accuracies are from; 0 without data.
    """

    rows: tuple[Row, ...]
    processor: str
    examples: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The table as Markdown."""
        return self._text(markdown=True)

    def _repr_markdown_(self) -> str:
        """What notebooks show."""
        return self.to_markdown()

    def __str__(self) -> str:
        return self._text(markdown=False)

    def _text(self, markdown: bool) -> str:
        first = self.rows[0]
        rows = [
            (
                row.name,
                percent(row.accuracy, 2),
                mega(row.macs),
                _ratio(row.macs, first.macs),
                count(row.parameters),
                size(row.size_bytes),
                milliseconds(row.latency_ms),
                _ratio(first.latency_ms, row.latency_ms, "×"),
                row.gpu or "–",
            )
            for row in self.rows
        ]
        head = ("model", "accuracy", "MACs", "of dense", "parameters", "file", "CPU", "speed-up",
                "GPU delegate")  # fmt: skip
        body = table(head, rows, right=head[1:-1], markdown=markdown)
        if not markdown and _width(body) > terminal_width():
            # One column for each model is narrower, unless there are many.
            names = [row[0] for row in rows]
            figures = list(zip(*rows, strict=True))[1:]
            turned = [(what, *values) for what, values in zip(head[1:], figures, strict=True)]
            body = min(body, table(("", *names), turned, right=names), key=_width)
        tail = f"CPU: median of one thread on {self.processor}; a phone's kernels differ."
        if self.examples:
            one = percent(1 / self.examples, 2)
            tail += f" Accuracy: top-1 on {self.examples:,} examples; one of them is {one}."
        return f"{body}\n\n{tail}"


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))


def _ratio(value: float | None, of: float | None, unit: str = "%") -> str:
    if not value or not of:
        return "–"
    return f"{value / of:.2f} ×" if unit == "×" else f"{100 * value / of:.1f} %"


def compare(
    models: Mapping[str, Any],
    data: Any = None,
    *,
    runs: int = 50,
    gpu: bool | str = "auto",
    input_shape: Any = None,
    verbose: int = 0,
) -> Comparison:
    """Accuracy, MACs, parameters, bytes, CPU latency and GPU delegation of several models.

    Args:
        models: names to Keras models (converted to float32) or paths of LiteRT files; the first
            is what the others are compared with. A pair ``(model, file)`` takes MACs and
            parameters from the model and all else from the file made of it.
        data: labelled examples, ``(x, y)`` or a ``tf.data.Dataset`` of batches, for the accuracy;
            ``y`` are class numbers or one-hot. Models are run through LiteRT as a phone would.
        runs: how often each model is timed, interleaved with the others.
        gpu: whether to run on the GPU delegate: True, False, or ``"auto"`` where there is a driver.
        input_shape: shape of one example, for models that leave sizes free.
        verbose: 1 shows progress on standard error.

    Raises:
        ArgumentError: no models, or a file that is not there.
        ModelError, ExportError: a model that cannot be converted.
        DataError: the data are empty or lack labels.
    """
    from tfprune.litert import Predictor, benchmark_many, to_litert
    from tfprune.litert.progress import progress

    if not models:
        raise ArgumentError("Expected at least one model to compare. Received: none.")
    keras_models: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for name, value in models.items():
        model, file = value if isinstance(value, tuple) else (value, value)
        keras_models[name] = model if hasattr(model, "weights") else None
        files[name] = to_litert(file, input_shape=input_shape) if hasattr(file, "weights") else file
    timings = benchmark_many(files, runs=runs, gpu=gpu, verbose=verbose)  # type: ignore[arg-type]
    accuracies: dict[str, float | None] = dict.fromkeys(models)
    examples = 0
    if data is not None:
        with progress(verbose, total=len(files)) as step:
            for name, file in files.items():
                step(f"accuracy of {name}")
                accuracies[name], examples = _accuracy(Predictor(file), data)
    rows = []
    for name, timing in timings.items():
        model = keras_models[name]
        cost = None if model is None else measure(model, input_shape=input_shape)
        rows.append(
            Row(
                name=name,
                accuracy=accuracies[name],
                macs=None if cost is None else cost.macs,
                parameters=None if cost is None else cost.parameters,
                size_bytes=timing.size_bytes,
                latency_ms=timing.latency_ms,
                gpu=_gpu_words(timing.gpu),
            )
        )
    processor = next(iter(timings.values())).processor
    return Comparison(tuple(rows), processor, examples)


def _accuracy(predict: Any, data: Any) -> tuple[float, int]:
    right = total = 0
    for x, y in iterate(data, labels=True):
        labels = np.asarray(y)
        if labels.ndim > 1 and labels.shape[-1] > 1:
            labels = labels.argmax(-1)
        outputs = predict(x)
        if outputs.ndim != 2 or len(outputs) != labels.size:
            raise DataError(
                f"Expected outputs of shape (examples, classes) for an accuracy. Received: "
                f"{outputs.shape} for {labels.size} labels. Leave data out for such a model."
            )
        right += int((outputs.argmax(-1) == labels.ravel()).sum())
        total += labels.size
    return right / total, total


def _gpu_words(run: Any) -> str:
    if run.status == "not run":
        return ""
    if run.delegated:
        return "all of it" + ("" if run.agrees else ", WRONG outputs")
    return str(run.status)
