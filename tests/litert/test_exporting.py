"""tfprune.export: what is written, and that it computes what the Keras model computes."""

from __future__ import annotations

import gzip
from typing import Any

import numpy as np
import pytest

import tfprune

# Seven layers of float32 sums of at most 600 terms in another order: some ten roundings of 6e-8,
# an order of magnitude below this.
FLOAT = 1e-5


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("which", ["keras3_toy", "tf_keras_toy"])
def test_float32_equals_keras(which, request, tmp_path, images, run_litert) -> None:
    model = request.getfixturevalue(which)
    report = tfprune.export(model, tmp_path / "toy.tflite")

    got = run_litert(report.path, input=images[:1])["output"]
    assert relative(got, np.asarray(model(images[:1]))) < FLOAT
    assert report.comparison.relative_difference < FLOAT
    assert report.top1_agreement == 1.0
    # folded: three convolutions, no trace of batch normalisation, static shapes
    assert report.operations == {
        "CONV_2D": 3,
        "ADD": 1,
        "DEPTHWISE_CONV_2D": 1,
        "FULLY_CONNECTED": 1,
        "RESHAPE": 1,
    }
    content = report.path.read_bytes()
    assert report.size_bytes == len(content)
    assert report.gzip_bytes == len(gzip.compress(content, 6))
    assert str(report.inputs[0]) == "input: float32[1, 12, 12, 3]"
    assert str(report.outputs[0]) == "output: float32[1, 10]"


@pytest.mark.parametrize(
    ("quantize", "largest", "size"),
    [
        # float16 weights: 11 bits, 5e-4 each, averaging out over a sum
        ("float16", 2e-3, 0.60),
        # int8 weights: half a step of 1/127 is 4e-3 each, and the activations once more
        ("dynamic", 3e-2, 0.40),
        # int8 activations between all seven layers as well
        ("int8", 8e-2, 0.40),
    ],
)
@pytest.mark.parametrize("which", ["keras3_toy", "tf_keras_toy"])
def test_quantised_is_smaller_and_near(
    which, quantize, largest, size, request, tmp_path, images, run_litert
) -> None:
    model = request.getfixturevalue(which)
    full = tfprune.export(model, tmp_path / "full.tflite", check=False)
    report = tfprune.export(model, tmp_path / "q.tflite", quantize=quantize, calibration=images)

    assert report.size_bytes < size * full.size_bytes
    want = np.asarray(model(images[:16]))
    got = np.concatenate([run_litert(report.path, input=x[None])["output"] for x in images[:16]])
    # Not nothing, or nothing was quantised
    assert 1e-6 < relative(got, want) < largest
    assert 1e-6 < report.comparison.relative_difference < largest
    assert report.calibration_examples == (len(images) if quantize == "int8" else 0)
    assert full.comparison is None


def test_int8_keeps_the_predictions_of_a_trained_model(digits, tmp_path) -> None:
    model, train, test, labels = digits
    report = tfprune.export(
        model,
        tmp_path / "digits.tflite",
        quantize="int8",
        calibration=train,
        calibration_examples=len(train),
        check_data=(test, labels),
        check_examples=len(test),
    )
    assert report.calibration_examples == len(train)
    assert report.comparison.examples == len(test)
    # 0.970 was measured: rounding turns predictions that were near a tie, and no others
    assert report.top1_agreement > 0.95
    # 0.027 was measured. With ranges by moving average, which the quantizer takes if left alone,
    # it is 0.51, because they cut the largest values off.
    assert report.comparison.relative_difference < 0.1
    assert report.cpu.left == {}


def test_int8_inputs_and_outputs(keras3_toy, tmp_path, images, run_litert) -> None:
    report = tfprune.export(
        keras3_toy, tmp_path / "q.tflite", quantize="int8", calibration=images, io_type="int8"
    )
    (given,), (result,) = report.inputs, report.outputs
    assert (given.dtype, result.dtype) == ("int8", "int8")
    assert "QUANTIZE" not in report.operations

    integers = np.clip(np.round(images[:1] / given.scale) + given.zero_point, -128, 127)
    raw = run_litert(report.path, input=integers.astype("int8"))["output"]
    got = (raw.astype("float32") - result.zero_point) * result.scale
    # see test_quantised_is_smaller_and_near
    assert relative(got, np.asarray(keras3_toy(images[:1]))) < 8e-2


