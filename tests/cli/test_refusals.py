"""Bad input: the right exit code, one clear message, nothing written."""

from __future__ import annotations

import json
import os
import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest

from tfprune.cli import commands
from tfprune.errors import ModelError
from tfprune.loading import load_model

from .conftest import network


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("missing.keras", "does not exist"),
        ("truncated.keras", "damaged"),
        ("empty.keras", "damaged"),
        ("other.keras", "damaged or of another kind"),
        ("folder.keras", "Expected a .keras or .h5 file"),
        ("text.h5", "damaged"),
        ("garbled.h5", "damaged"),
        ("lambda.keras", "holds a Lambda layer; loading it could run anything"),
        ("lambda.h5", "holds a Lambda layer; loading it could run anything"),
        ("only.weights.h5", "holds weights only"),
        ("subclassed.keras", "needs the class 'Mine'"),
    ],
)
def test_files_that_are_no_model(refused, bad, tmp_path, name, text) -> None:
    message = refused("prune", bad / name, tmp_path / "small.keras", "--ratio", 0.5)
    assert text in message and name in message
    assert list(tmp_path.iterdir()) == []


def test_nan(refused, bad, tmp_path) -> None:
    message = refused("prune", bad / "nan.keras", tmp_path / "small.keras", "--ratio", 0.5)
    assert "1 of 144 values of 'first/kernel' are NaN" in message
    assert "NaN" in refused("export", bad / "nan.keras", tmp_path / "small.tflite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--macs", "0.001"], "reach"),
        (["--ratio", "0.01"], "removes channels"),
        (["--ratio", "0.5", "--criterion", "magic"], "l1, l2, bn_scale"),
        (["--ratio", "0.5", "--criterion", "taylor"], "Expected data"),
        (["--ratio", "0.5", "--criterion", "apoz", "--data", "cifar11"], "cifar10"),
        (["--ratio", "0.5", "--round-to", "tpu"], "cpu_int8"),
        (["--ratio", "0.5", "--ignore", "nothing*"], "nothing*"),
    ],
)
def test_requests_that_cannot_be_met(refused, files, tmp_path, options, text) -> None:
    message = refused("prune", files / "net.keras", tmp_path / "small.keras", *options)
    assert text in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["prune", "a.keras", "b.keras"], "--ratio 0.5, or a budget such as --macs 0.5"),
        (["prune", "a.keras", "--ratio", "0.5"], "expected OUTPUT"),
        (["prune", "a.keras", "b.keras", "--ratio", "0.5", "--macs", "0.5"], "either --ratio or"),
        (["prune", "a.keras", "b.keras", "--plan", "p", "--criterion", "l2"], "--criterion"),
        (["prune", "a.keras", "b.keras", "--ratio", "1.5"], "from 0 up to but not including 1"),
        (["prune", "a.keras", "b.keras", "--macs", "half"], "a fraction such as 0.5"),
        (["prune", "a.keras", "b.keras", "--ratio", "0.5", "--round-to", "-8"], "number from 1"),
        (["prune", "a.keras", "b.keras", "--ratio", "0.5", "--round-to", "8.5"], "number from 1"),
        (["prune", "a.keras", "b.keras", "--ratio", "0.5", "--order", "best"], "choose from"),
        (["inspect", "a.keras", "--input-shape", "3y3"], "such as 224,224,3, not '3y3'"),
        (["inspect", "a.keras", "--input-shape", "0,3"], "positive sizes"),
        (["benchmark", "a.tflite", "--runs", "0"], "a whole number from 1, not '0'"),
        (["benchmark"], "MODEL"),
        (["demo", "--epochs", "few"], "a whole number from 1, not 'few'"),
        (["prunes"], "invalid choice"),
        (["export", "a.keras", "b.tflite", "--quantize", "int4"], "choose from"),
    ],
)
def test_wrong_usage(refused, arguments, text) -> None:
    message = refused(*arguments, code=2)
    assert text in message and message.startswith("usage: tfprune")


