"""Running a recipe."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest

from tfprune import recipes
from tfprune.errors import ArgumentError
from tfprune.graph.plan import PruningPlan
from tfprune.recipes.training import _training

RECIPE = recipes.Recipe(
    "slimming",
    "resnet8_digits",
    "digits",
    arguments={"macs": 0.5, "penalty": 1e-3},
    network={"widths": [6, 8, 10]},
    data={"batch_size": 64, "subset": 200},
    dense={"epochs": 1, "learning_rate": 0.05},
    train={"epochs": 2, "learning_rate": 0.05, "nesterov": True},
    fine_tune={"epochs": 1, "learning_rate": 0.01},
)


class Stopped(Exception):
    """In the place of Ctrl-C."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run, and one that was interrupted in the second phase and in the third."""
    root = tmp_path_factory.mktemp("recipes")
    report = recipes.train(RECIPE, root / "whole")
    for stop in ("train", "fine_tune"):

        def interrupt(phase, epoch, values, stop=stop):
            if phase == stop:
                raise Stopped

        with pytest.raises(Stopped):
            recipes.train(RECIPE, root / "torn", on_epoch_end=interrupt)
    recipes.train(RECIPE, root / "torn")
    return report, root


def test_the_folder_and_the_report(folders) -> None:
    report, root = folders
    folder = root / "whole"
    names = {path.name for path in folder.iterdir()}
    assert {
        "recipe.json", "dense.npz", "train.npz", "fine_tune.npz", "trained.keras", "plan.json",
        "pruned.keras", "structure.png", "report.json",
    } == names  # fmt: skip
    assert list(report.accuracy) == ["dense", "trained", "pruned", "fine-tuned"]
    assert report.macs[1] <= 0.5 * report.macs[0]
    assert all(len(series) == 2 for series in report.widths.values()) and report.widths
    assert json.loads((folder / "report.json").read_text())["recipe"] == RECIPE.as_dict()
    plan = PruningPlan.load(folder / "plan.json")
    trained = keras.models.load_model(folder / "trained.keras")
    pruned = keras.models.load_model(folder / "pruned.keras")
    assert plan.apply(trained).count_params() == pruned.count_params() == report.parameters[1]
    assert "MACs" in str(report) and "fine-tuned" in str(report)


def test_an_interrupted_run_ends_as_one_that_was_not(folders) -> None:
    _, root = folders
    first, second = (
        keras.models.load_model(root / name / "pruned.keras") for name in ("whole", "torn")
    )
    for a, b in zip(first.weights, second.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=a.path)


def test_a_folder_of_another_recipe_is_refused(folders) -> None:
    _, root = folders
    with pytest.raises(ArgumentError, match="another seed"):
        recipes.train(RECIPE.changed({"seed": 1}), root / "whole")


def test_milestones() -> None:
    given = _training({"epochs": 200, "milestones": [60, 120, 160], "factor": 0.2})
    factor = given["schedule"]
    found = [factor(epoch / 200) for epoch in (0, 59, 60, 119, 120, 160, 199)]
    np.testing.assert_allclose(found, [1, 1, 0.2, 0.2, 0.04, 0.008, 0.008])
