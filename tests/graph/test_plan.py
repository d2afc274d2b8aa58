"""Plans on disk, and plans that do not fit."""

import json

import keras
import numpy as np
import pytest
import tf_keras

import tfprune
from tests import toys
from tfprune.cost import measure
from tfprune.graph.plan import PruningPlan
from tfprune.testing import random_plan


@pytest.fixture
def plan():
    return tfprune.plan(toys.chain(), 0.5, round_to=1)


def test_round_trip(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert "conv1" in str(plan)


def test_a_person_can_edit_it(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    document = json.loads(path.read_text())
    document["groups"]["conv1"]["kept"] = [3, 1, 2]
    path.write_text(json.dumps(document))
    model = toys.chain()
    edited = PruningPlan.load(path)
    assert edited.kept["conv1"] == (1, 2, 3)
    assert edited.apply(model).get_layer("conv1").filters == 3


def test_one_line_per_group(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert sum('"kept"' in line for line in lines) == len(plan.kept)


def test_another_model_is_refused_with_the_difference(plan):
    with pytest.raises(tfprune.TfpruneError, match=r"conv1: expected Conv2D \(3,3,8,12\) \(12\)"):
        plan.apply(toys.chain(widths=(8, 13, 16)))
    with pytest.raises(tfprune.TfpruneError, match="differs at"):
        tfprune.verify(toys.residual(), plan)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], "damaged or no JSON"),
        (lambda text: "", "damaged or no JSON"),
        (lambda text: '{"some": "file"}', "another kind"),
        (lambda text: "[1, 2]", "another kind"),
        (lambda text: text.replace('"version": 1', '"version": 99'), "version 99"),
        (lambda text: text.replace('"kept": [', '"kept": ["x", '), "damaged"),
        (lambda text: text.replace('"groups"', '"gruops"'), "damaged"),
        (lambda text: text.replace('"kept": [', '"kept": [1000, '), "different indices from 0"),
        (lambda text: text.replace('"conv1": {"width"', '"conv9": {"width"'), "conv9"),
    ],
)
def test_damaged_files(plan, tmp_path, spoil, message):
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_text(spoil(path.read_text()))
    with pytest.raises(tfprune.TfpruneError, match=message):
        PruningPlan.load(path).apply(toys.chain())


def test_files_that_are_not_there(plan, tmp_path):
    with pytest.raises(tfprune.TfpruneError, match="can be read"):
        PruningPlan.load(tmp_path / "none.json")
    with pytest.raises(tfprune.TfpruneError, match="not a directory"):
        plan.save(tmp_path / "none" / "plan.json")


def test_nothing_half_written_stays(plan, tmp_path, monkeypatch):
    (tmp_path / "plan.json").write_text("old")
    monkeypatch.setattr("tfprune.graph.plan._dump", lambda document: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"conv7": [0]}, "conv7"),
        ({"head": [0]}, "model output"),
        ({"conv0": []}, "Received: none"),
        ({"conv0": [0, 0]}, "different indices"),
        ({"conv0": [8]}, "from 0 to 7"),
        ({"conv0": [-1]}, "from 0 to 7"),
    ],
)
def test_plans_by_hand_that_cannot_be(kept, message):
    with pytest.raises(tfprune.TfpruneError, match=message):
        PruningPlan.of(tfprune.analyse(toys.chain()), kept)


def _unnamed(framework=keras, width=8, skip=True, extra=False):
    """A nested model and a shared layer, all named by Keras."""
    layers = framework.layers
    inner_input = framework.Input((8, 8, width))
    inner = framework.Model(inner_input, layers.Conv2D(width, 1)(inner_input))
    inputs = framework.Input((8, 8, 3))
    first = layers.Conv2D(width, 3, padding="same")(inputs)
    second = layers.Conv2D(width, 3, padding="same")(first)
    shared = layers.Conv2D(width, 3, padding="same")
    third = shared(shared(inner(second)))
    if extra:
        third = layers.BatchNormalization()(third)
    x = layers.Add()([third, second if skip else first])
    outputs = layers.Dense(3)(layers.Flatten()(layers.Conv2D(4, 3)(x)))
    return framework.Model(inputs, outputs)


@pytest.mark.parametrize("framework", [keras, tf_keras])
def test_names_that_keras_numbered(framework, tmp_path):
    first, second = _unnamed(framework), _unnamed(framework)
    assert first.layers[1].name != second.layers[1].name
    graphs = tfprune.analyse(first), tfprune.analyse(second)
    assert graphs[0].structure.fingerprint == graphs[1].structure.fingerprint
    plan = random_plan(first)
    assert len(plan.kept) > 1
    assert not set(plan.kept) & set(graphs[1].by_name)
    plan.save(tmp_path / "plan.json")
    plan = PruningPlan.load(tmp_path / "plan.json")
    second.set_weights(first.get_weights())
    for old, new in zip(
        plan.apply(first).get_weights(), plan.apply(second).get_weights(), strict=True
    ):
        np.testing.assert_array_equal(old, new)
    # A few float32 layers: 1e-5 of the largest output is some hundred roundings.
    assert tfprune.verify(second, plan, tolerance=1e-5)
    assert measure(second, plan).macs == measure(first, plan).macs


def test_names_that_trade_places():
    """What the number says depends on which layer was made first, not on where it stands."""

    def build(order):
        made = {i: keras.layers.Conv2D(8, 3, padding="same", name=f"conv_{i}") for i in order}
        x = inputs = keras.Input((8, 8, 8))
        for i in order:
            x = made[i](x)
        return keras.Model(inputs, keras.layers.Conv2D(2, 1, name="head")(x))

    plan = PruningPlan.of(tfprune.analyse(build([1, 2])), {"conv_1": [0, 1], "conv_2": [5]})
    small = plan.apply(build([2, 1]))
    assert [small.get_layer(name).filters for name in ("conv_2", "conv_1")] == [2, 1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 9}, r"expected Conv2D \(3,3,3,8\) \(8\) of input 0, found Conv2D \(3,3,3,9\)"),
        ({"skip": False}, r"add\w*: expected Add of (\w+) call 1, (\w+), found Add of \w+ call 1"),
        ({"extra": True}, r"batch_normalization\w*: expected no such layer, found BatchNorm"),
    ],
)
def test_other_models_of_unnamed_layers(other, message):
    plan = random_plan(_unnamed())
    with pytest.raises(tfprune.TfpruneError, match=message):
        plan.apply(_unnamed(**other))


def test_other_names_are_another_model(plan):
    model = toys.chain()
    renamed = keras.models.clone_model(
        model,
        clone_function=lambda layer: type(layer).from_config(
            {**layer.get_config(), "name": layer.name.replace("conv", "fold")}
        ),
    )
    with pytest.raises(tfprune.TfpruneError, match=r"conv0: expected .* named fold0"):
        plan.apply(renamed)


def test_a_width_that_does_not_fit(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_text(path.read_text().replace('"conv1": {"width": 12', '"conv1": {"width": 13'))
    with pytest.raises(tfprune.TfpruneError, match=r"12 channels\. Received a plan for 13"):
        PruningPlan.load(path).apply(toys.chain())
