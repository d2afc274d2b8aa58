"""Recipes: files, checks, changes."""

from __future__ import annotations

import pytest

from tfprune import recipes
from tfprune.errors import ArgumentError
from tfprune.recipes import METHODS, NETWORKS, Recipe


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_can_be_made(name) -> None:
    recipe = recipes.read(name)
    assert recipe.about and recipe.train["epochs"] >= 60
    # The method takes the arguments, and the network of the zoo exists.
    data = {"data": ([0], [0])} if recipe.method in ("gdp", "aofp", "dcp") else {}
    METHODS[recipe.method](**recipe.arguments, **data)
    assert recipe.model in NETWORKS
    assert recipes.find(recipe.method, recipe.model, recipe.dataset).method == recipe.method


def test_every_method_has_a_plain_recipe() -> None:
    for method, kind in METHODS.items():
        arguments = recipes.find(method, "resnet8_digits", "digits").arguments
        data = {"data": ([0], [0])} if method in ("gdp", "aofp", "dcp") else {}
        assert kind(**arguments, **data).macs == 0.5


def test_changes() -> None:
    recipe = recipes.read("slimming-vgg19-cifar10")
    changed = recipe.changed({"train.epochs": 2, "seed": 3, "data.subset": 500})
    assert changed.train == {**recipe.train, "epochs": 2}
    assert changed.seed == 3 and changed.data["subset"] == 500
    assert recipe.train["epochs"] == 160  # as it was
    for changes in ({"epochs": 2}, {"seed.x": 1}, {"train.epoch": 1}):
        with pytest.raises(ArgumentError):
            recipe.changed(changes)


def test_files(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('method = "sfp"\nmodel = "vgg16"\ndataset = "digits"\n[train]\nepochs = 3\n')
    assert recipes.read(path) == Recipe("sfp", "vgg16", "digits", train={"epochs": 3})
    for text, message in (
        ("method = ", "TOML"),
        ('method = "sfp"', "model, dataset in"),
        ('method = "sfp"\nspeed = 1', "only method"),
        ('method = "sfp"\nmodel = "vgg16"\ndataset = "digits"\ntrain = 3', "as a table"),
    ):
        path.write_text(text)
        with pytest.raises(ArgumentError, match=message):
            recipes.read(path)
    with pytest.raises(ArgumentError, match="recipe file"):
        recipes.read(tmp_path / "missing.toml")
    with pytest.raises(ArgumentError, match="Expected recipe as one of"):
        recipes.read("missing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "Expected method"),
        ({"model": "vgg17"}, "Expected model"),
        ({"dataset": "cats"}, "Expected dataset"),
        ({"seed": -1}, "seed"),
        ({"arguments": {"lambda": 1}}, "lambda"),
        ({"method": "ssr", "arguments": {"macs": 0.5}}, "penalty in"),
        ({"network": {"depth": 1}}, "depth"),
        ({"model": "a.keras", "network": {"widths": 1}}, "model file"),
        ({"data": {"batch": 1}}, "batch"),
        ({"train": {}}, "Expected"),
        ({"train": {"learning_rate": 0.1}}, "epochs"),
        ({"train": {"epochs": 2.5}}, "train.epochs as int"),
        ({"train": {"epochs": 2, "milestones": [1]}}, "factor"),
        (
            {"train": {"epochs": 2, "milestones": [1], "factor": 0.1, "schedule": "step"}},
            "both",
        ),
    ],
    ids=range(14),
)
def test_what_is_refused(changes, message) -> None:
    given = {"method": "slimming", "model": "vgg16", "dataset": "digits", **changes}
    with pytest.raises(ArgumentError, match=message):
        Recipe(**given)