def test_operations_without_int8_kernels_stay_fast(tmp_path) -> None:
    """PRELU has no int8 kernel in XNNPACK: it is to stay in float, and in XNNPACK."""
    import keras

    model = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Conv2D(8, 3), keras.layers.PReLU(shared_axes=[1, 2])]
    )
    data = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype("float32")
    report = tfprune.export(model, tmp_path / "q.tflite", quantize="int8", calibration=data)
    assert report.operations["PRELU"] == 1
    assert report.cpu.left == {}


def test_int8_of_an_unrolled_recurrent_layer(tmp_path) -> None:
    """Its unused outputs are more than ai-edge-quantizer can calibrate; the converter can."""
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5, 4)), keras.layers.LSTM(6, unroll=True)])
    data = np.random.default_rng(0).normal(size=(32, 5, 4)).astype("float32")
    report = tfprune.export(model, tmp_path / "q.tflite", quantize="int8", calibration=data)
    # int8 through five steps of a recurrence
    assert 0 < report.comparison.relative_difference < 0.15


def test_several_inputs_and_outputs_in_any_order(tmp_path, run_litert) -> None:
    import keras

    left = keras.Input((4,), name="left")
    right = keras.Input((3,), name="right", dtype="int32")
    embedded = keras.layers.Flatten()(keras.layers.Embedding(5, 2)(right))
    both = keras.layers.Concatenate(name="both")([left, embedded])
    model = keras.Model([right, left], [both, keras.layers.Dense(2, name="head")(both)])
    report = tfprune.export(model, tmp_path / "m.tflite")

    assert [info.name for info in report.inputs] == ["right", "left"]
    assert [info.dtype for info in report.inputs] == ["int32", "float32"]
    assert [info.name for info in report.outputs] == ["both", "head"]
    rng = np.random.default_rng(0)
    x = {
        "left": rng.normal(size=(1, 4)).astype("float32"),
        "right": rng.integers(0, 5, (1, 3)).astype("int32"),
    }
    got = run_litert(report.path, **x)
    both_want, head_want = (np.asarray(y) for y in model([x["right"], x["left"]]))
    np.testing.assert_array_equal(got["both"], both_want)  # copies only
    assert relative(got["head"], head_want) < FLOAT


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_dictionaries_of_inputs_and_outputs(quantize, tmp_path) -> None:
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    outputs = {"z": keras.layers.Dense(2)(a), "y": keras.layers.Dense(5)(b)}
    model = keras.Model({"b": b, "a": a}, outputs)
    rng = np.random.default_rng(0)
    data = {name: rng.normal(size=(20, n)).astype("float32") for name, n in (("b", 3), ("a", 4))}
    dataset = tf.data.Dataset.from_tensor_slices((data, np.zeros(20))).batch(8)
    report = tfprune.export(model, tmp_path / "m.tflite", quantize=quantize, calibration=dataset)
    assert {info.name: info.shape for info in report.inputs} == {"a": (1, 4), "b": (1, 3)}
    assert {info.name: info.shape for info in report.outputs} == {"y": (1, 5), "z": (1, 2)}
    assert report.comparison.examples == 20
    # one dense layer: two roundings to int8 of inputs, weights and outputs each
    assert report.comparison.relative_difference < (FLOAT if quantize is None else 3e-2)


def test_one_tensor_as_two_outputs(tmp_path) -> None:
    import keras

    x = keras.Input((4,))
    y = keras.layers.Dense(3, name="scores")(x)
    report = tfprune.export(keras.Model(x, [y, y]), tmp_path / "m.tflite")
    assert [info.name for info in report.outputs] == ["scores", "scores_1"]
    assert len(report.comparison.outputs) == 2


def test_batch_size(keras3_toy, tmp_path, images, run_litert) -> None:
    report = tfprune.export(keras3_toy, tmp_path / "m.tflite", batch_size=4, check_data=images[:6])
    assert report.inputs[0].shape == (4, 12, 12, 3)
    assert report.comparison.examples == 6
    got = run_litert(report.path, input=images[:4])["output"]
    assert relative(got, np.asarray(keras3_toy(images[:4]))) < FLOAT


def test_open_sizes_need_an_input_shape(tmp_path) -> None:
    import keras

    x = keras.Input((None, None, 3))
    model = keras.Model(x, keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(x)))
    with pytest.raises(tfprune.errors.ArgumentError, match=r"input_shape=\(224, 224, 3\)"):
        tfprune.export(model, tmp_path / "m.tflite")
    with pytest.raises(tfprune.errors.ArgumentError, match="agree"):
        tfprune.export(model, tmp_path / "m.tflite", input_shape=(16, 16, 4))
    report = tfprune.export(model, tmp_path / "m.tflite", input_shape=(16, 20, 3))
    assert report.inputs[0].shape == (1, 16, 20, 3)


