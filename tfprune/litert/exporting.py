"""From a Keras model to a checked file for a phone."""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from tfprune.errors import ArgumentError, ExportError
from tfprune.graph.trace import all_layers, require_unwrapped, with_values
from tfprune.litert import quantize as quantization
from tfprune.litert.check import compare, require_agreement
from tfprune.litert.convert import convert, convert_sparse
from tfprune.litert.delegates import cpu_delegation, gpu_audit
from tfprune.litert.examples import Examples, random_examples, take_examples
from tfprune.litert.flatbuffer import TensorInfo, read_graph
from tfprune.litert.keras_model import InputShape, KerasModel, keras_model
from tfprune.litert.progress import Step, progress
from tfprune.litert.report import ComparisonReport, ExportReport, SparseReport
from tfprune.litert.sparsity import encoded_tensors, judge_file, weight_sparsity
from tfprune.writing import replacing, writable_target

Quantize = Literal["float16", "dynamic", "int8"]

# float32 kernels of LiteRT and TensorFlow add up in different orders: networks of 100 and more
# layers differ by some 5e-5 of their largest output.
_FLOAT_TOLERANCE = 1e-4
# A float16 weight has 11 bits: it is off by at most 2 ** -11, 5e-4 of itself. Twenty layers whose
# errors all add up make this; those of real networks cancel (5e-4 to 2e-3 was seen).
_FLOAT16_TOLERANCE = 1e-2
_RANDOM_EXAMPLES = 8
# What the converter wants of a kernel before it leaves its zeros out: with 29 % it stays dense.
_LEAST_ZEROS = 0.3
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
    sparse: bool = False,
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
            1e-4 by default for float32, and 1e-2 for float16 with ``sparse``. Other quantised
            models are measured and, by default, not judged.
        seed: Of the random numbers.
        verbose: 1 shows progress on standard error.
        sparse: Whether to store kernels without their zeros where 30 % or more are zero, with
            ``quantize`` ``None`` or ``"float16"``. The file is smaller everywhere, and faster where
            XNNPACK has its sparse path; the report says whether it takes it. GPU delegates refuse
            such a file.

    Returns:
        What was written, how far it is from the Keras model, and what the delegates make of it.

    Raises:
        ArgumentError: An argument has a value that is not allowed, ``"int8"`` without calibration
            data, a path whose directory does not exist, or ``sparse`` for a model without zeros,
            with ``"dynamic"`` or ``"int8"``, or with ``check=False``.
        ModelError: The model is subclassed, unbuilt, not in float32, has weights that are NaN or
            still has its pruning wrappers.
        DataError: The data are empty or do not fit the model.
        ExportError: The path cannot be written, an operation has no LiteRT counterpart, or the
            LiteRT model's outputs are NaN or differ by more than the tolerance. With ``sparse``,
            nothing could be encoded, or XNNPACK would compute wrong outputs on a phone.

    Example:
        >>> report = tfprune.export(  # doctest: +SKIP
        ...     model, "small.tflite", quantize="int8", calibration=train_dataset
        ... )
        >>> print(report)  # doctest: +SKIP
    """
    _check_arguments(quantize, io_type, calibration, check, tolerance)
    _check_sparse(sparse, quantize, check)
    _check_counts(calibration_examples=calibration_examples, check_examples=check_examples)
    target = writable_target(path)
    keras = keras_model(model, batch_size=batch_size, input_shape=input_shape)
    require_unwrapped(model)
    if sparse:
        _check_zeros(model)
    # all data are taken before the long work, so that wrong ones are told at once
    limit = max(calibration_examples, check_examples) if quantize == "int8" else check_examples
    calibrating = None
    if calibration is not None:
        calibrating = take_examples(calibration, keras, limit=limit, argument="calibration")
    checking = None
    if check:
        checking = _checking(check_data, calibrating, keras, check_examples, seed)

    found = None
    with progress(verbose, total=4) as step:
        step(f"convert to {'sparse ' + (quantize or 'float32') if sparse else 'float32'}")
        content = convert_sparse(keras, float16=quantize == "float16") if sparse else convert(keras)
        step(f"quantise: {'nothing to do' if sparse else quantize or 'nothing to do'}")
        if sparse:
            found = _judged(content, model)
        elif quantize == "float16":
            content = quantization.float16(content)
        elif quantize == "dynamic":
            content = quantization.dynamic(content)
        elif quantize == "int8" and calibrating is not None:
            used = calibrating.first(calibration_examples)
            content = quantization.int8(content, keras, used, io_type=io_type)
        graph = read_graph(content)
        cpu = cpu_delegation(content)
        if tolerance is None:
            tolerance = _tolerance(quantize, sparse=sparse)
        with _blamed_on_blocks(found, quantize):
            comparison = _write(content, target, keras, checking, tolerance, step)

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
        sparse=found,
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


def _check_sparse(sparse: object, quantize: str | None, check: object) -> None:
    if not isinstance(sparse, bool):
        raise ArgumentError(f"Expected sparse to be True or False. Received: {sparse!r}.")
    if not sparse:
        return
    reasons = {
        "int8": "LiteRT computes sparse int8 convolutions densely, and loads no file with a sparse "
        "int8 dense layer",
        "dynamic": "LiteRT computes wrong outputs from sparse weights that are quantised so",
    }
    if quantize in reasons:
        raise ArgumentError(
            "Expected quantize to be None or 'float16' with sparse=True. Received: "
            f"quantize={quantize!r}, and {reasons[quantize]}. Use quantize='float16' with "
            f"sparse=True, or quantize={quantize!r} without it."
        )
    if not check:
        raise ArgumentError(
            "Expected check=True with sparse=True. Received: check=False. LiteRT is known to load "
            "some sparse files and compute nonsense, so that each is run before it is written."
        )


def _check_zeros(model: Any) -> None:
    best, most = "", 0.0
    for layer in all_layers(model):
        for variable in with_values(layer.weights):
            values = variable.numpy()
            if values.ndim > 1 and values.size and np.mean(values == 0) >= most:
                most = float(np.mean(values == 0))
                best = getattr(variable, "path", None) or variable.name
    if most < _LEAST_ZEROS:
        sparsest = (
            f"Its sparsest kernel, {best!r}, has {most:.1%} zeros" if best else "It has no kernels"
        )
        raise ArgumentError(
            f"Expected a model with a kernel of which {_LEAST_ZEROS:.0%} or more are zero with "
            f"sparse=True; a sparse encoding makes others larger. {sparsest}. Prune it with "
            "tfprune.prune_low_magnitude, or leave sparse=True out."
        )


def _judged(content: bytes, model: Any) -> SparseReport:
    """What was encoded.

    Raises:
        ExportError: Nothing, or a phone would compute wrong outputs from it.
    """
    names = {layer.name for layer in all_layers(model)}
    tensors = encoded_tensors(content, names)
    if not tensors:
        raise ExportError(
            f"Expected the converter to encode the zeros of {model.name!r}, and it encoded none: "
            "it knows sparse kernels of dense layers and two-dimensional convolutions, not those "
            "of three-dimensional ones or loops over time (unroll=True helps there). Leave "
            "sparse=True out."
        )
    path = judge_file(content, names)
    if path.verdict == "broken":
        raise ExportError(
            "Expected a model that XNNPACK computes either sparsely or densely throughout. On "
            "phones it would begin sparsely with this one and not end so, and compute wrong "
            f"outputs or not load it (on this machine it may not): {path.blocker}. Nothing was "
            "written. Without sparse=True the model is right everywhere."
        )
    return SparseReport(tensors, weight_sparsity(content), path)


def _tolerance(quantize: str | None, *, sparse: bool) -> float | None:
    if quantize is None:
        return _FLOAT_TOLERANCE
    return _FLOAT16_TOLERANCE if sparse else None


@contextlib.contextmanager
def _blamed_on_blocks(found: SparseReport | None, quantize: str | None) -> Iterator[None]:
    """Says more of a failed check where the cause is known."""
    try:
        yield
    except ExportError as error:
        blocks = [t for t in found.tensors if max(t.block) > 1] if found else []
        if quantize != "float16" or not blocks:
            raise
        raise ExportError(
            f"{error} The cause is known: the zeros of the dense layer {blocks[0].layer!r} lie in "
            "blocks of 4 inputs, and LiteRT computes NaN from such blocks in float16. Use "
            "quantize=None, for which they are fast, or prune without blocks."
        ) from error


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
            if tolerance is not None:
                require_agreement(comparison, tolerance)
        step("write")
    return comparison


def _ordered(infos: tuple[TensorInfo, ...], names: list[str]) -> tuple[TensorInfo, ...]:
    return tuple(sorted(infos, key=lambda info: names.index(info.name)))
