"""Plans on disk, and plans that do not fit."""

import json

import pytest

import tfprune
from tests import toys
from tfprune.graph.plan import PruningPlan


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