def test_the_check_can_fail(keras3_toy, tmp_path, monkeypatch) -> None:
    """A converter that returns another model's file is found out, and nothing is written."""
    import keras

    from tfprune.litert import exporting

    other = keras.models.clone_model(keras3_toy)
    other.set_weights([w * np.float32(1.001) for w in keras3_toy.get_weights()])
    true_convert = exporting.convert
    wrong = true_convert(exporting.keras_model(other))
    monkeypatch.setattr(exporting, "convert", lambda model: wrong)
    with pytest.raises(tfprune.errors.ExportError, match="Expected the LiteRT model to equal"):
        tfprune.export(keras3_toy, tmp_path / "m.tflite")
    assert list(tmp_path.iterdir()) == []
    # 1.001 to the power of a few layers
    report = tfprune.export(keras3_toy, tmp_path / "m.tflite", tolerance=0.05)
    assert 1e-4 < report.comparison.relative_difference < 0.05


def test_tolerance_judges_quantised_models_on_request(keras3_toy, tmp_path, images) -> None:
    with pytest.raises(tfprune.errors.ExportError, match=r"to 1\.0e-06"):
        tfprune.export(
            keras3_toy, tmp_path / "m", quantize="int8", calibration=images, tolerance=1e-6
        )
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_nan_are_refused(tmp_path) -> None:
    """XNNPACK divides by zero where Keras guards against it."""
    import keras

    x = keras.Input((6, 6, 2))
    y = keras.layers.ReLU()(
        keras.layers.Conv2D(4, 3, bias_initializer=lambda s, **k: -9 + 0 * keras.ops.ones(s))(x)
    )
    model = keras.Model(x, keras.layers.UnitNormalization(name="unit")(y))
    with pytest.raises(
        tfprune.errors.ExportError, match=r"'unit' has \d+ of \d+ values that are NaN"
    ):
        tfprune.export(model, tmp_path / "m.tflite")
    assert list(tmp_path.iterdir()) == []


def test_the_model_and_the_process_are_left_alone(keras3_toy, tmp_path, images, capfd) -> None:
    import os

    import keras
    import tensorflow as tf

    before = (dict(os.environ), tf.keras, keras.random.SeedGenerator(3).next().numpy().tolist())
    weights = [w.copy() for w in keras3_toy.get_weights()]
    nodes = [len(layer._inbound_nodes) for layer in keras3_toy.layers]
    np.random.seed(5)
    for quantize in (None, "float16", "dynamic", "int8"):
        tfprune.export(keras3_toy, tmp_path / "m", quantize=quantize, calibration=images)
    drawn = np.random.random()
    np.random.seed(5)

    assert drawn == np.random.random()
    assert dict(os.environ) == before[0]
    assert tf.keras is before[1]
    assert all(map(np.array_equal, weights, keras3_toy.get_weights()))
    assert nodes == [len(layer._inbound_nodes) for layer in keras3_toy.layers]
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_standard_error(keras3_toy, tmp_path, capfd) -> None:
    tfprune.export(keras3_toy, tmp_path / "m", quantize="float16", verbose=1)
    out, err = capfd.readouterr()
    assert out == ""
    assert "done" in err


def test_report_text(keras3_toy, tmp_path, images) -> None:
    report = tfprune.export(keras3_toy, tmp_path / "m", quantize="int8", calibration=images)
    rows = dict(line.split(maxsplit=1) for line in str(report).splitlines() if line[0] != " ")
    assert rows["file"] == str(tmp_path / "m")
    assert rows["kind"] == "int8, calibrated on 48 examples"
    assert rows["size"] == f"{report.size_bytes:,} bytes, {report.gzip_bytes:,} gzipped"
    assert "3 CONV_2D" in rows["operations"]
    assert rows["check"].startswith("48 examples of the calibration data: largest difference")
    assert rows["CPU"] == "XNNPACK takes all 9 operations, in 1 part"
    assert rows["GPU"] == "nothing known stands against the GPU delegate"
    with pytest.raises(AttributeError):
        report.size_bytes = 1


def test_reports_survive_pickling_and_asdict(keras3_toy, tmp_path) -> None:
    import dataclasses
    import pickle

    report: Any = tfprune.export(keras3_toy, tmp_path / "m")
    assert pickle.loads(pickle.dumps(report)) == report
    assert dataclasses.asdict(report)["comparison"]["examples"] == 8
