"""ThiNet: the Gram form against the naive searches, and selection in real graphs."""

import keras
import numpy as np
import pytest
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

import tfprune
from tests import toys
from tfprune.cost import measure
from tfprune.criteria.reconstruction.ranking import rising
from tfprune.criteria.selection import Selector
from tfprune.criteria.thinet import (
    ThiNet,
    matching,
    objective,
    removal_order,
    residual,
    scales_of,
)
from tfprune.testing import check_criterion, randomize

layers = keras.layers
DATA = toys.images(24)
RANDOM = np.random.default_rng(0)


def naive_removal(x, count, allowed):
    """The paper's loop on rows of contributions, shape (rows, channels)."""
    gone = []
    for _ in range(count):
        costs = {j: np.sum(x[:, [*gone, j]].sum(1) ** 2) for j in allowed if j not in gone}
        gone.append(min(costs, key=lambda j: (costs[j], -j)))
    return gone


def naive_matching(x, count):
    """Orthogonal matching pursuit with explicit residuals."""
    y, kept, left = x.sum(1), [], [np.sum(x.sum(1) ** 2)]
    rest = y
    for _ in range(count):
        gain = (x.T @ rest) ** 2 / np.sum(x**2, 0)
        gain[kept] = -1
        kept.append(int(np.argmax(gain)))
        w, *_ = np.linalg.lstsq(x[:, kept], y, rcond=None)
        rest = y - x[:, kept] @ w
        left.append(np.sum(rest**2))
    return kept, left


matrices = st.tuples(st.integers(8, 20), st.integers(1, 8), st.integers(0, 2**32 - 1)).map(
    lambda t: (
        np.random.default_rng(t[2]).standard_normal(t[:2])
        @ np.random.default_rng(t[2] + 1).standard_normal((t[1], t[1]))
    )  # correlated channels
)


