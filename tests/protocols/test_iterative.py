"""Pruning in rounds."""

import keras
import numpy as np
import pytest

import tfprune
from tests import toys
from tfprune.cost import measure
from tfprune.criteria import Taylor
from tfprune.errors import ArgumentError, BudgetError
from tfprune.protocols import prune_iteratively

TUNING = {"epochs": 1, "batch_size": 8, "verbose": 0, "round_to": 1}


def data():
    return toys.images(24), toys.labels(24)


def test_the_budget_falls_geometrically_to_the_goal():
    model = toys.residual()
    dense = measure(model).macs
    result = prune_iteratively(model, data(), data(), macs=0.25, rounds=2, **TUNING)
    assert len(result.rounds) == 2
    first, last = (number.macs for number in result.rounds)
    assert first <= 0.5 * dense  # 0.25 ** (1 / 2)
    assert first > 0.4 * dense  # and no more than that: a step of one channel is below a tenth
    assert last == measure(result.model).macs <= 0.25 * dense
    assert last > 0.2 * dense
    assert measure(model).macs == dense
    assert all(number.record.epochs == 1 for number in result.rounds)


def test_group_by_group_ends_at_the_widths_of_one_shot():
    """ThiNet and HRank: layer by layer, with fine-tuning in between."""
    model = toys.chain()
    goal = tfprune.plan(model, macs=0.4, criterion="l1", round_to=1)
    result = prune_iteratively(model, data(), macs=0.4, rounds="groups", final_epochs=2, **TUNING)
    assert [list(number.plan.kept) for number in result.rounds] == [[name] for name in goal.kept]
    graph = tfprune.analyse(result.model)
    assert {name: graph[name].width for name in goal.kept} == {
        name: len(kept) for name, kept in goal.kept.items()
    }
    assert [number.record.epochs for number in result.rounds] == [1, 1, 2]


def test_the_criterion_sees_the_tuned_network():
    """What goes in the second round is decided by the weights after the first."""
    model = toys.chain()
    seen = []

    class Watched:
        def __call__(self, graph):
            seen.append(np.asarray(graph.model.get_layer("conv0").kernel).copy())
            return tfprune.criteria.L1()(graph)

    prune_iteratively(
        model, data(), macs=0.5, rounds=2, criterion=Watched(), learning_rate=0.1, **TUNING
    )
    goal, first, second = seen
    np.testing.assert_array_equal(goal, first)
    assert second.shape[-1] < first.shape[-1]
    # Had nothing been tuned, its filters would be some of the first ones.
    assert not any(np.array_equal(second[..., 0], first[..., j]) for j in range(first.shape[-1]))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path):
    model = toys.chain()
    options = {"macs": 0.4, "rounds": 2, "criterion": Taylor(data(), batch_size=8), **TUNING}
    whole = prune_iteratively(model, data(), **options)

    class Stop(Exception):
        pass

    def stop(epoch, values):
        stop.calls += 1
        if stop.calls == 2:
            raise Stop

    stop.calls = 0
    with pytest.raises(Stop):
        prune_iteratively(model, data(), folder=tmp_path, on_epoch_end=stop, **options)
    resumed = prune_iteratively(model, data(), folder=tmp_path, **options)
    for a, b in zip(whole.model.weights, resumed.model.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    again = prune_iteratively(model, data(), folder=tmp_path, **options)  # nothing left to do
    for a, b in zip(whole.model.weights, again.model.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert [number.plan for number in again.rounds] == [number.plan for number in whole.rounds]
    with pytest.raises(ArgumentError, match="rounds of the same call"):
        prune_iteratively(model, data(), folder=tmp_path, **{**options, "macs": 0.5})


def test_refusals(tmp_path):
    model = toys.chain()
    with pytest.raises(ArgumentError, match="Expected a budget"):
        prune_iteratively(model, data())
    with pytest.raises(BudgetError, match="within reach"):
        prune_iteratively(model, data(), macs=10, **TUNING)
    for rounds in (0, 1.5, "layers"):
        with pytest.raises(ArgumentError, match="rounds to be a number"):
            prune_iteratively(model, data(), macs=0.5, rounds=rounds, **TUNING)
    with pytest.raises(ArgumentError, match="epochs of at least 1"):
        prune_iteratively(model, data(), macs=0.5, **{**TUNING, "epochs": 0})
    with pytest.raises(ArgumentError, match="folder= instead"):
        prune_iteratively(model, data(), macs=0.5, checkpoint="x", **TUNING)
    with pytest.raises(ArgumentError, match="existing folder"):
        prune_iteratively(model, data(), macs=0.5, folder=tmp_path / "none", **TUNING)


def test_a_budget_that_is_met_already_needs_no_rounds():
    model = toys.chain()
    result = prune_iteratively(model, data(), macs=1.0, **TUNING)
    assert result.rounds == ()
    assert isinstance(result.model, keras.Model)
