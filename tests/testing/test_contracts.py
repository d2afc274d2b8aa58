"""The contracts catch what they are there to catch."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest

import tfprune
from tests import toys
from tfprune.criteria import L1, Scores
from tfprune.testing import check_criterion, check_surgery, contracts, random_plan, randomize


def _altered(alter):
    """The L1 criterion with its scores changed."""

    def criterion(graph) -> Scores:
        scores = L1()(graph)
        return Scores(alter({name: scores[name] for name in scores}), "altered")

    return criterion


def test_a_good_criterion() -> None:
    check_criterion(_altered(lambda values: values), toys.chain())


def _of_first(change):
    def alter(values):
        return {**values, "conv0": change(values["conv0"])}

    return alter


def _drop(values):
    values.pop("conv0")
    return values


@pytest.mark.parametrize(
    ("alter", "text"),
    [
        (_drop, "scores for every prunable group"),
        (lambda values: {**values, "head": values["conv0"]}, "scores for every prunable group"),
        (_of_first(lambda v: v[:-1]), "shape"),
        (_of_first(lambda v: v.astype(np.float32)), "float64"),
        (_of_first(lambda v: v * np.nan), "finite"),
        (_of_first(lambda v: v + np.inf), "finite"),
    ],
)
def test_broken_criteria(alter, text) -> None:
    with pytest.raises(AssertionError, match=text):
        check_criterion(_altered(alter), toys.chain())


def test_a_criterion_that_forgets_its_seed() -> None:
    random = np.random.default_rng(0)
    restless = _altered(_of_first(lambda v: random.random(v.shape)))
    with pytest.raises(AssertionError, match="same scores for 'conv0' when asked twice"):
        check_criterion(restless, toys.chain())


def test_good_surgery_gives_the_plan() -> None:
    model = toys.residual()
    plan = check_surgery(model, ratio=0.5, seed=1)
    assert plan.kept and plan.structure == tfprune.analyse(model).structure


def _break_surgery(monkeypatch, change) -> None:
    """Lets the contract apply plans wrongly."""
    honest = contracts.apply

    def apply(model, plan):
        return change(model, honest(model, plan), plan)

    monkeypatch.setattr(contracts, "apply", apply)


def test_wrong_values_are_caught(monkeypatch) -> None:
    def change(model, small, plan):
        small.get_layer("conv1").bias.assign_add(np.full(small.get_layer("conv1").filters, 0.1))
        return small

    _break_surgery(monkeypatch, change)
    with pytest.raises(AssertionError, match="DIFFER"):
        check_surgery(toys.chain())


def test_the_wrong_channels_are_caught(monkeypatch) -> None:
    def change(model, small, plan):
        kept = {k: [i for i in range(plan.widths[k]) if i not in set(v)] for k, v in
                plan.kept.items()}  # fmt: skip
        return tfprune.PruningPlan.of(tfprune.analyse(model), kept).apply(model)

    _break_surgery(monkeypatch, change)
    with pytest.raises(AssertionError):
        check_surgery(toys.chain())


def test_a_changed_source_is_caught(monkeypatch) -> None:
    def change(model, small, plan):
        # A channel that the plan removes: the outputs of the pruned model do not tell.
        kernel = np.asarray(model.get_layer("conv0").kernel).copy()
        gone = min(set(range(8)) - set(plan.kept["conv0"]))
        kernel[..., gone] += 1
        model.get_layer("conv0").kernel.assign(kernel)
        return small

    _break_surgery(monkeypatch, change)
    with pytest.raises(AssertionError, match="source's weights to be left as they were"):
        check_surgery(toys.chain())


def test_a_source_with_new_nodes_is_caught(monkeypatch) -> None:
    def change(model, small, plan):
        model.get_layer("conv0")(keras.Input((8, 8, 3)))
        return small

    _break_surgery(monkeypatch, change)
    with pytest.raises(AssertionError, match="source's graph"):
        check_surgery(toys.chain())


def test_a_model_that_was_not_pruned_is_caught(monkeypatch) -> None:
    _break_surgery(monkeypatch, lambda model, small, plan: keras.models.clone_model(small))
    with pytest.raises(AssertionError):
        check_surgery(toys.chain())


def test_wrong_costs_are_caught(monkeypatch) -> None:
    honest = contracts.measure

    def measure(model, plan=None):
        found = honest(model, plan)
        return found if plan is None else dataclasses.replace(found, macs=found.macs + 1)

    monkeypatch.setattr(contracts, "measure", measure)
    with pytest.raises(AssertionError, match="Expected macs"):
        check_surgery(toys.chain())


def test_random_plans() -> None:
    model = toys.chain()
    first, again, other = (random_plan(model, seed=seed) for seed in (1, 1, 2))
    assert first.kept == again.kept != other.kept
    assert {name: len(kept) for name, kept in first.kept.items()} == {
        "conv0": 4, "conv1": 6, "conv2": 8,
    }  # fmt: skip
    inputs = keras.Input((3,))
    assert random_plan(keras.Model(inputs, keras.layers.Dense(2)(inputs))).kept == {}


def test_randomize() -> None:
    layers = [keras.Input((4,)), keras.layers.Dense(6), keras.layers.BatchNormalization()]
    models = [randomize(keras.Sequential(layers), seed) for seed in (0, 0)]
    norm = models[0].layers[-1]
    # Initial values would be 1, 0, 0 and 1.
    for weight in norm.weights:
        assert len(np.unique(np.asarray(weight))) == 6
    assert np.asarray(norm.moving_variance).min() > 0 and np.asarray(norm.gamma).min() > 0