def test_outputs_are_checked_before_anything_is_loaded(refused, files, bad, tmp_path) -> None:
    source, damaged = files / "net.keras", bad / "truncated.keras"
    request = ("--ratio", 0.5)
    missing = tmp_path / "nowhere" / "small.keras"
    assert "not a directory" in refused("prune", damaged, missing, *request)
    assert "ending in .keras" in refused("prune", damaged, tmp_path / "x.txt", *request)
    assert "ending in .tflite" in refused("export", damaged, tmp_path / "x.keras")
    assert "the whole model would be lost" in refused("prune", source, source, *request)
    target = tmp_path / "small.keras"
    message = refused("prune", source, target, *request, "--save-plan", tmp_path)
    assert "directory" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission(refused, files, tmp_path) -> None:
    tmp_path.chmod(0o500)
    try:
        target = tmp_path / "small.keras"
        assert "Cannot write" in refused("prune", files / "net.keras", target, "--ratio", 0.5)
    finally:
        tmp_path.chmod(0o700)


def test_an_old_file_survives_a_failure(refused, bad, tmp_path) -> None:
    target = tmp_path / "small.keras"
    target.write_bytes(b"precious")
    refused("prune", bad / "nan.keras", target, "--ratio", 0.5)
    assert target.read_bytes() == b"precious"


