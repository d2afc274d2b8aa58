"""SynExp by groups: golden figures of sheet C2.5, independent solvers, brute force, rounding."""

import itertools

import keras
import numpy as np
import pytest
from scipy.optimize import minimize

import tfprune
from tests import toys
from tfprune.allocation import Budget, preconfig, precrop, ratios_of, synexp
from tfprune.allocation.expected_synflow import kernel_axes
from tfprune.cost import CostModel, measure
from tfprune.errors import ArgumentError, BudgetError, ModelError
from tfprune.surgery import resize


def plain(widths=(16, 32, 64), size=32):
    """Sheet C2.5's chain 3-a16-b32(s2)-c64(s2)-Dense10, kernels only."""
    x = inputs = keras.Input((size, size, 3), name="image")
    for name, width, stride in zip("abc", widths, (1, 2, 2), strict=True):
        x = keras.layers.Conv2D(
            width, 3, stride, padding="same", use_bias=False, name=name
        )(x)  # fmt: skip
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(10, use_bias=False, name="head")(x))


def inverted_residual():
    """Sheet C2.5's tiny inverted residual, kernels only."""
    conv, depthwise = keras.layers.Conv2D, keras.layers.DepthwiseConv2D
    same = {"padding": "same", "use_bias": False}
    x = inputs = keras.Input((32, 32, 3), name="image")
    x = conv(32, 3, 2, name="s", **same)(x)
    x = depthwise(3, name="s_depthwise", **same)(x)
    x = conv(16, 1, name="p", **same)(x)
    x = conv(96, 1, name="e", **same)(x)
    x = depthwise(3, 2, name="e_depthwise", **same)(x)
    x = conv(24, 1, name="q", **same)(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(10, use_bias=False, name="head")(x))


def widths(graph, result):
    return {name: fraction * graph[name].width for name, fraction in result.fractions.items()}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"macs": 0.5}, {"a": 16, "b": 12.9957, "c": 64}),
        ({"params": 0.5}, {"a": 16, "b": 15.2556, "c": 64}),
        ({"params": 0.25}, {"a": 16, "b": 6.8833, "c": 64}),
    ],
)
def test_golden_chain(budget, expected):
    """Sheet C2.5, to its printed digits."""
    graph = tfprune.analyse(plain())
    result = synexp(graph, Budget(**budget))
    assert widths(graph, result) == pytest.approx(expected, abs=1e-4)
    (name,) = budget
    assert result.costs[name] == pytest.approx(result.limits[name], rel=1e-9)
    assert result.costs[name] <= result.limits[name]
    if budget == {"macs": 0.5}:
        assert result.objective == pytest.approx(-1.802241, abs=1e-6)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"macs": 0.5}, {"s": 22.7533, "p": 7.8514, "e": 61.9677, "q": 24}),
        ({"params": 0.5}, {"s": 29.4615, "p": 16, "e": 31.2653, "q": 24}),
    ],
)
def test_golden_inverted_residual(budget, expected):
    """Sheet C2.5: a depthwise convolution counts once."""
    graph = tfprune.analyse(inverted_residual())
    result = synexp(graph, Budget(**budget))
    assert widths(graph, result) == pytest.approx(expected, abs=1e-4)
    if "macs" in budget:
        assert result.objective == pytest.approx(-3.760074, abs=1e-6)


@pytest.mark.parametrize(
    ("macs", "first", "openers", "others", "objective"),
    [
        (0.5, 7.423, (19.794, 39.588), (14.845, 29.691), -12.674051),
        (0.25, 3.579, (9.543, 19.085), (7.157, 14.314), None),
    ],
)
def test_golden_resnet20(macs, first, openers, others, objective):
    """Sheet C2.5: with residual coupling only the inner channels of blocks are cropped."""
    model = tfprune.zoo.resnet_cifar(20, shortcut="B")
    assert measure(model).macs == 40_813_184  # the layer set of sheet C1.13
    graph = tfprune.analyse(model)
    result = synexp(graph, Budget(macs=macs))
    found = widths(graph, result)
    streams = [found.pop(name) for name in list(found) if not name.endswith("_1_conv")]
    np.testing.assert_allclose(streams, [16, 32, 64], rtol=1e-9)
    expected = [first] * 3 + [openers[0], others[0], others[0], openers[1], others[1], others[1]]
    np.testing.assert_allclose(list(found.values()), expected, rtol=0, atol=6e-4)
    if objective is not None:
        assert result.objective == pytest.approx(objective, abs=1e-6)


def test_golden_preconfig_chain():
    """Sheet C2.6: u = 1.5, both budgets the original's."""
    graph = tfprune.analyse(plain())
    result = synexp(graph, Budget(macs=1.0, params=1.0), max_expand=1.5)
    assert widths(graph, result) == pytest.approx({"a": 24, "b": 19.33, "c": 96}, abs=5e-3)
    assert result.objective == pytest.approx(0.6138, abs=5e-5)


