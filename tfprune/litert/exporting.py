"""From a Keras model to a checked file for a phone."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any, Literal, get_args

from tfprune.errors import ArgumentError
from tfprune.litert import quantize as quantization
from tfprune.litert.check import compare, require_agreement
from tfprune.litert.convert import convert
from tfprune.litert.delegates import cpu_delegation, gpu_audit
from tfprune.litert.examples import Examples, random_examples, take_examples
from tfprune.litert.flatbuffer import TensorInfo, read_graph
from tfprune.litert.keras_model import InputShape, KerasModel, keras_model
from tfprune.litert.progress import Step, progress
from tfprune.litert.report import ComparisonReport, ExportReport
from tfprune.writing import replacing, writable_target

Quantize = Literal["float16", "dynamic", "int8"]

# float32 kernels of LiteRT and TensorFlow add up in different orders: networks of 100 and more
# layers differ by some 5e-5 of their largest output.
_FLOAT_TOLERANCE = 1e-4
_RANDOM_EXAMPLES = 8
# As servers do. Level 9 takes minutes for some float16 weights and saves a percent.
_GZIP_LEVEL = 6


def export(
    model: Any,
    path: str | os.PathLike[str],
    *,
    quantize: Quantize | None = None,
    calibration: Any = None,
    calibration_examples: int = 256,
    io_type: quantization.IoType = "float32",
    batch_size: int = 1,
    input_shape: InputShape | None = None,
    check: bool = True,
    check_data: Any = None,
    check_examples: int = 64,
    tolerance: float | None = None,
    seed: int = 0,
    verbose: int = 0,
) -> ExportReport:
    """Writes a Keras model as a LiteRT file, after comparing the two by running both.

    The file has static shapes, as GPU delegates want them, and one signature
    ``serving_default``. Inputs and outputs are called as their layers; one whose name Keras
    numbered by itself is called ``input`` or ``output``, or ``input_0``, ``input_1``, ... where
    there are several. The file appears whole or not at all, and only if the check passes.

    Args:
        model: A functional or sequential model of Keras 3 (on the TensorFlow backend) or tf_keras.
            It is not changed.
        path: The file to write, usually ``*.tflite``. An existing one is replaced.
        quantize: ``None`` keeps float32; ``"float16"`` stores weights in half the bytes;
            ``"dynamic"`` stores them as int8 and quantises activations as they come; ``"int8"``
            computes in int8 throughout, with ranges measured on ``calibration``.
        calibration: Typical inputs, needed for ``"int8"``: a ``tf.data.Dataset`` of batches of
            ``x`` or ``(x, y)``, an array of shape ``(examples, ...)`` or a pair ``(x, y)`` of
            arrays, ``x`` being a list or a dictionary for several inputs. Training data, never
            test data.
        calibration_examples: At most how many examples of it to use.
        io_type: For ``"int8"``, the type of float inputs and outputs in the file: ``"float32"``,
            or ``"int8"``, which leaves quantising to the caller (the report has the scales).
        batch_size: Of the static inputs.
        input_shape: For a model with inputs of open size, their shapes without the batch size: one
            shape, or a mapping from input names.
        check: Whether to run the file against the Keras model.
        check_data: Examples for that, in the same forms; without it those of ``calibration``, and
            without either standard normal numbers (0 and 1 for integer inputs).
        check_examples: At most how many of them to use.
        tolerance: The largest difference that is allowed, as a fraction of the largest output.
            1e-4 by default for float32. Quantised models are measured and, by default, not judged.
        seed: Of the random numbers.
        verbose: 1 shows progress on standard error.

    Returns:
        What was written, how far it is from the Keras model, and what the delegates make of it.

    Raises:
        ArgumentError: An argument has a value that is not allowed, ``"int8"`` without calibration
            data, or a path whose directory does not exist.
        ModelError: The model is subclassed, unbuilt, not in float32 or has weights that are NaN.
        DataError: The data are empty or do not fit the model.
        ExportError: The path cannot be written, an operation has no LiteRT counterpart, or the
            LiteRT model's outputs are NaN or differ by more than the tolerance.

    Example:
        >>> report = tfprune.export(  # doctest: +SKIP
        ...     model, "small.tflite", quantize="int8", calibration=train_dataset
        ... )
        >>> print(report)  # doctest: +SKIP
    """
    _check_arguments(quantize, io_type, calibration, check, tolerance)
    _check_counts(calibration_examples=calibration_examples, check_examples=check_examples)
    target = writable_target(path)
    keras = keras_model(model, batch_size=batch_size, input_shape=input_shape)
    # all data are taken before the long work, so that wrong ones are told at once
    limit = max(calibration_examples, check_examples) if quantize == "int8" else check_examples
    calibrating = None
    if calibration is not None:
        calibrating = take_examples(calibration, keras, limit=limit, argument="calibration")
    checking = None
    if check:
        checking = _checking(check_data, calibrating, keras, check_examples, seed)

    with progress(verbose, total=4) as step:
        step("convert to float32")
        content = convert(keras)
        step(f"quantise: {quantize or 'nothing to do'}")
        if quantize == "float16":
            content = quantization.float16(content)
        elif quantize == "dynamic":
            content = quantization.dynamic(content)
        elif quantize == "int8" and calibrating is not None:
            used = calibrating.first(calibration_examples)
            content = quantization.int8(content, keras, used, io_type=io_type)
        graph = read_graph(content)
        cpu = cpu_delegation(content)
        comparison = _write(content, target, keras, checking, quantize, tolerance, step)

    return ExportReport(
        path=target,
        quantize=quantize,
        size_bytes=len(content),
        gzip_bytes=len(gzip.compress(content, _GZIP_LEVEL, mtime=0)),
        operations=graph.counts(),
        inputs=_ordered(graph.inputs, [port.name for port in keras.inputs]),
        outputs=_ordered(graph.outputs, list(keras.output_names)),
        comparison=comparison,
        cpu=cpu,
        gpu=gpu_audit(graph),
        calibration_examples=(
            min(len(calibrating), calibration_examples) if calibrating and quantize == "int8" else 0
        ),
    )


def _check_arguments(
    quantize: object,
    io_type: object,
    calibration: object,
    check: object,
    tolerance: float | None,
) -> None:
    if quantize is not None and quantize not in get_args(Quantize):
        raise ArgumentError(
            f"Expected quantize to be None or one of {list(get_args(Quantize))}. "
            f"Received: {quantize!r}."
        )
    if quantize == "int8" and calibration is None:
        raise ArgumentError(
            "Expected calibration data for quantize='int8', to measure the ranges of the "
            "activations. Received none. Pass some hundred training examples, for example "
            "calibration=train_dataset.take(8) or calibration=x_train[:256]; or use "
            "quantize='dynamic', which needs none."
        )
    if io_type not in get_args(quantization.IoType):
        raise ArgumentError(
            f"Expected io_type to be one of {list(get_args(quantization.IoType))}. "
            f"Received: {io_type!r}."
        )
    if io_type == "int8" and quantize != "int8":
        raise ArgumentError(
            f"Expected quantize='int8' with io_type='int8'. Received: quantize={quantize!r}."
        )
    if not isinstance(check, bool):
        raise ArgumentError(
            f"Expected check to be True or False. Received: {check!r}. "
            "Examples to check on go into check_data."
        )
    if tolerance is not None and not tolerance > 0:
        raise ArgumentError(
            f"Expected tolerance to be None or positive, such as 1e-3. Received: {tolerance!r}."
        )


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ArgumentError(f"Expected {name} to be 1 or more. Received: {count!r}.")


def _checking(
    data: Any, calibrating: Examples | None, keras: KerasModel, count: int, seed: int
) -> Examples:
    if data is not None:
        return take_examples(data, keras, limit=count, argument="check_data")
    if calibrating is not None:
        return calibrating.first(count)
    return random_examples(keras, min(count, _RANDOM_EXAMPLES), seed)


def _write(
    content: bytes,
    target: Path,
    keras: KerasModel,
    checking: Examples | None,
    quantize: str | None,
    tolerance: float | None,
    step: Step,
) -> ComparisonReport | None:
    """Writes a temporary file, runs that very file, and gives it its name if it is right."""
    comparison = None
    with replacing(target) as temporary:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        step("compare with Keras")
        if checking is not None:
            comparison = compare(temporary, read_graph(content), keras, checking)
            allowed = _FLOAT_TOLERANCE if tolerance is None and quantize is None else tolerance
            if allowed is not None:
                require_agreement(comparison, allowed)
        step("write")
    return comparison


def _ordered(infos: tuple[TensorInfo, ...], names: list[str]) -> tuple[TensorInfo, ...]:
    return tuple(sorted(infos, key=lambda info: names.index(info.name)))
