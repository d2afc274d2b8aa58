"""compare(): what it says is what one would measure by hand."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest

import tfprune
from tfprune.cost import measure
from tfprune.errors import ArgumentError, DataError, ModelError
from tfprune.reports import Comparison, Row

FAST = {"runs": 2, "gpu": False}


def test_accuracy_by_litert_is_that_of_keras(trained) -> None:
    # Trained a little: neither perfect nor by chance, so that equality says something.
    assert 0.3 < trained.accuracy < 1
    small = tfprune.prune(trained.model, 0.5)
    found = tfprune.compare(
        {"dense": trained.model, "pruned": small, "file": trained.file},
        (trained.x, trained.y),
        **FAST,
    )
    dense, pruned, file = found.rows
    assert found.examples == 360
    assert dense.accuracy == file.accuracy == trained.accuracy
    predicted = small.predict(trained.x, verbose=0).argmax(-1)
    assert pruned.accuracy == (predicted == trained.y).mean()
    assert pruned.accuracy != dense.accuracy


def test_costs_and_sizes(trained) -> None:
    small = tfprune.prune(trained.model, 0.5)
    rows = tfprune.compare({"dense": trained.model, "pruned": small}, **FAST).rows
    for row, model in zip(rows, (trained.model, small), strict=True):
        assert row.macs == measure(model).macs
        assert row.parameters == model.count_params()
        assert row.accuracy is None and row.gpu == "" and row.latency_ms > 0
    assert rows[0].size_bytes == trained.file.stat().st_size > rows[1].size_bytes


def test_a_pair_takes_costs_from_the_model_and_the_rest_from_the_file(trained, tmp_path) -> None:
    path = tmp_path / "int8.tflite"
    tfprune.export(trained.model, path, quantize="int8", calibration=trained.splits.train)
    found = tfprune.compare({"int8": (trained.model, path)}, trained.splits.test, **FAST)
    (row,) = found.rows
    assert row.size_bytes == path.stat().st_size
    assert row.macs == measure(trained.model).macs
    # Rounding to int8 moves a few of the 360 digits over the border, not whole classes.
    assert abs(row.accuracy - trained.accuracy) < 0.05


@pytest.mark.parametrize(
    "labels",
    [lambda y: np.eye(10)[y], lambda y: y[:, None], lambda y: y.astype("float32")],
    ids=["one-hot", "a column", "floats"],
)
def test_labels_of_every_kind(trained, labels) -> None:
    (row,) = tfprune.compare({"file": trained.file}, (trained.x, labels(trained.y)), **FAST).rows
    assert row.accuracy == trained.accuracy


def test_a_wrong_answer_counts_as_wrong(trained) -> None:
    wrong = (trained.y + 1) % 10
    (row,) = tfprune.compare({"file": trained.file}, (trained.x, wrong), **FAST).rows
    assert row.accuracy < 0.5 < trained.accuracy + 0.2


def test_refusals(trained, tmp_path) -> None:
    with pytest.raises(ArgumentError, match="at least one model"):
        tfprune.compare({})
    with pytest.raises(ArgumentError, match=r"nowhere\.tflite"):
        tfprune.compare({"a": tmp_path / "nowhere.tflite"}, **FAST)
    with pytest.raises(DataError, match="Labels are needed"):
        tfprune.compare({"a": trained.file}, trained.x, **FAST)
    with pytest.raises(DataError, match=r"\(8, 8, 1\)"):
        tfprune.compare({"a": trained.file}, (np.zeros((4, 9, 9, 1)), np.zeros(4)), **FAST)
    with pytest.raises(ModelError, match="subclassed"):
        tfprune.compare({"a": _subclassed()}, **FAST)


def test_an_accuracy_needs_classes() -> None:
    inputs = keras.Input((4, 4, 1))
    model = keras.Model(inputs, keras.layers.Conv2D(2, 1)(inputs))
    with pytest.raises(DataError, match="Leave data out"):
        tfprune.compare({"maps": model}, (np.zeros((2, 4, 4, 1)), np.zeros(2)), **FAST)


def _subclassed():
    class Mine(keras.Model):
        def call(self, x):
            return x

    return Mine()


def _comparison(count: int = 2) -> Comparison:
    rows = [
        Row(f"model {n}", 0.5, 10**6 // (n + 1), 1000, 4000, 1.0 / (n + 1), "")
        for n in range(count)
    ]
    return Comparison(tuple(rows), "a processor", 200)


def test_text(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = str(_comparison())
    second = next(line for line in text.splitlines() if line.startswith("model 1"))
    assert second.split() == ["model", "1", "50.00", "%", "0.5", "M", "50.0", "%", "1,000",
                              "4.0", "kB", "0.5", "ms", "2.00", "×", "–"]  # fmt: skip
    assert "200 examples; one of them is 0.50 %" in text


def test_narrow_terminals_get_one_column_for_each_model(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = str(_comparison()).splitlines()
    assert lines[0].split() == ["model", "0", "model", "1"]
    assert next(line for line in lines if line.startswith("speed-up")).split()[1:] == [
        "1.00", "×", "2.00", "×",
    ]  # fmt: skip
    # too many for that: as wide as it takes, with nothing left out
    assert str(_comparison(20)).splitlines()[0].split()[-1] == "delegate"


def test_markdown_and_json() -> None:
    text = _comparison().to_markdown()
    assert text.startswith("| model | accuracy | MACs |") and "| model 1 | 50.00 % |" in text
    found = json.loads(json.dumps(_comparison().as_dict()))
    assert found["examples"] == 200 and found["rows"][1]["name"] == "model 1"
