"""EagleEye: sheet C, its paragraph in the section on searches."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

import tfprune
from tests.search.models import DISTANCE, examples, network, squares, trained, validation
from tfprune.cost import CostModel
from tfprune.errors import ArgumentError, BudgetError, DataError
from tfprune.search import Metric, eagle_eye

# not as an attribute of tfprune.search, where the function has the name
MODULE = sys.modules["tfprune.search.eagle_eye"]


def search(model=None, train=None, data=None, **options):
    train = examples(75, seed=2)[0] if train is None else train
    data = validation() if data is None else data
    budget = {} if {"macs", "params", "size_bytes"} & options.keys() else {"macs": 0.5}
    options = {"candidates": 6, "round_to": 1, "metric": DISTANCE, "tolerance": 0.05,
               "progress": False, "batch_size": 25, **budget, **options}  # fmt: skip
    return eagle_eye(model or trained(), train, data, **options)


def unmeasured(executor, function, shared, tasks):
    """In the place of run_tasks: every candidate scores the same."""
    yield from ((number, 1.0) for number in range(len(tasks)))


@pytest.fixture(scope="module")
def result():
    return search()


def test_the_best_candidate_is_the_plan(result):
    scores = [candidate.score for candidate in result.candidates]
    assert len(scores) == 6 and len(set(scores)) == 6
    assert result.best == int(np.argmin(scores)) and not result.larger_is_better
    best = result.candidates[result.best]
    widths = {name: len(kept) for name, kept in result.plan.kept.items()}
    dense = {"conv0": 6, "conv1": 8, "conv2": 10}
    assert {**dense, **widths} == best.widths
    assert tfprune.verify(trained(), result.plan)


def test_scores_are_those_of_pruned_recalibrated_models(result):
    """Prune by L1, refresh the statistics on training batches, validate: the paper's steps."""
    model, (x, y) = trained(), validation()
    for candidate in result.candidates[:2]:
        ratios = {
            name: 1 - kept / width
            for (name, kept), width in zip(candidate.widths.items(), (6, 8, 10), strict=True)
        }
        small = tfprune.prune(model, ratios, criterion="l1", round_to=1)
        tfprune.recalibrate_batch_norm(small, examples(75, seed=2)[0], batch_size=25)
        found = squares(y, small.predict(x, verbose=0))
        assert candidate.score == pytest.approx(found, rel=2e-5)
        assert tfprune.cost.measure(small).macs == candidate.cost


@pytest.mark.parametrize("budget", ["macs", "params", "size_bytes"])
@pytest.mark.parametrize("never_exceed", [True, False])
def test_the_band(budget, never_exceed, monkeypatch):
    """|cost ratio - target| <= tolerance, and by default never above the target."""
    monkeypatch.setattr(MODULE, "run_tasks", unmeasured)
    options = {budget: 0.5, "candidates": 12, "tolerance": 0.05, "never_exceed": never_exceed}
    found = search(**options)
    costs = CostModel(tfprune.analyse(trained()))
    function = {"macs": costs.macs, "params": costs.parameters, "size_bytes": costs.size_bytes}
    dense = function[budget](costs.full_mask())
    fractions = np.array([candidate.fraction for candidate in found.candidates])
    assert len(fractions) == 12 == found.asked and found.budget == budget
    assert np.abs(fractions - 0.5).max() <= 0.05
    assert (fractions > 0.5).any() != never_exceed
    assert [c.cost for c in found.candidates] == pytest.approx(fractions * dense)
    assert len({tuple(c.widths.values()) for c in found.candidates}) == 12


def test_ratios_are_uniform_in_their_range(monkeypatch):
    """With every draw accepted: each group's kept channels as often as the range says."""
    monkeypatch.setattr(MODULE, "run_tasks", unmeasured)
    model = network(widths=(100, 100, 100))
    found = search(model, macs=0.5, tolerance=0.6, never_exceed=False, min_ratio=0.2,
                   max_ratio=0.6, candidates=2000, round_to=1)  # fmt: skip
    kept = np.array([[*c.widths.values()] for c in found.candidates])
    assert found.draws - len(kept) < 100  # some came twice
    # floor(100 (1 - p)) for p in [.2, .6]: 40 to 79, all alike
    assert kept.min() == 40 and kept.max() == 79
    # mean 59.5, standard deviation 11.5: of 2000, five standard errors are 1.3
    assert np.abs(kept.mean(0) - 59.5).max() < 1.3
    assert np.abs(np.corrcoef(kept.T) - np.eye(3)).max() < 0.12


