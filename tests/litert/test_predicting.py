"""Running LiteRT models on batches, for accuracies."""

from __future__ import annotations

import numpy as np
import pytest

import tfprune
from tfprune.errors import ArgumentError, DataError, ModelError
from tfprune.litert import Predictor, to_litert

# Between float kernels that sum in another order, see tfprune.export.
CLOSE = {"rtol": 0, "atol": 1e-4}


def test_equals_keras(keras3_toy, images) -> None:
    expected = keras3_toy.predict(images[:7], verbose=0)
    found = Predictor(to_litert(keras3_toy))(images[:7])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found / abs(expected).max(), expected / abs(expected).max(), **CLOSE)


def test_a_tf_keras_model(tf_keras_toy, images) -> None:
    expected = tf_keras_toy.predict(images[:3], verbose=0)
    found = Predictor(to_litert(tf_keras_toy))(images[:3])
    np.testing.assert_allclose(found / abs(expected).max(), expected / abs(expected).max(), **CLOSE)


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_batches_that_do_not_divide(keras3_toy, images, tmp_path, count) -> None:
    """A file with a batch size of 4 takes any number of examples, and gives as many outputs."""
    path = tmp_path / "four.tflite"
    tfprune.export(keras3_toy, path, batch_size=4)
    one = Predictor(to_litert(keras3_toy), threads=1)
    np.testing.assert_allclose(Predictor(path)(images[:count]), one(images[:count]), atol=1e-3)
    assert len(Predictor(path)(images[:count])) == count


@pytest.mark.parametrize("io_type", ["float32", "int8"])
def test_int8_takes_and_gives_floats(digits, tmp_path, io_type) -> None:
    model, train, test, labels = digits
    path = tmp_path / "int8.tflite"
    report = tfprune.export(model, path, quantize="int8", calibration=train, io_type=io_type)
    found = Predictor(path)(test)
    assert report.inputs[0].dtype == io_type and found.dtype == np.float32
    expected = model.predict(test, verbose=0)
    # As many right answers as Keras gives, give or take what rounding to int8 moves: 2 % of 397.
    right = [(outputs.argmax(-1) == labels).mean() for outputs in (found, expected)]
    assert abs(right[0] - right[1]) < 0.02 and right[1] > 0.5


def test_outputs_are_copies(keras3_toy, images) -> None:
    """The interpreter hands out its own memory, which the next run overwrites."""
    predict = Predictor(to_litert(keras3_toy))
    first = predict(images[:1])
    kept = first.copy()
    predict(images[1:2])
    np.testing.assert_array_equal(first, kept)


def test_wrong_shapes(keras3_toy, images) -> None:
    predict = Predictor(to_litert(keras3_toy))
    with pytest.raises(DataError, match=r"Expected examples of shape \(12, 12, 3\)"):
        predict(images[:2, :5])
    with pytest.raises(DataError, match=r"Received: \(12, 3\)"):
        predict(images[0])


def test_two_outputs_are_refused() -> None:
    import keras

    inputs = keras.Input((4,))
    model = keras.Model(inputs, [keras.layers.Dense(2)(inputs), keras.layers.Dense(3)(inputs)])
    with pytest.raises(ModelError, match="1 inputs and 2 outputs"):
        Predictor(to_litert(model))


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(ArgumentError, match=r"nowhere\.tflite"):
        Predictor(tmp_path / "nowhere.tflite")
    (tmp_path / "text.tflite").write_text("hello", encoding="utf-8")
    with pytest.raises(ModelError):
        Predictor(tmp_path / "text.tflite")