@settings(max_examples=60, deadline=None)
@given(matrices, st.data())
def test_removal_by_gram_is_the_naive_loop(x, data):
    """Sheet A2, "Fast form", and sheet A, list 10 item 3."""
    channels = x.shape[1]
    protected = np.array(sorted(data.draw(st.sets(st.integers(0, channels - 1)))), np.int64)
    width = data.draw(st.integers(len(protected), channels))
    allowed = np.setdiff1d(np.arange(channels), protected)
    expected = naive_removal(x, channels - width, allowed)
    found = removal_order(x.T @ x, width, protected)
    # Sums of squares in another order: equal but for channels that tie to 1e-9.
    values = [np.sum(x[:, order].sum(1) ** 2) for order in (expected, found.tolist())]
    assert values[0] == pytest.approx(values[1], rel=1e-9, abs=1e-9)
    assert expected == found.tolist()
    np.testing.assert_allclose(
        objective(x.T @ x, found),
        [np.sum(x[:, found[: n + 1]].sum(1) ** 2) for n in range(len(found))],
        rtol=1e-9, atol=1e-9,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(matrices)
def test_matching_by_gram_is_the_naive_pursuit(x):
    """Sheet A2, quirks: "With Gram: correlation (G1 - G_S w)_j, score c_j^2 / G_jj"."""
    kept, left = naive_matching(x, x.shape[1] - 1)
    found, unexplained = matching(x.T @ x, 0)
    # Once (nearly) all is explained only rounding is left to choose by.
    sure = sum(value > 1e-6 * left[0] for value in left[:-1])
    assert found.tolist()[:sure] == kept[:sure]
    # Squares of the smallest singular values are lost in the Gram matrix.
    np.testing.assert_allclose(unexplained[: len(left)], left, rtol=1e-6, atol=1e-9 * left[0])


@settings(max_examples=40, deadline=None)
@given(matrices)
def test_least_squares_residual(x):
    """Sheet A2, "Fast form": w = solve(G_SS, (G1)_S); residual = 1'G1 - (G1)_S . w."""
    kept = np.arange(0, x.shape[1], 2)
    y, gram = x.sum(1), x.T @ x
    w, *_ = np.linalg.lstsq(x[:, kept], y, rcond=None)
    rest = np.sum((y - x[:, kept] @ w) ** 2)
    # The condition number is squared in the Gram matrix.
    assert residual(gram, kept, 0) == pytest.approx(rest, rel=1e-6, abs=1e-9 * np.sum(y**2))
    assert residual(gram, kept, 1e-6) >= rest * (1 - 1e-9) - 1e-9 * np.sum(y**2)


def test_a_duplicated_pair_is_repaired_by_two():
    """Sheet A2, checks: "pruning one must be repaired exactly by w = 2 on the other"."""
    x = RANDOM.standard_normal((50, 6))
    x[:, 4] = x[:, 1]
    gram = x.T @ x
    kept = np.array([0, 1, 2, 3, 5])
    np.testing.assert_allclose(scales_of(gram, kept, 0), [1, 2, 1, 1, 1], rtol=1e-9)
    # The ridge moves them by about its own size.
    np.testing.assert_allclose(scales_of(gram, kept, 1e-6), [1, 2, 1, 1, 1], rtol=1e-5)
    # Both in: their sum counts, and the ridge makes it a solvable problem.
    both = scales_of(gram, np.arange(6), 1e-6)
    np.testing.assert_allclose(both, np.ones(6), rtol=1e-5)


def test_dead_channels_go_first_and_cost_nothing():
    """Sheet A2, quirks: drop dead channels first, w = 0."""
    x = RANDOM.standard_normal((50, 6))
    x[:, [1, 4]] = 0
    # A negative correlation makes removal of a living one look better than free.
    x[:, 2] = -x[:, 3] + 1e-3 * RANDOM.standard_normal(50)
    gram = x.T @ x
    assert removal_order(gram).tolist()[:2] == [4, 1]
    assert removal_order(gram, 3, np.array([4])).tolist()[0] == 1
    assert 4 not in removal_order(gram, 3, np.array([4]))
    assert matching(gram, 1e-6)[0].tolist()[-2:] == [1, 4]
    scales = scales_of(gram, np.array([0, 1, 2]), 0)
    assert scales[1] == 0 and np.isfinite(scales).all()
    np.testing.assert_array_equal(removal_order(np.zeros((3, 3))), [2, 1, 0])
    assert sorted(matching(np.zeros((3, 3)), 1e-6)[0].tolist()) == [0, 1, 2]


def test_protected_channels_join_first():
    x = RANDOM.standard_normal((50, 6))
    order, left = matching(x.T @ x, 1e-6, np.array([2, 5]))
    assert order.tolist()[:2] == [2, 5] and sorted(order.tolist()) == list(range(6))
    assert (np.diff(left) <= 0).all()


def test_scores_rise_strictly_along_the_order():
    order = np.array([3, 0, 2, 1])
    scores = rising(order, np.array([0.0, 0.5, 0.4, 0.5]))
    assert (np.diff(scores[order]) > 0).all()
    np.testing.assert_allclose(scores[order], [0, 0.5, 0.5, 0.5], atol=1e-12)


@pytest.mark.parametrize("search", ["removal", "matching"])
@pytest.mark.parametrize("build", [toys.chain, toys.residual])
def test_contract(build, search):
    check_criterion(ThiNet(DATA, search=search), build())


def test_scores_are_parts_of_the_response():
    """By the definition, on contributions that the model itself computes."""
    model = toys.chain()
    scores = ThiNet(DATA, positions=64)(tfprune.analyse(model))
    kernel = np.asarray(model.get_layer("conv1").kernel)
    relu = np.asarray(keras.Model(model.inputs[0], model.get_layer("relu0").output)(DATA))
    parts = []
    for channel in range(kernel.shape[2]):
        one = keras.ops.conv(
            relu[..., channel : channel + 1], kernel[:, :, channel : channel + 1], padding="same"
        )
        parts.append(np.asarray(one, np.float64).ravel())
    x = np.stack(parts, 1)
    order = naive_removal(x, x.shape[1], range(x.shape[1]))
    lost = [np.sum(x[:, order[: n + 1]].sum(1) ** 2) for n in range(len(order))]
    expected = np.maximum.accumulate(lost) / np.sum(x.sum(1) ** 2)
    np.testing.assert_allclose(scores["conv0"][order], expected, rtol=1e-4)  # float32 responses
    assert scores["conv0"].max() >= 1 - 1e-6


def test_a_duplicated_filter_costs_nothing():
    """Sheet A2, structural test, through the whole of plan and surgery."""
    model = toys.chain()
    for name in ("conv0", "norm0"):
        weights = model.get_layer(name).get_weights()
        for weight in weights:
            weight[..., 5] = weight[..., 2]
        model.get_layer(name).set_weights(weights)
    kernel = np.asarray(model.get_layer("conv1").kernel).copy()
    kernel[:, :, 5] = kernel[:, :, 2]  # equal contributions
    # None of the others can be missed.
    model.get_layer("conv1").kernel.assign(kernel)
    graph = tfprune.analyse(model)
    quota = {"conv0": tfprune.criteria.Quota(7, np.array([0, 1, 2, 3, 4, 6, 7]))}
    selection = ThiNet(DATA).select(graph, quota)
    assert selection.kept["conv0"].tolist() == [0, 1, 2, 3, 4, 6, 7]
    new = selection.values["conv1/kernel"]
    factors = np.ones((7, 1))
    factors[2] = 2
    # The ridge is 1e-6 of the mean energy of a channel; some channels have less.
    np.testing.assert_allclose(new, kernel[:, :, [0, 1, 2, 3, 4, 6, 7]] * factors, rtol=1e-3)
    plan = tfprune.graph.plan.PruningPlan.of(graph, selection.kept, None, selection.values)
    before, after = model.predict_on_batch(DATA), plan.apply(model).predict_on_batch(DATA)
    np.testing.assert_allclose(after, before, atol=1e-3 * np.abs(before).max())


def concatenated(framework):
    """Branches that a convolution reads together, with a depthwise-separable one and a flatten."""
    layers = framework.layers
    inputs = framework.Input((8, 8, 3))
    a = layers.Conv2D(8, 3, padding="same", activation="relu", name="a")(inputs)
    b = layers.SeparableConv2D(6, 3, padding="same", activation="relu", name="b")(a)
    x = layers.Concatenate(name="both")([a, b])
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu", name="c")(x)
    x = layers.Flatten()(x)
    return randomize(framework.Model(inputs, layers.Dense(4, name="head")(x)))


@pytest.mark.parametrize("search", ["removal", "matching"])
@pytest.mark.parametrize("name", ["chain", "residual", "concatenated", "tf_keras"])
def test_masked_is_pruned_with_the_new_kernels(name, search):
    """Sheet A, list 10 item 6, with values."""
    model = {
        "chain": toys.chain,
        "residual": toys.residual,
        "concatenated": lambda: concatenated(keras),
        "tf_keras": lambda: concatenated(tf_keras),
    }[name]()
    before = [np.array(weight) for weight in model.get_weights()]
    plan = tfprune.plan(model, 0.5, criterion=ThiNet(DATA, search=search), round_to=1)
    groups = {group.name for group in tfprune.analyse(model).prunable}
    assert set(plan.kept) == groups and plan.values
    assert tfprune.verify(model, plan, tolerance=1e-5)  # a few float32 layers
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_kernel_behind_a_concatenation_is_scaled_for_every_group():
    model = concatenated(keras)
    plan = tfprune.plan(model, {"a": 0.5, "b": 0.5}, criterion=ThiNet(DATA), round_to=1)
    kept = [*plan.kept["a"], *(8 + index for index in plan.kept["b"])]
    old = np.asarray(model.get_layer("c").kernel)[:, :, kept]
    factors = plan.values["c/kernel"] / old
    # One factor per input channel, and different from 1 in both groups.
    np.testing.assert_allclose(factors, np.broadcast_to(factors[:1, :1, :, :1], factors.shape),
                               rtol=1e-4)  # fmt: skip
    for part in (factors[0, 0, :4, 0], factors[0, 0, 4:, 0]):
        assert np.abs(part - 1).max() > 1e-3


def test_later_layers_see_the_pruned_network():
    """Sheet A2, pitfalls: activations of the already pruned net."""
    model = toys.chain()
    graph = tfprune.analyse(model)
    none = np.zeros(0, np.int64)
    quota = {"conv0": tfprune.criteria.Quota(2, none), "conv1": tfprune.criteria.Quota(5, none)}
    both = ThiNet(DATA).select(graph, quota)
    # The same, in two steps: the second on a model that has lost conv0's channels already.
    first = ThiNet(DATA).select(graph, {"conv0": quota["conv0"]})
    plan = tfprune.graph.plan.PruningPlan.of(graph, first.kept, None, first.values)
    second = ThiNet(DATA).select(tfprune.analyse(plan.apply(model)), {"conv1": quota["conv1"]})
    np.testing.assert_array_equal(both.kept["conv0"], first.kept["conv0"])
    np.testing.assert_array_equal(both.kept["conv1"], second.kept["conv1"])
    # The masked and the pruned model differ by float32 rounding.
    np.testing.assert_allclose(
        both.values["conv2/kernel"], second.values["conv2/kernel"], rtol=1e-3, atol=1e-4
    )


def test_options():
    model = toys.chain()
    plain = tfprune.plan(model, 0.5, criterion=ThiNet(DATA, rescale=False), round_to=1)
    assert plain.kept and not plain.values
    assert isinstance(ThiNet(DATA), Selector)
    first, again, other = (
        ThiNet(DATA, positions=2, seed=seed)(tfprune.analyse(model))["conv1"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_budgets_are_met():
    model = toys.chain()
    dense = measure(model).macs
    for order in ("uniform", "global"):
        plan = tfprune.plan(model, macs=0.5, criterion=ThiNet(DATA), round_to=1, order=order)
        assert 0.3 * dense < measure(model, plan).macs <= 0.5 * dense


def transposed():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, activation="relu", name="conv")(inputs)
    x = layers.Conv2DTranspose(5, 3, activation="relu", name="up")(x)
    return randomize(keras.Model(inputs, layers.Conv2D(2, 1, name="out")(x)))


def test_groups_that_nothing_linear_reads():
    model = transposed()
    graph = tfprune.analyse(model)
    scores = ThiNet(DATA)(graph)
    assert "L1 norm for 'conv', which no linear layer reads" in scores.criterion
    l1 = tfprune.criteria.L1(normalize="max")(graph)["conv"]
    np.testing.assert_array_equal(scores["conv"], l1)
    with pytest.raises(
        tfprune.TfpruneError, match=r"'conv', which only 'up' reads.*ignore=\['conv'\]"
    ):
        tfprune.plan(model, 0.5, criterion=ThiNet(DATA), round_to=1)
    plan = tfprune.plan(model, 0.5, criterion=ThiNet(DATA), round_to=1, ignore=["conv"])
    assert set(plan.kept) == {"up"} and tfprune.verify(model, plan)


def test_arguments_and_data_that_cannot_be_used():
    graph = tfprune.analyse(toys.chain())
    for name in ("images", "positions", "batch_size"):
        with pytest.raises(tfprune.TfpruneError, match=f"Expected {name} to be a positive"):
            ThiNet(DATA, **{name: 0})
    for ridge in (-1e-6, float("nan"), "little"):
        with pytest.raises(tfprune.TfpruneError, match="Expected ridge to be at least 0"):
            ThiNet(DATA, ridge=ridge)
    with pytest.raises(tfprune.TfpruneError, match="search to be one of removal, matching"):
        ThiNet(DATA, search="random")
    with pytest.raises(tfprune.TfpruneError, match="empty"):
        ThiNet(DATA[:0])(graph)
    with pytest.raises(tfprune.TfpruneError, match="Expected batches of shape"):
        ThiNet(DATA[:, :4])(graph)
    with pytest.raises(tfprune.TfpruneError, match="NaN or infinity at the input of 'conv1'"):
        ThiNet(np.full_like(DATA, np.inf))(graph)
