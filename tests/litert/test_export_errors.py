"""Requests that cannot be met, and files that appear whole or not at all."""

from __future__ import annotations

import os
import re
import stat

import numpy as np
import pytest

import tfprune
from tfprune.errors import ArgumentError, DataError, ExportError, FileError, ModelError
from tfprune.litert import exporting


@pytest.fixture
def no_work(monkeypatch) -> None:
    """Makes beginning to convert a failure."""

    def convert(model: object) -> bytes:
        pytest.fail("the conversion was begun")

    monkeypatch.setattr(exporting, "convert", convert)


@pytest.mark.usefixtures("no_work")
class TestBeforeAnyWork:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"quantize": "int4"}, "'float16', 'dynamic', 'int8'"),
            ({"quantize": "int8"}, r"calibration=train_dataset.take\(8\)"),
            ({"io_type": "int8"}, "quantize='int8' with io_type='int8'"),
            ({"io_type": "int16"}, "io_type to be one of"),
            ({"batch_size": 0}, "batch_size of 1 or more"),
            ({"check": np.zeros(3)}, "go into check_data"),
            ({"tolerance": float("nan")}, "tolerance to be None or positive"),
            ({"check_examples": 0}, "check_examples to be 1 or more"),
            ({"calibration_examples": True}, "calibration_examples to be 1 or more"),
            ({"input_shape": {"nose": (3,)}}, "Expected names among"),
        ],
    )
    def test_arguments(self, keras3_toy, tmp_path, arguments, message) -> None:
        with pytest.raises(ArgumentError, match=message):
            tfprune.export(keras3_toy, tmp_path / "m.tflite", **arguments)
        assert list(tmp_path.iterdir()) == []

    def test_directory_that_does_not_exist(self, keras3_toy, tmp_path) -> None:
        with pytest.raises(ArgumentError, match="Create it first"):
            tfprune.export(keras3_toy, tmp_path / "nowhere" / "m.tflite")

    def test_path_of_a_directory(self, keras3_toy, tmp_path) -> None:
        with pytest.raises(ArgumentError, match="Received a directory"):
            tfprune.export(keras3_toy, tmp_path)

    def test_no_path(self, keras3_toy) -> None:
        with pytest.raises(ArgumentError, match="path of the file to write"):
            tfprune.export(keras3_toy, 7)

    def test_file_system_that_refuses(self, keras3_toy, tmp_path, monkeypatch) -> None:
        def refuse(*arguments: object) -> int:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(FileError, match="Read-only file system"):
            tfprune.export(keras3_toy, tmp_path / "m.tflite")

    def test_weights_that_are_nan(self, tmp_path) -> None:
        import keras

        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="sick")])
        kernel = model.layers[0].kernel.numpy()
        kernel[1, 2] = np.nan
        model.layers[0].kernel.assign(kernel)
        with pytest.raises(ModelError, match="sick/kernel' has 1 of 12 values"):
            tfprune.export(model, tmp_path / "m.tflite")

    def test_models_of_other_kinds(self, tmp_path) -> None:
        import keras

        class Mine(keras.Model):
            def call(self, x):  # type: ignore[no-untyped-def]
                return x

        mine = Mine()
        mine(np.zeros((1, 3), "float32"))
        for model, message in (
            (mine, r"Wrap it: x = keras.Input"),
            (keras.Sequential([keras.layers.Dense(2)]), "has not been built"),
            ("model.keras", "Received an object of type builtins.str"),
        ):
            with pytest.raises(ModelError, match=message):
                tfprune.export(model, tmp_path / "m.tflite")

    def test_half_precision(self, tmp_path) -> None:
        import keras

        inner = keras.Sequential([keras.layers.Dense(2, dtype="mixed_float16", name="half")])
        model = keras.Sequential([keras.Input((4,)), inner])
        with pytest.raises(ModelError, match="'half' computes in float16"):
            tfprune.export(model, tmp_path / "m.tflite")

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (np.zeros((0, 12, 12, 3)), "In calibration: The data are empty"),
            (np.zeros((12, 12, 3)), r"Received: \(12, 12, 3\)\. It seems not to be batched"),
            (np.zeros((5, 12, 12, 1)), r"Received: \(5, 12, 12, 1\)\.$"),
            (np.full((2, 12, 12, 3), np.nan), "Expected finite numbers"),
            (np.zeros((2, 12, 12, 3), complex), "Expected float32 .* Received: complex128"),
            ({"picture": np.zeros((2, 12, 12, 3))}, r"Received the keys \['picture'\]"),
            ([np.zeros((2, 12, 12, 3))] * 2, r"as many inputs as \['input'\]\. Received 2"),
            (3, "In calibration: Expected a tf.data.Dataset of batches"),
        ],
    )
    def test_data(self, keras3_toy, tmp_path, data, message) -> None:
        with pytest.raises(DataError, match=message):
            tfprune.export(keras3_toy, tmp_path / "m", quantize="int8", calibration=data)
        assert list(tmp_path.iterdir()) == []


