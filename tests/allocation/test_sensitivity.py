"""From curves to widths: golden arithmetic on hand-made curves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tfprune
from tests import toys
from tfprune.allocation import Constraints, chains
from tfprune.allocation.sensitivity import Curve, SensitivityOrder, within_tolerance
from tfprune.cost import CostModel
from tfprune.errors import ArgumentError

# widths 4, 8 and 16: curves at 50 % and 75 %
CURVES = {
    "conv0": Curve(4, (0.5, 0.75), (2, 1), (0.02, 0.10), (8, 8)),
    "conv1": Curve(8, (0.5, 0.75), (4, 2), (0.04, 0.05), (8, 8)),
    "conv2": Curve(16, (0.5, 0.75), (8, 4), (0.00, 0.30), (4, 4)),
}


@pytest.fixture(scope="module")
def graph():
    return tfprune.analyse(toys.chain(widths=(4, 8, 16)))


def chain_list(graph, **options):
    scores = tfprune.criteria.get("l1")(graph)
    return chains(graph, scores, Constraints(round_to=1, **options), CostModel(graph))


def test_lines_between_measured_widths():
    curve = CURVES["conv1"]
    assert [curve.predicted(w) for w in (8, 7, 6, 5, 4, 3, 2)] == pytest.approx(
        [0, 0.01, 0.02, 0.03, 0.04, 0.045, 0.05], abs=1e-12
    )
    # Below the smallest measured width nothing is known.
    assert curve.predicted(1) == math.inf
    # Two ratios that lead to one width are one point.
    doubled = Curve(3, (0.1, 0.3, 0.9), (2, 2, 1), (0.1, 0.1, 0.3))
    assert [doubled.predicted(w) for w in (3, 2, 1)] == [0, 0.1, 0.3]
    # A group that cannot be cut costs nothing as it is.
    assert Curve(3, (0.5,), (3,), (0.2,)).predicted(3) == 0


def test_the_order_by_predicted_drops(graph):
    """Each step ranks by the drop after it; equal ones by the fraction removed.

    conv0: 3 -> .01, 2 -> .02, 1 -> .10; conv1: 7..2 -> .01 .02 .03 .04 .045 .05, 1 -> unknown;
    conv2: 15..8 -> 0, 7..4 -> .075 .15 .225 .3, 3..1 -> unknown.
    """
    order = SensitivityOrder(CURVES)(chain_list(graph))
    free = [2] * 8
    # .01 for both: conv1 loses an eighth by it and conv0 a quarter; then .02, .03, .04, .045, .05
    low = [1, 0, 1, 0, 1, 1, 1, 1]
    high = [2, 0, 2, 2, 2]  # .075 .10 .15 .225 .3
    # not measured, by the fraction removed: 13/16, 14/16 = 7/8, 15/16
    unknown = [2, 1, 2, 2]
    assert order == free + low + high + unknown


def test_noise_does_not_turn_steps_round(graph):
    """A dip in a curve counts as the largest drop so far, a gain as it is."""
    curves = {
        **CURVES,
        "conv0": Curve(4, (0.25, 0.5, 0.75), (3, 2, 1), (0.06, -0.5, 0.07)),
        "conv1": Curve(8, (0.25, 0.5, 0.875), (6, 4, 1), (-0.02, 0.2, 0.2)),
    }
    order = SensitivityOrder(curves)(chain_list(graph))
    assert order[:2] == [1, 1]  # a gain of 1 % and of 2 %
    # conv0 at .06 .06 .07, conv2's first unpaid ones at .075
    position = [i for i, n in enumerate(order) if n == 0]
    later = [i for i, n in enumerate(order) if n == 2]
    assert all(later[7] < p < later[8] for p in position)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.sampled_from([1, 2, 4, 8]))
def test_every_order_is_whole(graph, drops, round_to):
    curves = {
        group.name: Curve(
            group.width,
            (0.25, 0.5, 0.75),
            tuple(group.width * k // 4 for k in (3, 2, 1)),
            tuple(drops),
        )
        for group in graph.prunable
    }
    scores = tfprune.criteria.get("l1")(graph)
    made = chains(graph, scores, Constraints(round_to=round_to), CostModel(graph))
    order = SensitivityOrder(curves)(made)
    assert [order.count(i) for i in range(len(made))] == [len(c.widths) - 1 for c in made]


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.4}, {"size_bytes": 3000}])
def test_a_plan_meets_any_budget(graph, budget):
    plan = tfprune.plan(graph, order=SensitivityOrder(CURVES), round_to=1, **budget)
    costs = CostModel(graph)
    function = {"macs": costs.macs, "params": costs.parameters, "size_bytes": costs.size_bytes}
    for name, value in budget.items():
        limit = value if isinstance(value, int) else value * function[name](costs.full_mask())
        assert function[name](costs.mask(plan)) <= limit
    assert plan.notes["order"] == "SensitivityOrder"
    # conv2 costs nothing down to a half, so that it goes there first of all.
    assert len(plan.kept["conv2"]) <= 8


def test_a_ratio_of_all_channels(graph):
    """A quarter of 28 channels is 7: the steps that cost nothing."""
    plan = tfprune.plan(graph, 0.25, order=SensitivityOrder(CURVES), round_to=1)
    assert {name: len(kept) for name, kept in plan.kept.items()} == {"conv2": 9}


def test_groups_without_a_curve(graph):
    order = SensitivityOrder({name: CURVES[name] for name in ("conv0", "conv2")})
    with pytest.raises(ArgumentError, match=r"without 'conv1'.*ignore=\['conv1'\]"):
        tfprune.plan(graph, macs=0.5, order=order)
    plan = tfprune.plan(graph, macs=0.6, order=order, round_to=1, ignore=["conv1"])
    assert "conv1" not in plan.kept
    other = SensitivityOrder({**CURVES, "conv1": Curve(9, (0.5,), (4,), (0.1,))})
    with pytest.raises(ArgumentError, match="'conv1' has 9 channels, where the model has 8"):
        tfprune.plan(graph, macs=0.5, order=other)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("best", "uniform, global, or a function from chains"),
        (None, "Received: None"),
        (SensitivityOrder, "Received: <class"),
        (lambda found: [0], "25 steps.*Received: 1 entries from <lambda>"),
        (lambda found: [0.0] * 25, "Received: 25 entries"),
        (lambda found: [3] * 25, "Received: 25 entries"),
    ],
    ids=["name", "none", "class", "short", "floats", "unknown chain"],
)
def test_orders_that_are_none(graph, order, message):
    with pytest.raises(ArgumentError, match=message):
        tfprune.plan(graph, macs=0.5, order=order, round_to=1)


def test_a_function_of_ones_own(graph):
    """The last group wholly first, whatever its scores."""

    def last_first(found):
        return [i for i in reversed(range(len(found))) for _ in found[i].widths[1:]]

    plan = tfprune.plan(graph, 0.5, order=last_first, round_to=1)
    assert {name: len(kept) for name, kept in plan.kept.items()} == {"conv2": 2}
    assert plan.notes["order"] == "last_first"


@pytest.mark.parametrize(
    ("tolerance", "ratios", "by_stage"),
    [
        (0.0, (0, 0, 0.5), (0, 0, 0.5)),
        (0.02, (0.5, 0, 0.5), (0, 0, 0.5)),
        (0.05, (0.5, 0.75, 0.5), (0.5, 0.5, 0.5)),
        (0.3, (0.75, 0.75, 0.75), (0.75, 0.75, 0.75)),
        (-0.1, (0, 0, 0), (0, 0, 0)),
    ],
)
def test_the_tolerance_rule(tolerance, ratios, by_stage):
    """Sheet A1, step 3: the largest p with a(0) - a(p) <= tol, then the stage's minimum."""
    found = within_tolerance(CURVES, tolerance)
    assert found == dict(zip(CURVES, ratios, strict=True))
    found = within_tolerance(CURVES, tolerance, per_stage=True)
    assert found == dict(zip(CURVES, by_stage, strict=True))