def test_the_seed_decides(result):
    assert search() == result
    other = search(seed=1)
    assert [c.widths for c in other.candidates] != [c.widths for c in result.candidates]


def test_widths_are_rounded_and_left_alone():
    found = search(macs=0.7, round_to=2, ignore=["conv1"], tolerance=0.1, candidates=3)
    for candidate in found.candidates:
        assert set(candidate.widths) == {"conv0", "conv2"}
        assert all(width % 2 == 0 for width in candidate.widths.values())


def test_the_accuracy_by_default():
    found = search(metric=None, candidates=3)
    scores = [candidate.score for candidate in found.candidates]
    assert found.metric == "accuracy" and found.larger_is_better
    assert found.best == scores.index(max(scores))
    assert all(48 * score == pytest.approx(round(48 * score)) for score in scores)


def test_fewer_than_asked_for():
    found = search(candidates=50, draws=20, tolerance=0.1)
    assert 0 < len(found.candidates) < 20 == found.draws and found.asked == 50
    assert f"best of {len(found.candidates)} (50 asked for, 20 draws)" in str(found)


def test_only_so_many_training_batches():
    x = examples(75, seed=2)[0]
    with_all = search(candidates=1).candidates[0].score
    assert search(candidates=1, recalibration_batches=3).candidates[0].score == with_all
    first = search(candidates=1, recalibration_batches=1).candidates[0].score
    assert first == search(candidates=1, train=x[:25]).candidates[0].score != with_all


def test_resuming_gives_the_same_result(tmp_path, result):
    calls = []

    def squares_until(labels, outputs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return squares(labels, outputs)

    metric = Metric(squares_until, False, "squares")
    path = tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        search(metric=metric, path=path)
    assert list(json.loads(path.read_text())["results"]) == ["0", "1", "2"]
    assert search(metric=metric, path=path) == result
    assert len(calls) == 4 + 3
    search(path=tmp_path / "other.json")
    assert path.read_bytes() == (tmp_path / "other.json").read_bytes()
    with pytest.raises(ArgumentError, match=r"same search.*differs in candidates"):
        search(seed=1, path=path)


def test_the_table(result):
    lines = str(result).splitlines()
    assert lines[0].startswith(f"EagleEye: candidate {result.best} is the best of 6 (6 asked for")
    assert lines[2].split()[:3] == ["candidate", "squares", "macs"]
    assert lines[4].split()[0] == str(result.best) and len(lines) == 10
    assert "EagleEye, best of 6, seed 0" in str(result.plan)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"macs": 0.01}, BudgetError, r"ratios from 0.0 to 0.7 give .*max_ratio"),
        ({"macs": 0.9, "min_ratio": 0.5}, BudgetError, "ratios from 0.5 to 0.7 give"),
        ({"macs": 0.5, "tolerance": 0.0, "draws": 5}, BudgetError, "5 draws give"),
        ({"ignore": ["conv*"]}, BudgetError, "give"),
        ({"macs": 0.5, "params": 0.5}, ArgumentError, "exactly one.*macs, params"),
        ({"macs": None}, ArgumentError, "exactly one.*none"),
        ({"macs": -1}, ArgumentError, "macs"),
        ({"max_ratio": 1.0}, ArgumentError, "max_ratio"),
        ({"min_ratio": 0.8}, ArgumentError, "min_ratio"),
        ({"tolerance": -0.1}, ArgumentError, "tolerance"),
        ({"candidates": 0}, ArgumentError, "candidates"),
        ({"draws": 0}, ArgumentError, "draws"),
        ({"seed": -1}, ArgumentError, "seed"),
        ({"data": (np.zeros((0, 6, 6, 2)), np.zeros(0))}, DataError, "empty"),
        ({"data": validation()[0]}, DataError, "Labels"),
        ({"train": np.zeros((0, 6, 6, 2))}, DataError, "empty"),
        ({"recalibration_batches": 0}, ArgumentError, "limit"),
        ({"executor": 2}, ArgumentError, "Expected an executor"),
    ],
    ids=range(18),
)
def test_refused_before_any_measurement(options, error, message, monkeypatch):
    def never(*arguments):
        raise AssertionError("work has begun")

    monkeypatch.setattr(MODULE, "run_tasks", never)
    with pytest.raises(error, match=message):
        search(**options)
