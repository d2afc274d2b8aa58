"""Whether a LiteRT model computes what the Keras model computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tfprune.errors import DataError, ExportError
from tfprune.litert.examples import Array, Examples
from tfprune.litert.flatbuffer import Graph, TensorInfo
from tfprune.litert.keras_model import KerasModel
from tfprune.litert.quiet import captured_output
from tfprune.litert.report import ComparisonReport, OutputDifference

_KERAS_BATCH = 32


def compare(path: Path, graph: Graph, model: KerasModel, examples: Examples) -> ComparisonReport:
    """Runs a LiteRT file and the Keras model it came from on the same examples.

    Args:
        path: The LiteRT file.
        graph: What stands in it.
        model: The Keras model.
        examples: Inputs for both.

    Raises:
        ExportError: LiteRT cannot run the file, or its outputs are not finite.
        DataError: The Keras model's own outputs are not finite on these examples.
    """
    expected = _run_keras(model, examples)
    for name, array in expected.items():
        if not np.isfinite(array).all():
            raise DataError(
                "Expected examples on which the Keras model's outputs are finite. On "
                f"{examples.source} its output {name!r} is not. Pass check_data with examples as "
                "it will see them."
            )
    received = _run_litert(path, graph, model, examples)
    differences = []
    for name, want in expected.items():
        got = received[name]
        if not np.isfinite(got).all():
            wrong = int(got.size - np.isfinite(got).sum())
            raise ExportError(
                f"Expected finite outputs. The LiteRT model's output {name!r} has {wrong} of "
                f"{got.size} values that are NaN or infinite, where the Keras model's are finite "
                f"(on {examples.source}). A division by a norm or variance of zero does this: "
                "add a small constant to it."
            )
        differences.append(_difference(name, want, got))
    return ComparisonReport(tuple(differences), len(examples), examples.source)


def require_agreement(report: ComparisonReport, tolerance: float) -> None:
    """Raises ExportError where an output differs by more than ``tolerance``.

    Args:
        report: The measured differences.
        tolerance: As a fraction of the output's largest absolute value.
    """
    for output in report.outputs:
        if output.relative_difference > tolerance:
            raise ExportError(
                f"Expected the LiteRT model to equal the Keras model to {tolerance:.1e} of the "
                f"largest output. The output {output.name!r} differs by "
                f"{output.relative_difference:.1e} ({output.largest_difference:.3g} where the "
                f"largest value is {output.largest_value:.3g}, on {report.source}). Nothing was "
                "written. To allow it, look at the numbers with check=False and pass tolerance."
            )


def to_integers(values: Array, info: TensorInfo) -> Array:
    """Quantises float values for an integer input; others come back as they are."""
    if not info.scale or not np.issubdtype(np.dtype(info.dtype), np.integer):
        return values
    limits = np.iinfo(info.dtype)
    integers = np.round(values / info.scale) + info.zero_point
    return np.clip(integers, limits.min, limits.max).astype(info.dtype)


def to_floats(values: Array, info: TensorInfo) -> Array:
    """The inverse of :func:`to_integers`, to rounding."""
    if not info.scale or not np.issubdtype(values.dtype, np.integer):
        return values
    return (values.astype(np.float32) - info.zero_point) * np.float32(info.scale)


def _run_keras(model: KerasModel, examples: Examples) -> dict[str, Array]:
    import tensorflow as tf

    # one call for many examples where the model leaves the batch open
    size = model.inputs[0].shape[0]
    if all(tensor.shape[0] is None for tensor in model.model.inputs) and size == 1:
        size = _KERAS_BATCH
    parts: list[list[Array]] = []
    for arrays, real in examples.batches(size):
        outputs = model([tf.constant(array) for array in arrays])
        parts.append([np.asarray(output)[:real] for output in outputs])
    return _joined(model.output_names, parts)


def _run_litert(
    path: Path, graph: Graph, model: KerasModel, examples: Examples
) -> dict[str, Array]:
    from ai_edge_litert.interpreter import Interpreter

    inputs = {info.name: info for info in graph.inputs}
    outputs = {info.name: info for info in graph.outputs}
    parts: list[list[Array]] = []
    try:
        with captured_output():
            interpreter = Interpreter(model_path=str(path), num_threads=1)
            runner = interpreter.get_signature_runner(graph.signature)
            for arrays, real in examples.batches(model.inputs[0].shape[0]):
                feed = {
                    port.name: to_integers(array, inputs[port.name])
                    for port, array in zip(model.inputs, arrays, strict=True)
                }
                found = runner(**feed)
                parts.append(
                    [to_floats(found[name], outputs[name])[:real] for name in model.output_names]
                )
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            f"Expected a model that LiteRT can run. The converted model {model.model.name!r} "
            f"fails: {error}. Try another quantize, or report the model."
        ) from error
    return _joined(model.output_names, parts)


def _joined(names: Sequence[str], parts: Sequence[Sequence[Array]]) -> dict[str, Array]:
    columns = zip(*parts, strict=True)
    return {name: np.concatenate(column) for name, column in zip(names, columns, strict=True)}


def _difference(name: str, want: Array, got: Array) -> OutputDifference:
    wide, found = want.astype(np.float64), got.astype(np.float64)
    agreement = None
    if wide.ndim > 1 and wide.shape[-1] > 1:
        agreement = float(np.mean(wide.argmax(-1) == found.argmax(-1)))
    return OutputDifference(
        name,
        float(np.abs(wide - found).max(initial=0.0)),
        float(np.abs(wide).max(initial=0.0)),
        agreement,
    )


def relative_difference(want: Mapping[str, Array], got: Mapping[str, Array]) -> float:
    """The largest difference of any output, as a fraction of its largest value.

    NaN where ``got`` has values that are not finite.
    """
    worst = 0.0
    for name, array in want.items():
        if not np.isfinite(got[name]).all():
            return float("nan")
        worst = max(worst, _difference(name, array, got[name]).relative_difference)
    return worst
