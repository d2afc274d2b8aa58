"""From a float32 LiteRT model to a smaller one.

float16, dynamic and static quantisation all start from the converted float32 model and take a
fraction of a second with ai-edge-quantizer, where the TensorFlow converter would convert the
Keras model anew for each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from tfprune.errors import ExportError
from tfprune.litert.convert import concrete_function, float_converter
from tfprune.litert.examples import Array, Examples
from tfprune.litert.flatbuffer import read_graph
from tfprune.litert.keras_model import KerasModel
from tfprune.litert.quiet import captured_output

IoType = Literal["float32", "int8"]

_CONTROL_FLOW = frozenset({"CALL_ONCE", "IF", "WHILE"})


def float16(content: bytes) -> bytes:
    """Stores the weights as float16; computation stays in float32 unless the device has float16.

    Args:
        content: A float32 LiteRT model.

    Returns:
        A model of about half the size.
    """
    weights = {
        "num_bits": 16,
        "symmetric": True,
        "granularity": "TENSORWISE",
        "dtype": "FLOAT",
        "block_size": 0,
    }
    config = {
        "weight_tensor_config": weights,
        "compute_precision": "FLOAT",
        "explicit_dequantize": True,
        "skip_checks": False,
        "min_weight_elements": 0,
    }
    return _quantized(content, [_everything("float_casting", config)])


def dynamic(content: bytes) -> bytes:
    """Stores weights as int8, per channel; activations are quantised at run time, as they come.

    Layers of fewer than 1024 weights stay in float32: together they are a percent of a real
    model's size, and a large part of its error (on a small digits network the signal-to-noise
    ratio of the outputs is 53 dB with this rule and 36 dB without).

    Args:
        content: A float32 LiteRT model.

    Returns:
        A model of about a quarter of the size.
    """
    from ai_edge_quantizer import recipe

    return _quantized(content, recipe.dynamic_legacy_wi8_afp32())


def int8(
    content: bytes, model: KerasModel, examples: Examples, *, io_type: IoType = "float32"
) -> bytes:
    """Quantises weights and activations to int8, with ranges measured on examples.

    Both of LiteRT's tools were measured on a trained digits network and on 27 nets of one kind of
    layer each. ai-edge-quantizer's own calibration keeps a moving average of each batch's extremes,
    which cuts the ranges off (16 dB signal-to-noise ratio of the outputs, against 35 dB); with the
    true extremes, as here, it equals the converter (34.9 and 34.8 dB), in a tenth of the time. It
    leaves operations in float where the converter goes on in int8, and that is for the better:
    XNNPACK has PRELU and ABS in float only, so that a net with five PReLU layers takes 0.25 ms
    against 1.2 ms; LEAKY_RELU, which it has in both, loses 4 %. It fails on operations with unused
    outputs, as in unrolled recurrent layers; for these the converter is taken.

    Args:
        content: The float32 LiteRT model.
        model: The Keras model it came from.
        examples: Typical inputs.
        io_type: The type of inputs and outputs that were float32.

    Returns:
        A model of about a quarter of the size.

    Raises:
        ExportError: The tools cannot quantise the model; loops and branches they never can.
    """
    loops = sorted({o.op for o in read_graph(content).operations} & _CONTROL_FLOW)
    if loops:
        # one tool raises on these, the other ends the process
        raise ExportError(
            f"Expected a model without loops and branches for int8. {model.model.name!r} has "
            f"{', '.join(loops)}, as LSTM and GRU layers do. Build those layers with unroll=True, "
            "or use quantize='dynamic'."
        )
    try:
        return _static(content, model, examples, io_type)
    except ExportError:
        return _converter_int8(model, examples, io_type)


def _static(content: bytes, model: KerasModel, examples: Examples, io_type: IoType) -> bytes:
    from ai_edge_quantizer import calibrator, recipe, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(recipe.static_wi8_ai8())
    if io_type == "float32":
        from ai_edge_quantizer.algorithm_manager import AlgorithmName
        from ai_edge_quantizer.qtyping import TFLOperationName

        for port in (TFLOperationName.INPUT, TFLOperationName.OUTPUT):
            manager.add_quantization_config(
                regex=".*", operation_name=port, algorithm_key=AlgorithmName.NO_QUANTIZE
            )
    feeds = [_feed(model, arrays) for arrays, _ in examples.batches(model.inputs[0].shape[0])]
    with captured_output(), _explained():
        calibration = calibrator.Calibrator(
            content, num_threads=1, qsv_update_func=qsv_utils.min_max_update
        )
        calibration.calibrate({read_graph(content).signature: feeds}, manager)
        ranges = calibration.get_model_qsvs()
    return _quantized(content, manager.get_quantization_recipe(), ranges)


def _converter_int8(model: KerasModel, examples: Examples, io_type: IoType) -> bytes:
    import tensorflow as tf

    size = model.inputs[0].shape[0]
    with captured_output(), _explained():
        converter = float_converter(model, concrete_function(model))
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: (
            _feed(model, arrays) for arrays, _ in examples.batches(size)
        )
        # float kernels for what has none in int8, as in the other tool
        converter.target_spec.supported_ops = [
            tf.lite.OpsSet.TFLITE_BUILTINS_INT8,
            tf.lite.OpsSet.TFLITE_BUILTINS,
        ]
        if io_type == "int8":
            converter.inference_input_type = tf.int8
            converter.inference_output_type = tf.int8
        return bytes(converter.convert())


def _feed(model: KerasModel, arrays: tuple[Array, ...]) -> dict[str, Array]:
    return {port.name: array for port, array in zip(model.inputs, arrays, strict=True)}


def _everything(algorithm: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"regex": ".*", "operation": "*", "algorithm_key": algorithm, "op_config": dict(config)}


def _quantized(content: bytes, recipe: Any, ranges: Any = None) -> bytes:
    from ai_edge_quantizer import quantizer

    with captured_output(), _explained():
        tool = quantizer.Quantizer(content, recipe)
        result = tool.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
        return bytes(result.quantized_model)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns what the tools raise into an ExportError that says what to do."""
    try:
        yield
    except ExportError:
        raise
    # they raise whatever their internals raise
    except Exception as error:
        raise ExportError(
            f"The LiteRT tools cannot quantise this model: {type(error).__name__}: "
            f"{str(error)[:300]}. Use quantize=None, which needs no quantisation."
        ) from error