def small_problem(graph, budget):
    costs = CostModel(graph)
    groups = list(graph.prunable)
    functions = {name: costs.posynomial(name, groups) for name in budget.given()}
    result = synexp(graph, budget)
    return groups, functions, result


@pytest.mark.parametrize("budget", [{"macs": 0.4}, {"params": 0.3}, {"macs": 0.5, "params": 0.45}])
@pytest.mark.parametrize("make", [plain, inverted_residual, toys.residual])
def test_agrees_with_an_independent_solver(make, budget):
    """The dual problem, solved by other means, comes down to the same objective within 1e-6.

    For any multipliers the largest Lagrangian is above every feasible objective. L-BFGS-B finds
    it, Nelder and Mead's simplex the multipliers that make it least. The primal is feasible.
    """
    graph = tfprune.analyse(make())
    groups, functions, result = small_problem(graph, Budget(**budget))
    slopes = kernel_axes(graph, groups).slopes(np.zeros(len(groups)))  # linear: no shared axis
    bounds = [(np.log(1 / group.width), 0.0) for group in groups]

    def largest(logs):
        multipliers = np.exp(logs)

        def lagrangian(x):
            value, gradient = -slopes @ x, -slopes
            for name, multiplier in zip(functions, multipliers, strict=True):
                cost = functions[name](np.exp(x))
                value = value + multiplier * np.log(cost / result.limits[name])
                slope = functions[name].gradient(np.exp(x)) * np.exp(x) / cost
                gradient = gradient + multiplier * slope
            return value, gradient

        start = np.array([low / 2 for low, _ in bounds])
        options = {"ftol": 1e-15, "gtol": 1e-11, "maxiter": 5000}
        return -minimize(lagrangian, start, jac=True, method="L-BFGS-B", bounds=bounds,
                         options=options).fun  # fmt: skip

    dual = minimize(largest, np.zeros(len(functions)), method="Nelder-Mead",
                    options={"xatol": 1e-6, "fatol": 1e-10, "maxiter": 400})  # fmt: skip
    for name, limit in result.limits.items():
        assert result.costs[name] <= limit
    assert result.objective == pytest.approx(dual.fun, abs=1e-6)


def test_brute_force_of_whole_numbers():
    """All widths of a tiny chain: the optimum is above them, the rounded plan near their best."""
    graph = tfprune.analyse(plain((6, 8, 10), size=8))
    costs = CostModel(graph)
    groups = list(graph.prunable)
    function = costs.posynomial("macs", groups)
    limit = int(0.5 * costs.macs(costs.full_mask()))
    whole = np.array([6, 8, 10])
    best = -np.inf
    for found in itertools.product(range(1, 7), range(1, 9), range(1, 11)):
        fractions = np.array(found) / whole
        if round(function(fractions)) <= limit:
            # a and b stand on two kernels each, c on its own and on the classifier.
            best = max(best, 2 * np.log(fractions).sum())
    optimum = synexp(graph, Budget(macs=0.5))
    assert optimum.objective >= best - 1e-9
    plan = precrop(graph, macs=0.5, round_to=1)
    rounded = 2 * sum(np.log(len(kept) / plan.widths[name]) for name, kept in plan.kept.items())
    assert rounded <= best + 1e-9
    assert rounded >= best - 0.25  # one step of one group: 2 log(7 / 8) = -0.27


@pytest.mark.parametrize("round_to", [1, 4, 8])
@pytest.mark.parametrize("mode", ["groups", "layers"])
def test_budgets_are_never_exceeded_after_rounding(round_to, mode):
    model = tfprune.zoo.resnet_cifar(20, shortcut="B")
    dense = measure(model)
    plan = precrop(model, macs=0.5, params=0.45, round_to=round_to, mode=mode)
    cropped = measure(plan.apply(model))
    assert cropped.macs <= 0.5 * dense.macs
    assert cropped.parameters <= 0.45 * dense.parameters
    assert all(len(kept) % round_to == 0 for kept in plan.kept.values())
    # One more step of any group would not fit.
    costs, graph = CostModel(tfprune.analyse(model)), tfprune.analyse(model)
    for name, kept in plan.kept.items():
        larger = np.arange(min(len(kept) + round_to, plan.widths[name]))
        mask = graph.keep_mask({**plan.kept, name: larger})
        assert (
            costs.macs(mask) > 0.5 * dense.macs or costs.parameters(mask) > 0.45 * dense.parameters
        ), name


def test_the_first_channels_stay_and_the_weights_do_not_matter():
    """Sheet C2.8: deterministic, without a seed."""
    first, second = plain(), plain()
    plans = [precrop(model, macs=0.5, round_to=1) for model in (first, second)]
    assert plans[0].kept == plans[1].kept
    assert all(kept == tuple(range(len(kept))) for kept in plans[0].kept.values())