def test_wrong_plans(refused, run, files, tmp_path) -> None:
    target = tmp_path / "small.keras"
    plan = tmp_path / "plan.json"
    source = files / "net.keras"
    assert "can be read" in refused("prune", source, target, "--plan", plan)
    plan.write_text("{", encoding="utf-8")
    assert "damaged or no JSON" in refused("prune", source, target, "--plan", plan)
    plan.write_text("{}", encoding="utf-8")
    assert "JSON of another kind" in refused("prune", source, target, "--plan", plan)
    made = run("prune", files / "open.keras", "--ratio", 0.5, "--dry-run", "--save-plan", plan)
    assert made.code == 0
    assert "fingerprint" in refused("prune", source, target, "--plan", plan)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY\x01\x00v\x00{"])
def test_calibration_files(refused, files, tmp_path, content) -> None:
    array = tmp_path / "images.npy"
    array.write_bytes(content)
    message = refused("export", files / "net.keras", tmp_path / "net.tflite",
                      "--quantize", "int8", "--calibration", array)  # fmt: skip
    assert "Expected an .npy file of numbers" in message
    assert not (tmp_path / "net.tflite").exists()


def test_pickles_stay_closed(refused, files, tmp_path) -> None:
    np.save(tmp_path / "images.npy", np.array([{}], dtype=object), allow_pickle=True)
    message = refused("export", files / "net.keras", tmp_path / "net.tflite",
                      "--quantize", "int8", "--calibration", tmp_path / "images.npy")  # fmt: skip
    assert "allow_pickle=False" in message


def test_int8_needs_calibration(refused, files, tmp_path) -> None:
    message = refused("export", files / "net.keras", tmp_path / "n.tflite", "--quantize", "int8")
    assert "Expected calibration data" in message


def test_sparse_needs_zeros_and_a_type_that_works(refused, files, tmp_path) -> None:
    target = tmp_path / "net.tflite"
    message = refused("export", files / "net.keras", target, "--sparse")
    assert "0.0% zeros" in message and "prune_low_magnitude" in message
    message = refused("export", files / "net.keras", target, "--sparse", "--quantize", "dynamic")
    assert "quantize='float16' with sparse=True" in message
    assert list(tmp_path.iterdir()) == []


def test_data_of_another_shape(refused, files) -> None:
    message = refused("prune", files / "open.keras", "--dry-run", "--ratio", 0.5,
                      "--criterion", "apoz", "--data", "digits")  # fmt: skip
    assert "Expected batches of shape (None, None, None, 3); received (128, 8, 8, 1)" in message


def test_compare_and_benchmark_refuse(refused, files, tmp_path) -> None:
    assert "missing.tflite" in refused("benchmark", "missing.tflite")
    (tmp_path / "text.tflite").write_text("hello", encoding="utf-8")
    assert "LiteRT" in refused("benchmark", tmp_path / "text.tflite")
    twice = files / "net.keras"
    assert "'net' twice" in refused("compare", twice, twice)


def test_demo_refuses_before_it_makes_a_folder(refused, tmp_path) -> None:
    folder = tmp_path / "made"
    assert "fashion_mnist" in refused("demo", "--dataset", "dogs", "--output", folder)
    assert not folder.exists()
    # data that cannot be had are noticed later
    message = refused("demo", "--subset", 10**6, "--output", folder, "--quiet")
    assert "1000000 examples are asked for" in message
    assert not folder.exists()
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "a folder that can be written" in refused("demo", "--output", tmp_path / "file")


def test_what_nobody_foresaw(run, files, monkeypatch) -> None:
    """No stack of frames, but a way to get it."""

    def fail(options) -> int:
        raise ValueError("something\nlong")

    monkeypatch.setattr(commands, "inspect", fail)
    outcome = run("inspect", files / "net.keras")
    assert outcome.code == 1
    assert "unexpected ValueError: something\n" in outcome.err and "--debug" in outcome.err
    with pytest.raises(ValueError, match="something"):
        run("inspect", files / "net.keras", "--debug")


def test_a_failed_check_is_a_code_of_its_own(run, files, tmp_path, monkeypatch) -> None:
    found = commands.tfprune.verify
    monkeypatch.setattr(
        commands.tfprune, "verify", lambda *a, **k: found(*a, tolerance=-1.0, **k), raising=False
    )
    outcome = run("prune", files / "net.keras", tmp_path / "small.keras", "--ratio", 0.5)
    assert outcome.code == 3 and "DIFFER" in outcome.err and outcome.out == ""
    assert list(tmp_path.iterdir()) == []


def _keras2_file(tmp_path, change):
    """A file of tf_keras with a changed configuration."""
    tf_keras = pytest.importorskip("tf_keras")
    source, target = tmp_path / "old.keras", tmp_path / "changed.keras"
    network(tf_keras, operator=True).save(source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                change({layer["config"]["name"]: layer for layer in config["config"]["layers"]})
                content = json.dumps(config).encode()
            new.writestr(name, content)
    return target


def test_tf_keras_imports_no_foreign_module(tmp_path) -> None:
    def change(layers) -> None:
        layers["relu"]["module"], layers["relu"]["registered_name"] = "antigravity", "Fly"

    with pytest.raises(ModelError, match=r"antigravity.ReLU"):
        load_model(_keras2_file(tmp_path, change))


def test_tf_keras_calls_no_builtin(tmp_path) -> None:
    def change(layers) -> None:
        layers["first"]["config"]["activation"] = {
            "module": "builtins", "class_name": "function", "config": "print",
            "registered_name": "function",
        }  # fmt: skip

    with pytest.raises(ModelError, match=r"builtins.print"):
        load_model(_keras2_file(tmp_path, change))


def test_tf_keras_writes_no_file(tmp_path) -> None:
    def change(layers) -> None:
        operator = next(layer for layer in layers.values() if layer["class_name"] == "TFOpLambda")
        operator["config"]["function"] = "io.write_file"

    with pytest.raises(ModelError, match=r"io.write_file"):
        load_model(_keras2_file(tmp_path, change))


def test_tf_keras_files_without_tf_keras(tmp_path, monkeypatch) -> None:
    path = _keras2_file(tmp_path, lambda layers: None)
    monkeypatch.setitem(sys.modules, "tf_keras", None)
    with pytest.raises(ModelError, match="pip install 'tf_keras"):
        load_model(path)


def test_an_h5_file_of_keras2_operations_without_tf_keras(tmp_path, monkeypatch) -> None:
    config = {"class_name": "Functional", "config": {"layers": [
        {"class_name": "TFOpLambda", "config": {"function": "math.add"}}]}}  # fmt: skip
    with h5py.File(tmp_path / "old.h5", "w") as archive:
        archive.attrs["model_config"] = json.dumps(config)
    monkeypatch.setitem(sys.modules, "tf_keras", None)
    with pytest.raises(ModelError, match=r"is of Keras 2 .* pip install 'tf_keras"):
        load_model(tmp_path / "old.h5")


def test_an_h5_file_with_a_class_that_nobody_knows(tmp_path) -> None:
    config = {"class_name": "Sequential", "config": {"name": "s", "layers": [
        {"class_name": "Swirl", "config": {"name": "swirl"}}]}}  # fmt: skip
    with h5py.File(tmp_path / "old.h5", "w") as archive:
        archive.attrs["model_config"] = json.dumps(config)
    with pytest.raises(ModelError, match="needs the class 'Swirl'"):
        load_model(tmp_path / "old.h5")


def test_safe_mode_is_asked_for(files, monkeypatch) -> None:
    asked = {}
    loaded = keras.saving.load_model

    def load(path, **options):
        asked.update(options)
        return loaded(path, **options)

    monkeypatch.setattr(keras.saving, "load_model", load)
    load_model(files / "net.keras")
    assert asked == {"compile": False, "safe_mode": True}