def test_data_of_every_form_are_the_same(keras3_toy, tmp_path, images) -> None:
    import tensorflow as tf

    labels = np.zeros(len(images))
    dataset = tf.data.Dataset.from_tensor_slices
    forms = [
        images,
        (images, labels),
        images.astype("float64"),
        [images],
        {"input": images},
        dataset(images).batch(32),
        dataset((images, labels)).batch(5),
        dataset((images, labels)).batch(48).repeat(),  # without end
    ]
    written = []
    for form in forms:
        report = tfprune.export(
            keras3_toy, tmp_path / "m", quantize="int8", calibration=form, calibration_examples=48
        )
        assert report.calibration_examples == 48
        written.append(report.path.read_bytes())
    assert all(content == written[0] for content in written)


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("my_erf", "erf", r"tf\.Erf in 'my_erf': use keras\.activations\.gelu"),
        ("lookup", "argmax", r"tf\.BitwiseAnd.*: keras\.ops\.argmax lowers to it"),
    ],
)
def test_operations_without_counterpart(name, function, message, tmp_path, capfd) -> None:
    import keras

    x = keras.Input((4, 4, 2))
    y = keras.layers.Conv2D(3, 1, name="stem")(x)
    y = keras.layers.Lambda(getattr(keras.ops, function), name=name)(y)
    with pytest.raises(ExportError, match=message):
        tfprune.export(keras.Model(x, y), tmp_path / "m.tflite")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_loops_in_int8(tmp_path) -> None:
    import keras

    model = keras.Sequential([keras.Input((5, 4)), keras.layers.GRU(3, name="gru_of_mine")])
    data = np.zeros((2, 5, 4), "float32")
    with pytest.raises(ExportError, match=r"has WHILE.*unroll=True"):
        tfprune.export(model, tmp_path / "m", quantize="int8", calibration=data)
    report = tfprune.export(model, tmp_path / "m", quantize="dynamic")
    assert "WHILE: no GPU delegate has it" in re.sub(r" \(.*?\)", "", str(report.gpu))


class TestAtomicity:
    @pytest.fixture
    def old(self, tmp_path):
        path = tmp_path / "m.tflite"
        path.write_bytes(b"the old file")
        return path

    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
    @pytest.mark.parametrize("stage", ["convert", "compare"])
    def test_what_stood_there_survives(self, keras3_toy, old, monkeypatch, error, stage) -> None:
        def stop(*arguments: object) -> None:
            raise error

        monkeypatch.setattr(exporting, stage, stop)
        with pytest.raises(error):
            tfprune.export(keras3_toy, old)
        assert [path.name for path in old.parent.iterdir()] == ["m.tflite"]
        assert old.read_bytes() == b"the old file"

    def test_full_disk(self, keras3_toy, old, monkeypatch) -> None:
        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match="No space left on device"):
            tfprune.export(keras3_toy, old)
        assert [path.name for path in old.parent.iterdir()] == ["m.tflite"]
        assert old.read_bytes() == b"the old file"

    def test_replaces_with_ordinary_permissions(self, keras3_toy, old) -> None:
        mask = os.umask(0o027)
        try:
            report = tfprune.export(keras3_toy, old)
        finally:
            os.umask(mask)
        assert old.read_bytes()[4:8] == b"TFL3"
        assert stat.S_IMODE(old.stat().st_mode) == 0o640
        assert [path.name for path in old.parent.iterdir()] == ["m.tflite"]
        assert report.path == old

    def test_follows_links(self, keras3_toy, old, tmp_path) -> None:
        (tmp_path / "link").symlink_to(old)
        tfprune.export(keras3_toy, tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert old.read_bytes()[4:8] == b"TFL3"
