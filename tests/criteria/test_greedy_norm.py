"""Selectors in general, and the greedy L1 norm (sheet A1)."""

import keras
import numpy as np
import pytest

import tfprune
from tests import toys
from tfprune.criteria import L1, GreedyL1, Quota, Selection
from tfprune.errors import ArgumentError, BudgetError


def widths(plan):
    return {name: len(kept) for name, kept in plan.kept.items()}


def test_without_anything_pruned_upstream_it_is_the_independent_norm():
    """Sheet A1, "Unit oracles"."""
    model = toys.chain()
    plans = [
        tfprune.plan(model, {"conv0": 0.5}, criterion=criterion, round_to=1)
        for criterion in ("l1", "greedy_l1")
    ]
    assert plans[0].kept == plans[1].kept


def test_norms_are_summed_over_the_channels_that_survived():
    model = toys.chain()
    plan = tfprune.plan(model, 0.5, criterion="greedy_l1", round_to=1)
    survived = np.arange(3)
    for name in ("conv0", "conv1", "conv2"):
        kernel = np.abs(np.asarray(model.get_layer(name).kernel, np.float64))
        norms = kernel[:, :, survived].sum((0, 1, 2))
        best = np.sort(np.argsort(-norms, kind="stable")[: len(norms) // 2])
        assert plan.kept[name] == tuple(best)
        survived = best


def test_it_differs_from_the_independent_norm_where_much_goes():
    """A filter that lives off channels that go is worth nothing to the greedy norm."""
    model = toys.chain((4, 4, 4))
    first, second = model.get_layer("conv0"), model.get_layer("conv1")
    kernel = np.ones((3, 3, 3, 4), "float32")
    kernel[..., :2] = 0.1  # channels 0 and 1 go
    first.kernel.assign(kernel)
    kernel = np.full((3, 3, 4, 4), 0.5, "float32")
    kernel[:, :, :2, 0] = 10.0  # filter 0 reads channels 0 and 1
    kernel[:, :, 2:, 0] = 0.01
    second.kernel.assign(kernel)
    independent = tfprune.plan(model, {"conv0": 0.5, "conv1": 0.25}, criterion="l1", round_to=1)
    greedy = tfprune.plan(model, {"conv0": 0.5, "conv1": 0.25}, criterion="greedy_l1", round_to=1)
    assert 0 in independent.kept["conv1"]
    assert greedy.kept["conv1"] == (1, 2, 3)


@pytest.mark.parametrize("order", ["uniform", "global"])
def test_budgets_and_verification(order):
    model = toys.residual()
    l1 = tfprune.plan(model, macs=0.5, criterion=L1(), order=order, round_to=1)
    plan = tfprune.plan(model, macs=0.5, criterion=GreedyL1(), order=order, round_to=1)
    assert widths(plan) == widths(l1)  # the same shapes, whatever is chosen
    assert tfprune.verify(model, plan)
    assert plan.notes["criterion"] == "greedy L1 norm"


class Last:
    """Keeps the last channels, after L1 has decided how many."""

    def __call__(self, graph):
        return L1()(graph)

    def select(self, graph, quotas):
        kept = {name: quota.best(np.arange(graph[name].width)) for name, quota in quotas.items()}
        return Selection(kept, notes={"remark": "the last ones"})


def test_a_selector_chooses_among_as_many_channels():
    model = toys.chain()
    plan = tfprune.plan(model, 0.5, criterion=Last(), round_to=1)
    assert plan.kept["conv1"] == tuple(range(6, 12))
    assert plan.notes["remark"] == "the last ones"


def test_a_selector_that_keeps_another_number_is_refused():
    class Greedy(Last):
        def select(self, graph, quotas):
            return Selection({name: np.arange(1) for name in quotas})

    with pytest.raises(ArgumentError, match=r"to keep 4 channels of 'conv0'.*1 from Greedy"):
        tfprune.plan(toys.chain(), 0.5, criterion=Greedy(), round_to=1)


def test_a_choice_that_costs_more_is_refused():
    """Only the last quarter of the channels is read by the large layer."""
    inputs = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Conv2D(8, 1, name="conv")(inputs)
    rest = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    part = keras.layers.Conv2D(64, 5, padding="same", name="large")(x[..., 6:])
    part = keras.layers.GlobalAveragePooling2D(name="pool_part")(part)
    outputs = keras.layers.Concatenate(name="both")([rest, part])
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(outputs))
    kernel = np.ones((1, 1, 3, 8), "float32") * [1, 1, 1, 1, 1, 1, 0.1, 0.1]
    model.get_layer("conv").kernel.assign(kernel.astype("float32"))
    assert tfprune.plan(model, macs=0.6, criterion="l1", round_to=1, ignore=["large"])
    with pytest.raises(BudgetError, match="Expected a choice within macs"):
        tfprune.plan(model, macs=0.6, criterion=Last(), round_to=1, ignore=["large"])


def test_quota():
    quota = Quota(3, np.array([4]))
    np.testing.assert_array_equal(quota.best(np.array([1.0, 5, 5, 0, -9])), [1, 2, 4])