def test_its_ratios_serve_any_criterion():
    model = toys.residual()
    plan = precrop(model, macs=0.6, round_to=1)
    again = tfprune.plan(model, ratios_of(plan), criterion="l1", round_to=1)
    assert {n: len(k) for n, k in again.kept.items()} == {n: len(k) for n, k in plan.kept.items()}
    assert tfprune.verify(model, again)


def test_concatenated_axes_settle_where_no_small_step_gains():
    """Behind a concatenation the objective is not linear: a local optimum is promised."""
    inputs = keras.Input((8, 8, 3), name="image")
    left = keras.layers.Conv2D(12, 3, padding="same", use_bias=False, name="left")(inputs)
    right = keras.layers.Conv2D(20, 1, use_bias=False, name="right")(inputs)
    x = keras.layers.Concatenate(name="both")([left, right])
    x = keras.layers.Conv2D(16, 3, use_bias=False, name="top")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    graph = tfprune.analyse(keras.Model(inputs, keras.layers.Dense(4, name="head")(x)))
    result = synexp(graph, Budget(macs=0.5))
    groups = list(graph.prunable)
    axes, cost = kernel_axes(graph, groups), CostModel(graph).posynomial("macs", groups)
    x = np.log([result.fractions[group.name] for group in groups])
    assert axes.objective(x) == pytest.approx(result.objective, abs=1e-12)
    random = np.random.default_rng(0)
    for _ in range(200):
        step = 1e-3 * random.standard_normal(len(x))
        near = np.clip(x + step, None, 0.0)
        if cost(np.exp(near)) <= result.limits["macs"]:
            # First-order optimal: what is gained is of the second order of the step.
            assert axes.objective(near) <= result.objective + 1e-5


def test_gradient_of_a_cost():
    graph = tfprune.analyse(toys.residual())
    cost = CostModel(graph).posynomial("params", graph.prunable)
    at = np.random.default_rng(0).uniform(0.3, 1.0, len(graph.prunable))
    for number, derivative in enumerate(cost.gradient(at)):
        step = np.zeros(len(at))
        step[number] = 1e-4
        # Central differences of a polynomial of degree two along one group: exact but for rounding.
        assert derivative == pytest.approx((cost(at + step) - cost(at - step)) / 2e-4, rel=1e-6)


def test_a_cost_of_whole_fractions_is_the_models_cost():
    graph = tfprune.analyse(toys.residual())
    costs, dense = CostModel(graph), measure(graph)
    ones = np.ones(len(graph.prunable))
    assert costs.posynomial("macs", graph.prunable)(ones) == dense.macs
    assert costs.posynomial("params", graph.prunable)(ones) == dense.parameters
    assert costs.posynomial("size_bytes", graph.prunable)(ones) == dense.size_bytes


def test_preconfig_grows_and_shrinks_within_both_budgets():
    model = tfprune.zoo.resnet_cifar(20, shortcut="B")
    dense = measure(model)
    wanted = preconfig(model, macs=1.0, params=1.0)
    graph = tfprune.analyse(model)
    assert any(width > graph[name].width for name, width in wanted.items())
    assert any(width < graph[name].width for name, width in wanted.items())
    assert all(width <= 1.5 * graph[name].width for name, width in wanted.items())
    assert all(name.endswith("_1_conv") for name in wanted)  # streams stay unless asked
    built = measure(resize(model, wanted))
    assert built.macs <= dense.macs
    assert built.parameters <= dense.parameters


def test_preconfig_of_streams():
    model = plain()
    wanted = preconfig(model, macs=1.0, params=1.0, streams=True, round_to=1)
    assert wanted == {"a": 24, "b": 19, "c": 96}  # sheet C2.6, rounded down


@pytest.mark.parametrize("call", [precrop, preconfig])
def test_refusals(call):
    model = toys.residual()
    with pytest.raises(ArgumentError, match="Expected a budget"):
        call(model)
    with pytest.raises(BudgetError, match=r"below the .* that remain at the smallest widths"):
        call(model, macs=100, round_to=1)
    with pytest.raises(ArgumentError, match="matches none"):
        call(model, macs=0.5, ignore=["nothing"])
    with pytest.raises(BudgetError, match="groups whose width may change"):
        call(model, macs=0.5, ignore=["*"])
    convolutions = [keras.layers.Conv2D(8, 3, name=f"free{number}") for number in range(3)]
    free = keras.Sequential([keras.Input((None, None, 3)), *convolutions])
    with pytest.raises(ModelError, match="free size"):
        call(free, macs=0.5)


def test_refused_arguments():
    graph = tfprune.analyse(plain())
    with pytest.raises(ArgumentError, match="max_expand of at least 1"):
        synexp(graph, Budget(macs=0.5), max_expand=0.5)
    with pytest.raises(ArgumentError, match="mode to be 'groups' or 'layers'"):
        synexp(graph, Budget(macs=0.5), mode="other")
