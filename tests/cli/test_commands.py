"""What each command does with good input."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest

import tfprune
from tfprune.graph.plan import PruningPlan

from .conftest import network


def test_inspect_prints_a_table(run, files) -> None:
    outcome = run("inspect", files / "net.keras")
    assert (outcome.code, outcome.err) == (0, "")
    assert "2 of 3 channel groups can be pruned" in outcome.out
    assert "no: " in outcome.out and "head" in outcome.out


def test_inspect_layers(run, files) -> None:
    out = run("inspect", files / "net.keras", "--layers").out
    # 8*8 positions, 3*3 taps, one input channel, 16 channels
    assert f"{8 * 8 * 9 * 16:,}" in out


def test_inspect_json(run, files) -> None:
    found = run("inspect", files / "net.keras", "--json").json
    assert {group["name"]: group["prunable"] for group in found["groups"]} == {
        "first": True,
        "second": True,
        "head": False,
    }
    reasons = {group["name"]: group["reason"] for group in found["groups"]}
    assert reasons["head"] and reasons["first"] == reasons["second"]
    # two 3x3 convolutions, to 8x8 and 6x6 positions, and the dense layer
    assert found["cost"]["macs"] == 64 * 9 * 16 + 36 * 9 * 16 * 16 + 160


def test_open_size(run, files) -> None:
    assert run("inspect", files / "open.keras", "--json").json["cost"]["macs"] is None
    for text in ("10,10,3", "10x10x3"):
        found = run("inspect", files / "open.keras", "--json", "--input-shape", text)
        assert found.json["cost"]["macs"] == 64 * 27 * 16 + 32


def test_prune_by_ratio(run, files, tmp_path) -> None:
    target = tmp_path / "small.keras"
    outcome = run("prune", files / "net.keras", target, "--ratio", 0.5)
    assert (outcome.code, outcome.err) == (0, "")
    assert "masked equals pruned" in outcome.out
    small = keras.saving.load_model(target)
    assert [small.get_layer(name).filters for name in ("first", "second")] == [8, 8]
    assert [path.name for path in tmp_path.iterdir()] == ["small.keras"]


def test_prune_by_budget_is_what_the_library_does(run, files, tmp_path) -> None:
    target = tmp_path / "small.keras"
    found = run("prune", files / "net.keras", target, "--macs", 0.5, "--round-to", 1, "--json").json
    model = keras.saving.load_model(files / "net.keras")
    expected = tfprune.plan(model, macs=0.5, round_to=1)
    assert found["plan"] == {name: len(kept) for name, kept in expected.kept.items()}
    assert found["macs"][1] <= found["macs"][0] / 2
    assert found["parameters"][1] == keras.saving.load_model(target).count_params()


def test_prune_options_reach_the_plan(run, files, tmp_path) -> None:
    found = run(
        "prune", files / "net.keras", "--dry-run", "--json", "--ratio", 0.5, "--criterion", "fpgm",
        "--order", "global", "--round-to", "gpu", "--ignore", "first",
    ).json  # fmt: skip
    assert set(found["plan"]) == {"second"}
    assert found["notes"]["order"] == "global" and found["notes"]["round_to"] == "gpu"
    assert "median" in found["notes"]["criterion"].lower()


def test_min_channels(run, files) -> None:
    found = run(
        "prune", files / "net.keras", "--dry-run", "--json", "--ratio", 0.9, "--round-to", 1,
        "--min-channels", 6,
    )  # fmt: skip
    assert set(found.json["plan"].values()) == {6}


def test_dry_run_writes_nothing(run, files, tmp_path) -> None:
    target = tmp_path / "small.keras"
    outcome = run("prune", files / "net.keras", target, "--ratio", 0.5, "--dry-run")
    assert outcome.code == 0 and "Plan for a model" in outcome.out
    assert "Wrote" not in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_a_plan_out_and_in_again(run, files, tmp_path) -> None:
    plan, first, second = (tmp_path / name for name in ("plan.json", "a.keras", "b.keras"))
    source = files / "net.keras"
    assert run("prune", source, first, "--macs", 0.6, "--save-plan", plan).code == 0
    assert PruningPlan.load(plan).kept
    assert run("prune", source, second, "--plan", plan).code == 0
    a, b = (keras.saving.load_model(path).get_weights() for path in (first, second))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_plan_with_new_values_in_and_out_again(run, refused, files, tmp_path) -> None:
    source = files / "net.keras"
    first, second, small = (tmp_path / name for name in ("a.json", "b.json", "small.keras"))
    graph = tfprune.analyse(keras.saving.load_model(source))
    kernel = np.random.default_rng(0).standard_normal((3, 3, 3, 16)).astype("float32")
    kept = {"first": [0, 4, 9]}
    PruningPlan.of(graph, kept, values={"second/kernel": kernel}).save(first)
    outcome = run("prune", source, small, "--plan", first, "--save-plan", second)
    assert (outcome.code, outcome.err) == (0, "")
    assert "1 weight gets new values" in outcome.out and "masked equals pruned" in outcome.out
    written = keras.saving.load_model(small).get_layer("second").kernel
    assert np.array_equal(np.asarray(written), kernel)
    assert second.read_text() == first.read_text().replace("a.values.npz", "b.values.npz")
    found = run("prune", source, "--plan", second, "--dry-run", "--json").json
    assert found["new_values"] == ["second/kernel"]
    (tmp_path / "b.values.npz").unlink()
    assert "is not there" in refused("prune", source, small, "--plan", second)


def test_prune_with_a_data_set(run, files) -> None:
    found = run("prune", files / "net.keras", "--dry-run", "--json", "--ratio", 0.5,
                "--criterion", "apoz", "--data", "digits")  # fmt: skip
    assert found.code == 0 and set(found.json["plan"]) == {"first", "second"}


def test_h5_out(run, files, tmp_path) -> None:
    outcome = run("prune", files / "net.keras", tmp_path / "small.h5", "--ratio", 0.5)
    assert (outcome.code, outcome.err) == (0, "")
    assert keras.saving.load_model(tmp_path / "small.h5").get_layer("first").filters == 8


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("suffix", ["h5", "keras"])
def test_tf_keras_files(run, tmp_path, suffix) -> None:
    """Files that Keras 3 cannot read are opened, pruned and written by tf_keras."""
    tf_keras = pytest.importorskip("tf_keras")
    source, target = tmp_path / f"old.{suffix}", tmp_path / f"small.{suffix}"
    # TensorFlow operators become layers that only tf_keras knows
    network(tf_keras, operator=True).save(source)
    outcome = run("prune", source, target, "--ratio", 0.5)
    assert (outcome.code, outcome.err) == (0, "")
    small = tf_keras.models.load_model(target)
    assert [small.get_layer(name).filters for name in ("first", "second")] == [8, 8]
    exported = run("export", target, tmp_path / "small.tflite")
    assert (exported.code, exported.err) == (0, "")


def test_export(run, files, tmp_path) -> None:
    target = tmp_path / "net.tflite"
    outcome = run("export", files / "net.keras", target)
    assert (outcome.code, outcome.err) == (0, "")
    assert "float32" in outcome.out and str(target) in outcome.out
    assert target.read_bytes()[4:8] == b"TFL3"
    assert [path.name for path in tmp_path.iterdir()] == ["net.tflite"]


@pytest.mark.parametrize("calibration", ["images.npy", "digits"])
def test_export_int8(run, files, tmp_path, calibration) -> None:
    name = files / calibration if calibration.endswith("npy") else calibration
    target = tmp_path / "net.tflite"
    found = run("export", files / "net.keras", target, "--quantize", "int8",
                "--calibration", name, "--json")  # fmt: skip
    assert found.code == 0 and found.err == ""
    assert found.json["quantize"] == "int8"
    assert found.json["calibration_examples"] == (40 if name != "digits" else 256)
    assert found.json["size_bytes"] == target.stat().st_size


def test_export_sparse(run, files, tmp_path) -> None:
    model = keras.saving.load_model(files / "net.keras")
    kernel = model.get_layer("second").kernel
    values = kernel.numpy().copy()
    values[..., ::2, :] = 0  # half of the numbers
    kernel.assign(values)
    model.save(tmp_path / "half.keras")
    target = tmp_path / "half.tflite"
    arguments = ("export", tmp_path / "half.keras", target, "--sparse", "--quantize", "float16")
    outcome = run(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert "float16, sparse" in outcome.out and "50.0% zeros" in outcome.out
    found = run(*arguments, "--json").json
    assert [tensor["layer"] for tensor in found["sparse"]["tensors"]] == ["second"]
    assert found["sparse"]["path"]["verdict"] == "dense"
    assert found["size_bytes"] == target.stat().st_size


@pytest.fixture(scope="module")
def lite(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("lite") / "net.tflite"
    tfprune.export(keras.saving.load_model(files / "net.keras"), path)
    return path


def test_benchmark(run, files, lite) -> None:
    outcome = run("benchmark", lite, files / "net.keras", "--runs", 3, "--warmup", 0, "--no-gpu")
    assert outcome.code == 0 and outcome.out.count("CPU time") == 2


def test_benchmark_json(run, lite) -> None:
    found = run("benchmark", lite, "--runs", 3, "--no-gpu", "--profile", "--json").json[str(lite)]
    assert found["cpu"]["runs"] == 3 and found["cpu"]["median_ms"] > 0
    assert found["gpu"]["status"] == "not run"
    assert {operation["op"] for operation in found["operations"]} >= {"CONV_2D", "FULLY_CONNECTED"}


def test_compare(run, files, lite) -> None:
    outcome = run("compare", f"dense={files / 'net.keras'}", lite, "--data", "digits",
                  "--runs", 3, "--no-gpu")  # fmt: skip
    assert outcome.code == 0
    assert "dense" in outcome.out and "top-1 on 360 examples" in outcome.out


def test_compare_formats(run, files, lite) -> None:
    arguments = ("compare", f"dense={files / 'net.keras'}", f"file={lite}", "--runs", 3, "--no-gpu")
    lines = run(*arguments, "--markdown").out.splitlines()
    assert lines[0].startswith("| model | accuracy |") and lines[1].startswith("| --- | ---: |")
    rows = run(*arguments, "--json").json["rows"]
    assert [row["name"] for row in rows] == ["dense", "file"]
    # the same model, converted here and before
    assert rows[0]["size_bytes"] == rows[1]["size_bytes"]
    assert rows[0]["macs"] and rows[1]["macs"] is None
    assert rows[0]["accuracy"] is None


@pytest.mark.slow
def test_demo(run, tmp_path) -> None:
    folder = tmp_path / "made"
    outcome = run("demo", "--output", folder, "--epochs", 1, "--subset", 100, "--no-gpu", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.json == json.loads((folder / "report.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in outcome.json["rows"]}
    assert list(rows) == ["dense float32", "dense int8", "pruned float32", "pruned int8"]
    assert rows["pruned float32"]["macs"] <= rows["dense float32"]["macs"] / 2
    sizes = [rows[f"{name} {kind}"]["size_bytes"] for name in ("dense", "pruned")
             for kind in ("float32", "int8")]  # fmt: skip
    assert sizes[0] > sizes[1] and sizes[2] > sizes[3] and sizes[0] > sizes[2]
    # float32 sums in another order, see tfprune.verify
    assert outcome.json["relative_difference"] < 1e-4
    assert {path.name for path in folder.iterdir()} == {
        "dense.keras", "pruned.keras", "dense.tflite", "dense_int8.tflite", "pruned.tflite",
        "pruned_int8.tflite", "plan.json", "report.json", "comparison.png", "widths.png",
    }  # fmt: skip
