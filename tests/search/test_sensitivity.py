"""Sensitivity analysis: sheet A1, step 2."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tfprune
from tests import toys
from tests.search.models import DISTANCE, examples, network, squares, trained, validation
from tfprune.criteria.scores import Scores
from tfprune.errors import ArgumentError, DataError
from tfprune.search import Metric, Retraining, SensitivityAnalysis, sensitivity_analysis

RATIOS = (0.25, 0.5, 0.9)


def analyse(model=None, data=None, **options):
    options = {"ratios": RATIOS, "metric": DISTANCE, "progress": False, **options}
    data = validation() if data is None else data
    return sensitivity_analysis(model or trained(), data, **options)


@pytest.fixture(scope="module")
def analysis():
    return analyse()


def test_each_value_is_that_of_the_pruned_model(analysis):
    """Every (group, ratio) by the ordinary way: plan, apply, predict."""
    model, (x, y) = trained(), validation()
    assert analysis.dense == pytest.approx(squares(y, model.predict(x, verbose=0)), rel=2e-5)
    assert list(analysis.groups) == ["conv0", "conv1", "conv2"]
    for name, group in analysis.groups.items():
        for ratio, kept, value in zip(RATIOS, group.kept, group.values, strict=True):
            plan = tfprune.plan(model, {name: ratio}, round_to=1)
            assert len(plan.kept[name]) == kept
            found = squares(y, plan.apply(model).predict(x, verbose=0))
            assert value == pytest.approx(found, rel=2e-5)


def test_kept_channels_and_stages(analysis):
    """floor(width (1 - p) + 1e-9), at least 1: widths 6, 8, 10; maps halve behind conv1."""
    assert [g.kept for g in analysis.groups.values()] == [(4, 3, 1), (6, 4, 1), (7, 5, 1)]
    assert [g.size for g in analysis.groups.values()] == [(6, 6), (6, 6), (3, 3)]
    assert all(group.retrained is None for group in analysis.groups.values())


def test_the_accuracy_by_default():
    found = analyse(metric=None, groups=["conv1"], ratios=[0.9, 0.5])
    x, y = validation()
    model = trained()
    assert found.metric == "accuracy" and found.larger_is_better and found.ratios == (0.5, 0.9)
    assert found.dense == (model.predict(x, verbose=0).argmax(1) == y).mean() >= 0.9
    small = tfprune.prune(model, {"conv1": 0.9}, round_to=1)
    expected = (small.predict(x, verbose=0).argmax(1) == y).mean()
    assert found.groups["conv1"].values[1] == expected < found.dense
    (curve,) = found.curves().values()
    assert curve.drops[1] == pytest.approx(found.dense - expected)


def test_smaller_is_better(analysis):
    for name, curve in analysis.curves().items():
        values = np.array(analysis.groups[name].values)
        np.testing.assert_allclose(curve.drops, values - analysis.dense)


def test_a_width_is_measured_once():
    """A group of five channels keeps one at 80 % and at 90 %."""
    calls = []

    def counted(labels, outputs):
        calls.append(1)
        return squares(labels, outputs)

    model = network(widths=(5, 4))
    found = analyse(model, metric=Metric(counted, False), ratios=[0.1 * k for k in range(1, 10)])
    group = found.groups["conv0"]
    assert group.kept == (4, 4, 3, 3, 2, 2, 1, 1, 1)
    assert group.values[0] == group.values[1] and group.values[7] == group.values[8]
    assert len(calls) == 1 + 4 + 3


def test_batch_normalisation_estimated_anew():
    x = examples(75, seed=2)[0]
    dataset = tf.data.Dataset.from_tensor_slices(x).batch(25).repeat()
    found = analyse(recalibrate=dataset, recalibration_batches=3, groups=["conv0"])
    small = tfprune.prune(trained(), {"conv0": 0.5}, round_to=1)
    tfprune.recalibrate_batch_norm(small, x, batch_size=25)
    images, y = validation()
    expected = squares(y, small.predict(images, verbose=0))
    assert found.groups["conv0"].values[1] == pytest.approx(expected, rel=2e-5)
    whole = network()
    whole.set_weights(trained().get_weights())
    tfprune.recalibrate_batch_norm(whole, x, batch_size=25)
    # The same for the dense model, so that what the statistics change is no drop.
    assert found.dense == pytest.approx(squares(y, whole.predict(images, verbose=0)), rel=2e-5)


def test_retraining():
    """b(p): pruned for real and trained as fine_tune does it, with its seed."""
    train = examples(60, seed=3)
    options = Retraining(epochs=2, learning_rate=0.01, batches=2, batch_size=20, seed=4)
    found = analyse(retrain=options, train=train, groups=["conv1"], ratios=[0.5])
    small = tfprune.prune(trained(), {"conv1": 0.5}, round_to=1)
    x, y = train[0][:40], train[1][:40]
    tfprune.fine_tune(small, (x, y), epochs=2, learning_rate=0.01, batch_size=20, seed=4, verbose=0)
    images, labels = validation()
    expected = squares(labels, small.predict(images, verbose=0))
    group = found.groups["conv1"]
    assert group.retrained == (pytest.approx(expected, rel=1e-4),)
    assert group.values == analyse(groups=["conv1"], ratios=[0.5]).groups["conv1"].values
    assert group.values != group.retrained
    assert found.curves(retrained=True)["conv1"].drops == (
        pytest.approx(expected - found.dense, rel=1e-3),
    )
    assert "After retraining" in str(found)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": ["conv1", "conv2"]},
        {"groups": ["conv1"], "retrain": Retraining(seed=1), "train": examples(32)},
    ],
    ids=["masked", "retrained"],
)
def test_resuming_gives_the_same_file(tmp_path, options):
    """Interrupted after three of five measurements, and gone on with: the same bytes."""
    options = {"ratios": [0.5, 0.9], **options}
    calls = []

    def squares_until(labels, outputs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return squares(labels, outputs)

    metric = Metric(squares_until, False, "squares")
    with pytest.raises(KeyboardInterrupt):
        analyse(metric=metric, path=tmp_path / "a.json", **options)
    half = json.loads((tmp_path / "a.json").read_text())
    assert list(half["results"]) == ["dense", "conv1 at 4", "conv1 at 1"]
    with pytest.raises(ArgumentError, match=r"finished analysis.*lacks 2 of 5"):
        SensitivityAnalysis.load(tmp_path / "a.json")
    first = analyse(metric=metric, path=tmp_path / "a.json", **options)
    second = analyse(path=tmp_path / "b.json", **options)
    assert first == second == SensitivityAnalysis.load(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    first.save(tmp_path / "c.json")
    assert (tmp_path / "c.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    # Everything is there: nothing is measured again.
    before = len(calls)
    assert analyse(metric=metric, path=tmp_path / "a.json", **options) == first
    assert len(calls) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "c.json"]


def test_files_of_another_analysis(tmp_path):
    path = tmp_path / "file.json"
    options = {"groups": ["conv0"], "ratios": [0.5], "path": path}
    analyse(**options)
    content = path.read_bytes()
    other = network()
    other.set_weights(trained().get_weights())
    analyse(other, **options)  # the same model, however it came about
    other.layers[1].bias.assign_add(np.ones(6, "float32"))
    changes = {
        "weights": {"model": other},
        "model": {"model": network(widths=(6, 8, 11))},
        "validation": {"data": examples(48, seed=7)},
        "ratios": {"ratios": [0.5, 0.6]},
        "criterion": {"criterion": "l2"},
        "metric": {"metric": None},
        "recalibration": {"recalibrate": examples(9)[0]},
        "retraining": {"retrain": Retraining(), "train": examples(9)},
        "groups": {"groups": ["conv1"]},
    }
    for what, change in changes.items():
        with pytest.raises(ArgumentError, match=f"same search.*differs in .*{what}: "):
            analyse(**{**options, **change})
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": "tfprune plan"}', '{"format": "tfprune sensitivity"}',
     '{"format": "tfprune sensitivity", "version": 9, "settings": {}, "results": {}}',
     '{"format": "tfprune sensitivity", "version": 1, "settings": {}, "results": {}}',
     '{"format": "tfprune sensitivity", "version": 1, "settings": [], "results": {"a": "b"}}'],
    ids=range(9),
)  # fmt: skip
def test_damaged_files(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=r"Received: .*file.json"):
        SensitivityAnalysis.load(path)
    with pytest.raises(ArgumentError, match=r"file.json"):
        analyse(groups=["conv0"], path=path)
    assert path.read_text() == text


def test_damage_inside(tmp_path, analysis):
    path = tmp_path / "file.json"
    analysis.save(path)
    document = json.loads(path.read_text())
    document["settings"]["groups"]["conv0"] = {"width": 6}
    path.write_text(json.dumps(document))
    with pytest.raises(ArgumentError, match="damaged"):
        SensitivityAnalysis.load(path)
    with pytest.raises(ArgumentError, match=r"no_such.json"):
        SensitivityAnalysis.load(tmp_path / "no_such.json")


def test_the_table(analysis):
    lines = str(analysis).splitlines()
    assert lines[0].startswith("Sensitivity of 3 channel groups (L1 norm): squares with each")
    assert lines[2].split() == ["group", "width", "map", "25", "%", "50", "%", "90", "%"]
    value = analysis.groups["conv1"].values[1]
    assert lines[5].split()[:3] == ["conv1", "8", "6x6"] and f"{value:.4g}" in lines[5]


def test_the_picture(analysis, tmp_path):
    figure = analysis.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    first = axes.lines[0]
    np.testing.assert_allclose(first.get_xdata(), [0, 2 / 6, 3 / 6, 5 / 6])
    assert list(first.get_ydata()) == [analysis.dense, *analysis.groups["conv0"].values]
    assert [text.get_text() for text in axes.get_legend().texts] == ["conv0", "conv1", "conv2"]
    assert axes.get_ylabel() == "squares"
    with pytest.raises(ArgumentError, match="with retraining"):
        analysis.plot(retrained=True)


def test_many_curves():
    from tfprune.reports.figures import sensitivity_figure

    figure = sensitivity_figure({f"g{i}": ([0, 0.5], [1, i / 50]) for i in range(40)})
    looks = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
    assert len(set(looks)) == 20 and len(figure.axes[0].get_legend().texts) == 40


def test_plans_from_an_analysis(analysis):
    model = trained()
    plan = tfprune.plan(model, macs=0.5, order=analysis.order(), round_to=1)
    assert tfprune.cost.measure(model, plan).macs <= 0.5 * tfprune.cost.measure(model).macs
    ratios = analysis.ratios_within(0.05)
    drops = analysis.curves()
    for name, ratio in ratios.items():
        good = [p for p, d in zip(RATIOS, drops[name].drops, strict=True) if d <= 0.05]
        assert ratio == max(good, default=0.0)
    stage = analysis.ratios_within(10.0, per_stage=True)
    assert stage == dict.fromkeys(ratios, 0.9)
    assert tfprune.plan(model, stage, round_to=1).widths.keys() == stage.keys()


def test_some_groups(analysis):
    found = analyse(groups=["conv[12]"])
    assert dict(found.groups) == {name: analysis.groups[name] for name in ("conv1", "conv2")}


def test_channels_that_have_to_stay():
    """A branch that sees only some channels of a group keeps the best of them."""
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, name="source")(inputs)
    head = keras.layers.Dense(3, name="reader")(x[:, :2])
    model = keras.Model(inputs, keras.layers.Concatenate(name="both")([head, x[:, 2:]]))
    model = keras.Model(inputs, keras.layers.Dense(3, name="last")(model.output))
    data = (np.random.default_rng(0).normal(size=(20, 6)), np.arange(20) % 3)
    found = analyse(model, data, ratios=[0.95])
    plan = tfprune.plan(model, 0.95, round_to=1)
    kept = {name: group.kept[0] for name, group in found.groups.items()}
    assert kept == {name: len(indices) for name, indices in plan.kept.items()}


def test_models_of_keras_2():
    model = network(tf_keras)
    x, y = validation()
    found = analyse(model, groups=["conv0"], ratios=[0.5])
    small = tfprune.prune(model, {"conv0": 0.5}, round_to=1)
    expected = squares(y, small.predict(x, verbose=0))
    assert found.groups["conv0"].values == (pytest.approx(expected, rel=2e-5),)


def test_a_dataset_and_a_graph(analysis):
    x, y = validation()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(128)
    assert analyse(tfprune.analyse(trained()), dataset) == analysis


def test_a_progress_bar(capsys):
    analyse(groups=["conv0"], ratios=[0.5], progress=True)
    streams = capsys.readouterr()
    assert "sensitivity" in streams.err and "2/2" in streams.err and streams.out == ""


def _none_of_it(graph):
    return Scores({group.name: np.full(group.width, np.nan) for group in graph.prunable}, "none")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratios": []}, ArgumentError, "ratios"),
        ({"ratios": [0.0, 0.5]}, ArgumentError, "above 0"),
        ({"ratios": [0.5, 1.0]}, ArgumentError, "below 1"),
        ({"ratios": [0.5, 0.5]}, ArgumentError, "different"),
        ({"ratios": "0.5"}, ArgumentError, "ratios"),
        ({"ratios": [True]}, ArgumentError, "ratios"),
        ({"groups": ["conv7"]}, ArgumentError, "'conv7', which matches none"),
        ({"groups": "conv0"}, ArgumentError, r"groups=\['conv0'\]"),
        ({"groups": ["head"]}, ArgumentError, "can be pruned. Received: 'head'"),
        ({"groups": []}, ArgumentError, "Received: none"),
        ({"criterion": "best"}, ArgumentError, "criterion"),
        ({"criterion": "taylor"}, ArgumentError, "data"),
        ({"criterion": _none_of_it}, ArgumentError, "finite scores"),
        ({"data": (np.zeros((0, 6, 6, 2)), np.zeros(0))}, DataError, "empty"),
        ({"data": validation()[0]}, DataError, "Labels"),
        ({"data": (validation()[0][:, :4], validation()[1])}, DataError, "shape"),
        ({"data": (validation()[0], np.full(48, 7))}, ArgumentError, "from 0 to 2"),
        ({"executor": "dask"}, ArgumentError, "Expected an executor"),
        ({"retrain": Retraining()}, ArgumentError, "retrain alone"),
        ({"train": examples(9)}, ArgumentError, "train alone"),
        ({"retrain": Retraining(), "train": examples(9)[0]}, DataError, "Labels"),
        ({"path": "no/such/folder/file.json"}, ArgumentError, "not a directory"),
        ({"recalibrate": np.zeros((3, 5, 5, 2))}, DataError, "shape"),
    ],
    ids=range(23),
)
def test_refused_before_any_measurement(options, error, message, monkeypatch):
    def never(*arguments):
        raise AssertionError("work has begun")

    monkeypatch.setattr("tfprune.search.sensitivity.run_tasks", never)
    with pytest.raises(error, match=message):
        analyse(**{"metric": None, **options})


def test_nothing_to_prune():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(3)(inputs))
    with pytest.raises(ArgumentError, match="Received: none"):
        analyse(model, (np.zeros((4, 6)), np.zeros(4, int)))


@pytest.mark.parametrize(
    "options",
    [{"epochs": 0}, {"epochs": 1.5}, {"batches": 0}, {"batch_size": 0}, {"learning_rate": 0},
     {"weight_decay": -1}, {"optimizer": "best"}, {"schedule": "up"}, {"decay": "none"}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_no_retraining(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Retraining(**options)


def test_stages():
    """The axes beside the channels: of maps, sequences, vectors, and inside nested models."""
    layers = keras.layers
    inner_input = keras.Input((8, 8, 4))
    inner = keras.Model(
        inner_input, layers.Conv2D(5, 3, strides=2, padding="same", name="deep")(inner_input),
        name="inner",
    )  # fmt: skip
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(4, 3, strides=2, padding="same", name="outer")(inputs)
    x = layers.Reshape((16, 5), name="sequence")(inner(x))
    x = layers.Dense(6, name="wide")(x)
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = layers.Dense(7, name="vector")(layers.GlobalAveragePooling1D(name="average")(x))
    model = keras.Model(inputs, layers.Dense(3, name="last")(x))
    found = analyse(model, (toys.images(4, size=16), np.arange(4) % 3), ratios=[0.5])
    sizes = {name: group.size for name, group in found.groups.items()}
    expected = {"outer": (8, 8), "inner/deep": (4, 4), "wide": (16,), "vector": ()}
    assert {name: sizes[name] for name in expected} == expected
    assert sizes["attention:heads"] == (16,)


def test_the_toy_with_depthwise_and_gates():
    """Coupled groups come through the graph: one curve each."""
    model = toys.residual()
    found = analyse(model, (toys.images(12), toys.labels(12)), ratios=[0.5], metric=None)
    assert set(found.groups) == {group.name for group in tfprune.analyse(model).prunable}
