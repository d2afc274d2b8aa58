"""SynExp by layers: closed forms, golden figures of sheet C2.4, and independent solvers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from tfprune.allocation import densities, water_filling
from tfprune.errors import ArgumentError

# Sheet C2.4: four 3x3 convolutions and a dense layer; MACs at 32x32, 16x16, 8x8, 8x8 and 1.
PARAMS = np.array([9 * 3 * 16, 9 * 16 * 32, 9 * 32 * 64, 9 * 64 * 64, 64 * 10], float)
MACS = PARAMS * [32 * 32, 16 * 16, 8 * 8, 8 * 8, 1]


@pytest.mark.parametrize(
    ("fraction", "expected", "objective"),
    [
        (0.50, [1, 1, 0.67296, 0.33648, 1], -1.485286),
        (0.25, [1, 1, 0.259440, 0.129720, 1], -3.391606),
        (0.10, [1, 0.363542, 0.090885, 0.045443, 1], -6.501320),
    ],
)
def test_golden_figures_for_parameters(fraction, expected, objective):
    """Sheet C2.4, "Golden values", to their printed digits."""
    found = water_filling(PARAMS, fraction * PARAMS.sum())
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)
    assert np.log(found).sum() == pytest.approx(objective, abs=5e-7)
    assert PARAMS @ found == pytest.approx(fraction * PARAMS.sum(), rel=1e-12)


@pytest.mark.parametrize(
    ("params", "macs", "expected", "objective"),
    [
        (0.3, 0.3, [0.874747, 0.328030, 0.328030, 0.164015, 1], -4.170918),  # MACs alone bind
        (0.2, 0.6, [1, 0.80463, 0.201157, 0.100579, 1], -4.117855),  # parameters alone bind
    ],
)
def test_golden_figures_for_two_budgets(params, macs, expected, objective):
    found = densities([PARAMS, MACS], [params * PARAMS.sum(), macs * MACS.sum()])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert np.log(found).sum() == pytest.approx(objective, abs=5e-7)


def test_preconfig_without_caps_makes_an_absurd_classifier():
    """Sheet C2.4: both budgets are the original's, and nothing bounds a layer."""
    found = densities([PARAMS, MACS], [PARAMS.sum(), MACS.sum()], np.inf)
    np.testing.assert_allclose(
        found, [4.1408, 1.28399, 0.75865, 0.37933, 39.537], rtol=2e-5
    )  # five printed digits


def test_without_caps_one_budget_gives_every_layer_the_same_cost():
    """Sheet C2.4: w = B / L."""
    found = water_filling(PARAMS, 5000.0, np.inf)
    np.testing.assert_allclose(PARAMS * found, 1000.0)


def test_a_loose_budget_leaves_everything_whole():
    np.testing.assert_array_equal(water_filling(PARAMS, 2 * PARAMS.sum()), 1.0)


def test_both_budgets_bind():
    budgets = [0.25 * PARAMS.sum(), 0.35 * MACS.sum()]
    found = densities([PARAMS, MACS], budgets)
    assert PARAMS @ found == pytest.approx(budgets[0], rel=1e-9)
    assert MACS @ found == pytest.approx(budgets[1], rel=1e-9)


@settings(max_examples=15, deadline=None)  # SLSQP takes as long as it takes
@given(
    layers=st.integers(2, 7),
    seed=st.integers(0, 10**6),
    fractions=st.tuples(st.floats(0.1, 0.95), st.floats(0.1, 0.95)),
    cap=st.sampled_from([1.0, 1.5]),
)
def test_agrees_with_an_independent_solver(layers, seed, fractions, cap):
    """The objective within 1e-6 of SLSQP's on the same problem, and both budgets kept."""
    random = np.random.default_rng(seed)
    costs = [np.exp(random.uniform(0, 5, layers)) for _ in range(2)]
    budgets = [f * c.sum() for f, c in zip(fractions, costs, strict=True)]
    found = densities(costs, budgets, cap)
    for cost, budget in zip(costs, budgets, strict=True):
        assert cost @ found <= budget * (1 + 1e-9)
    start = np.full(layers, 0.5 * min(fractions))
    solved = minimize(
        lambda p: -np.log(p).sum(), start, jac=lambda p: -1 / p, method="SLSQP",
        bounds=[(1e-6, cap)] * layers, options={"ftol": 1e-14, "maxiter": 1000},
        constraints=[
            {"type": "ineq", "fun": lambda p, u=c / b: 1 - u @ p, "jac": lambda p, u=c / b: -u}
            for c, b in zip(costs, budgets, strict=True)
        ],
    )  # fmt: skip
    # The closed form is never worse. SLSQP may stop early (it then says so), never above.
    assert np.log(found).sum() >= -solved.fun - 1e-6
    if solved.success:
        assert np.log(found).sum() == pytest.approx(-solved.fun, abs=1e-6)


def test_brute_force():
    """Three layers on a grid of densities: nothing on it is better, and the best comes near."""
    cost, budget = np.array([1.0, 3.0, 8.0]), 5.0
    grid = np.arange(0.02, 1.0001, 0.02)
    points = np.stack(np.meshgrid(grid, grid, grid, indexing="ij"), -1).reshape(-1, 3)
    objective = np.where(points @ cost <= budget + 1e-9, np.log(points).sum(1), -np.inf)
    best = np.log(water_filling(cost, budget)).sum()
    assert objective.max() <= best + 1e-9
    assert objective.max() >= best - 0.05  # the grid is 0.02 wide


@pytest.mark.parametrize("bad", [[], [1.0, 0.0], [1.0, -2.0], [float("nan")]])
def test_costs_must_be_positive(bad):
    with pytest.raises(ArgumentError, match="Expected costs above zero"):
        water_filling(bad, 1.0)


def test_budget_must_be_positive():
    with pytest.raises(ArgumentError, match="Expected budget above zero"):
        water_filling([1.0], 0.0)


def test_one_or_two_budgets():
    with pytest.raises(ArgumentError, match="one or two kinds of cost"):
        densities([PARAMS], [1.0, 2.0])
