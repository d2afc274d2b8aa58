"""From a Keras model to a float32 LiteRT model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tfprune.errors import ExportError
from tfprune.litert.keras_model import KerasModel
from tfprune.litert.quiet import captured_output

_REMEDIES = {
    "Erf": "use keras.activations.gelu(x, approximate=True) or another activation",
    "BitwiseAnd": "keras.ops.argmax lowers to it: leave the argmax to the program on the phone",
    "FFT": "compute the spectrum on the phone, outside the model",
    "RFFT": "compute the spectrum on the phone, outside the model",
}
_ANY_REMEDY = (
    "replace it by operations that LiteRT has, or end the model before it and compute the rest "
    "in the program on the phone"
)


def convert(model: KerasModel) -> bytes:
    """Converts a model to LiteRT in float32, with one signature ``serving_default``.

    Args:
        model: The model; its input shapes become those of the result, static in every axis, and
            its names those of the signature.

    Returns:
        The LiteRT model (a flatbuffer).

    Raises:
        ExportError: An operation has no LiteRT counterpart, or the converter fails otherwise.
    """
    with captured_output():
        function = concrete_function(model)
        return _run(float_converter(model, function), function, model)


def convert_sparse(model: KerasModel, *, float16: bool) -> bytes:
    """Converts a model to LiteRT, with kernels that have many zeros stored without them.

    The converter does so for kernels of which 30 % or more are zero. It encodes what it converts
    and nothing else does, so that float16 weights are made here as well, not from the result.

    Args:
        model: As for :func:`convert`.
        float16: Whether to store weights in float16.

    Returns:
        The LiteRT model (a flatbuffer); dense if no kernel has enough zeros.

    Raises:
        ExportError: As for :func:`convert`.
    """
    import tensorflow as tf

    with captured_output():
        function = concrete_function(model)
        converter = float_converter(model, function)
        converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
        if float16:
            converter.optimizations.append(tf.lite.Optimize.DEFAULT)
            converter.target_spec.supported_types = [tf.float16]
        return _run(converter, function, model)


def concrete_function(model: KerasModel) -> Any:
    """The model as a TensorFlow function of static shapes, its arguments and results named."""
    import tensorflow as tf

    def call(**inputs: Any) -> dict[str, Any]:
        outputs = model([inputs[port.name] for port in model.inputs])
        return dict(zip(model.output_names, outputs, strict=True))

    specs = {p.name: tf.TensorSpec(p.shape, p.dtype, name=p.name) for p in model.inputs}
    return tf.function(call).get_concrete_function(**specs)


def float_converter(model: KerasModel, function: Any) -> Any:
    """A converter for :func:`concrete_function`'s result, without any optimisation set."""
    import tensorflow as tf

    # Handing over the Keras 3 model itself as the owner of the variables gives a file that computes
    # NaN: its variables are not tracked as TensorFlow expects. A plain module tracks them.
    owner = tf.Module()
    owner.variables_of_the_model = model.variables()
    return tf.lite.TFLiteConverter.from_concrete_functions([function], owner)


def _run(converter: Any, function: Any, model: KerasModel) -> bytes:
    # The converter declares no error types of its own in public, and what it cannot do surfaces as
    # several: all of them are turned into one error, with the original as its cause.
    try:
        return bytes(converter.convert())
    except Exception as error:
        raise _explained(error, function, model) from error


def _explained(error: Exception, function: Any, model: KerasModel) -> ExportError:
    missing = sorted(set(re.findall(r"'tf\.(\w+)' op is neither a custom op", str(error))))
    if not missing:
        first = next((line for line in str(error).splitlines() if line.strip()), "no message")
        return ExportError(
            f"The LiteRT converter failed on {model.model.name!r}: {first.strip()[:300]}. "
            "The whole message is the cause of this error."
        )
    names = [layer.name for layer in model.model.layers]
    lines = []
    for op in missing:
        layers = sorted(set(_layers_with(op, function, names)))
        where = f" in {', '.join(map(repr, layers))}" if layers else ""
        lines.append(f"tf.{op}{where}: {_REMEDIES.get(op, _ANY_REMEDY)}")
    return ExportError(
        "Expected operations that LiteRT can run. These have no LiteRT counterpart: "
        + "; ".join(lines)
        + "."
    )


def _layers_with(op: str, function: Any, layers: Iterable[str]) -> Iterable[str]:
    """The layers whose TensorFlow graph has an operation of type ``op``."""
    known = set(layers)
    for operation in function.graph.get_operations():
        if operation.type != op:
            continue
        scopes = operation.name.split("/")[:-1]
        # name scopes are layer names, numbered when they come twice
        plain = [s if s in known else re.sub(r"_\d+$", "", s) for s in scopes]
        yield from [s for s in plain if s in known][:1]