def test_a_plan_from_tolerated_ratios(graph):
    plan = tfprune.plan(graph, within_tolerance(CURVES, 0.02), round_to=1)
    assert {name: len(kept) for name, kept in plan.kept.items()} == {"conv0": 2, "conv2": 8}


def test_groups_that_are_skipped():
    """Sheet A1: sensitive layers are skipped, and do not decide for their stage."""
    found = within_tolerance(CURVES, 0.04, per_stage=True, skip=["*0"])
    assert found == {"conv0": 0, "conv1": 0.5, "conv2": 0.5}
    with pytest.raises(ArgumentError, match=r"skip.*'conv9'"):
        within_tolerance(CURVES, 0.04, skip=["conv9"])


@pytest.mark.parametrize("tolerance", [math.nan, math.inf, "small"])
def test_tolerances_that_are_none(tolerance):
    with pytest.raises(ArgumentError, match="tolerance"):
        within_tolerance(CURVES, tolerance)


@pytest.mark.parametrize(
    "values",
    [
        (4, (), (), ()),
        (4, (0.5,), (2,), (math.nan,)),
        (4, (0.5,), (2, 1), (0.1,)),
        (4, (0.75, 0.5), (1, 2), (0.1, 0.2)),
        (4, (0.0,), (4,), (0.1,)),
        (4, (0.5,), (5,), (0.1,)),
        (4, (0.5, 0.75), (1, 2), (0.1, 0.2)),
    ],
)
def test_curves_that_are_none(values):
    with pytest.raises(ArgumentError, match="Expected a curve"):
        Curve(*values)
