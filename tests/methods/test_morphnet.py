"""MorphNet: the regulariser against its formula, coupled channels, and expansion to a budget."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import toys
from tests.methods.models import same, snapshot
from tfprune.cost import CostModel, measure
from tfprune.errors import ArgumentError, BudgetError
from tfprune.graph import analyse
from tfprune.methods.expansion import expand, largest_factor, scaled, shrink_expand
from tfprune.methods.morphnet import (
    CostPenalty,
    CostTerms,
    MorphNet,
    Remains,
    judged_by,
)
from tfprune.surgery import verify


def concatenated():
    """Branches side by side, normalised together, a sum, a flatten and a slice."""
    keras.utils.set_random_seed(3)
    layers = keras.layers
    inputs = keras.Input((4, 4, 2), name="image")
    a = layers.Conv2D(3, 1, name="left")(inputs)
    b = layers.Conv2D(4, 3, padding="same", name="right")(inputs)
    x = layers.BatchNormalization(name="both_norm")(layers.Concatenate(name="both")([a, b]))
    c = layers.BatchNormalization(name="skip_norm")(layers.Conv2D(7, 1, name="skip")(inputs))
    x = layers.Add(name="sum")([x, c])
    part = layers.Conv2D(5, 1, name="part")(x[..., 1:5])
    part = layers.BatchNormalization(name="part_norm")(part)
    pooled = layers.GlobalAveragePooling2D(name="pool")(part)
    x = layers.Concatenate(name="all")([layers.Flatten(name="flat")(x), pooled])
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name="concatenated")


NETS = {"chain": toys.chain, "residual": toys.residual, "concatenated": concatenated}


def bound(model, groups=None, resource="macs", q=0.0):
    graph = analyse(model)
    groups = graph.prunable if groups is None else groups
    return graph, Remains(groups, q), CostTerms(CostModel(graph), groups, resource)


def regulariser(terms, r, alive):
    return float((np.asarray(terms.price(alive.astype(np.float32)), np.float64) * r).sum())


# ---- the formula --------------------------------------------------------------------------------


def test_golden():
    """Sheet C4.3: F = 3456 and G = 3859.2 FLOPs; half of each in MACs."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((4, 4, 1), name="image")
    x = layers.Conv2D(5, 1, use_bias=False, name="first")(inputs)
    x = layers.Conv2D(6, 3, padding="same", use_bias=False, name="second")(x)
    outputs = layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(inputs, layers.Dense(1, use_bias=False, name="head")(outputs))
    _, _, terms = bound(model)
    alive = np.array([1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0])
    r = np.array([0.7, 0.5, 0.5, 0.0, 0.0, 1.0, 0.5, 0.5, 0.2, 0.0, 0.0])
    assert r[:5].sum() == pytest.approx(1.7) and r[5:].sum() == pytest.approx(2.2)
    # beside the convolution: 16 MACs per channel of the first, 1 of the head
    assert 2 * (terms.cost(alive) - 16 * 3 - 1 * 4) == 3456
    g = regulariser(terms, r, alive) - 16 * 1.7 - 1 * 2.2
    assert 2 * g == pytest.approx(3859.2, rel=1e-6)
    assert measure(model).macs == terms.total


@pytest.mark.parametrize("resource", ["macs", "params"])
@pytest.mark.parametrize("name", sorted(NETS))
def test_the_cost_is_that_of_the_cost_model_for_any_channels(name, resource):
    graph, _, terms = bound(NETS[name](), resource=resource)
    costs = CostModel(graph)
    function = costs.macs if resource == "macs" else costs.parameters
    assert terms.total == function(costs.full_mask())
    random = np.random.default_rng(0)
    for _ in range(5):
        kept = {g.name: np.flatnonzero(random.random(g.width) < 0.6) for g in graph.prunable}
        alive = np.concatenate([np.isin(np.arange(g.width), kept[g.name]) for g in graph.prunable])
        assert terms.cost(alive) == function(graph.keep_mask(kept))


@pytest.mark.parametrize("name", sorted(NETS))
def test_the_price_of_a_channel_is_the_derivative_of_the_cost(name):
    """By a difference: F is linear in how often one channel is there, unless it stands twice."""
    _, _, terms = bound(NETS[name]())
    alive = (np.random.default_rng(1).random(terms.count) < 0.7).astype(np.float32)
    prices = np.asarray(terms.price(alive))
    for channel in range(terms.count):
        more, less = alive.astype(np.float64), alive.astype(np.float64)
        more[channel] += 0.5
        less[channel] -= 0.5
        # a central difference is exact for products of two; float32 sums
        assert prices[channel] == pytest.approx(terms.cost(more) - terms.cost(less), rel=1e-5)
    scaled_prices = np.asarray(terms.price(alive, 1 / terms.total))
    np.testing.assert_allclose(scaled_prices * terms.total, prices, rtol=1e-5)


def test_depthwise_counts_once():
    """Departure from sheet C4.3: the derivative of C A, not twice as much."""
    inputs = keras.Input((4, 4, 3), name="image")
    x = keras.layers.Conv2D(6, 1, use_bias=False, name="first")(inputs)
    x = keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    _, _, terms = bound(keras.Model(inputs, keras.layers.Dense(2, name="head")(x)))
    alive = np.ones(6, np.float32)
    np.testing.assert_allclose(np.asarray(terms.price(alive)), 16 * 3 + 16 * 9 + 2)


# ---- what is left of a channel ------------------------------------------------------------------


def test_coupled_channels_are_worth_the_largest_scale_and_ties_go_to_the_first():
    """Sheet C4.4: element-wise maximum over the members, behind a concatenation and a sum."""
    model = concatenated()
    graph = analyse(model)
    weights = {v.path: v for v in model.variables}
    both = np.array([-0.5, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1], np.float32)
    skip = np.array([0.4, -0.2, 0.6, 0.1, 0.2, 0.1, 0.0], np.float32)
    weights["both_norm/gamma"].assign(both)
    weights["skip_norm/gamma"].assign(skip)
    groups = [g for g in graph.prunable if g.name != "part"]
    assert sum(g.width for g in groups) == 7
    remains = Remains(groups)
    # the groups' channels in the order of the sum's
    order = np.empty(7, int)
    for start, group in zip(remains.starts, groups, strict=False):
        (member,) = (m for m in group.followers if m.full_name == "skip_norm/gamma")
        order[member.positions] = start + member.channels
    r = np.asarray(remains())
    np.testing.assert_array_equal(r[order], np.maximum(np.abs(both), np.abs(skip)))
    values, prices = remains.values(), np.empty(7, np.float32)
    prices[order] = np.arange(1, 8)
    slopes = remains.gradient(values, remains.largest(values), prices)
    found = {v.path: np.asarray(s) for v, s in zip(remains.variables, slopes, strict=True)}
    first = remains.variables[0].path
    ties = {"both_norm/gamma": [0, 2, 0, 4, 0, 6, 0], "skip_norm/gamma": [0, -2, 0, 4, 0, 6, 0]}
    alone = {"both_norm/gamma": [-1, 0, 0, 0, 0, 0, 7], "skip_norm/gamma": [0, 0, 3, 0, 5, 0, 0]}
    for path, slope in found.items():
        np.testing.assert_array_equal(slope, np.add(alone[path], path == first and ties[path]))


def test_without_scales_the_filters_decide():
    """Sheet C4.3: (1 - q) root mean square + q mean absolute value, the largest of several."""
    model = toys.residual()
    graph = analyse(model)
    assert [m.full_name for m in judged_by(graph["stem"])] == ["stem_norm/gamma"]
    group = graph["expand"]
    assert [m.full_name for m in judged_by(group)] == ["expand/kernel", "excite/kernel"]
    r = np.asarray(Remains([group], 0.25)())
    kernels = [np.asarray(m.variable, np.float64).reshape(-1, 24) for m in judged_by(group)]
    wanted = [0.75 * np.sqrt((k**2).mean(0)) + 0.25 * np.abs(k).mean(0) for k in kernels]
    np.testing.assert_allclose(r, np.maximum(*wanted), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(NETS))
def test_the_gradient_equals_finite_differences_with_counts_held(name):
    """dG / dw by every entry of every scale and kernel that decides."""
    model = NETS[name]()
    graph, remains, terms = bound(model, q=0.5)
    random = np.random.default_rng(2)
    for variable in remains.variables:
        # far from the kinks of |.| and, with random values, of the maximum
        value = random.uniform(0.3, 1.5, variable.shape) * random.choice([-1, 1], variable.shape)
        variable.assign(value.astype("float32"))
    update = CostPenalty(strength=1 / terms.total, alive_above=0.8, l1_fraction=0.5)
    update.bind(graph)
    zeros = {id(v): keras.ops.zeros(v.shape) for v in model.trainable_variables}
    added = update.gradients(zeros, 0.1)
    alive = np.asarray(remains()) > 0.8
    assert 0 < alive.sum() < len(alive)
    prices = np.asarray(terms.price(alive.astype(np.float32), 1 / terms.total), np.float64)
    watched = {id(v) for v in remains.variables}
    assert all(not np.any(np.asarray(g)) for key, g in added.items() if key not in watched)
    for variable in remains.variables:
        value, slope = np.asarray(variable).copy(), np.asarray(added[id(variable)])
        chosen = random.permutation(value.size)[:6]
        for position in chosen:
            index = np.unravel_index(position, value.shape)
            sums = []
            for step in (1e-2, -1e-2):
                moved = value.copy()
                moved[index] += step
                variable.assign(moved)
                sums.append((np.asarray(remains(), np.float64) * prices).sum())
            variable.assign(value)
            # float32 over a step of 2e-2
            assert slope[index] == pytest.approx((sums[0] - sums[1]) / 2e-2, rel=2e-2, abs=2e-5)


def test_ignored_groups_count_as_alive_and_are_not_penalised():
    model = toys.chain()
    update = CostPenalty(ignore=["conv1"])
    update.bind(analyse(model))
    assert {v.path for v in update.held.remains.variables} == {"norm0/gamma", "norm2/gamma"}
    assert update.held.terms.total == measure(model).macs
    assert update.held.scale == 1 / measure(model).macs


# ---- training -----------------------------------------------------------------------------------

RATE, MOMENTUM, STRENGTH, ALIVE = 0.05, 0.9, 2e-2, 0.5
WIDTHS = (6, 5)
X = np.random.default_rng(0).standard_normal((24, 4)).astype("float32")


def scales():
    """Two normalisations whose output is their loss: all gradients are known."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = inputs = keras.Input((4,), name="rows")
    for i, width in enumerate(WIDTHS):
        x = layers.Dense(width, use_bias=False, name=f"dense{i}")(x)
        x = layers.BatchNormalization(center=False, name=f"norm{i}")(x)
    model = keras.Model(inputs, layers.Dense(2, use_bias=False, name="head")(x), name="scales")
    random = np.random.default_rng(4)
    for i, width in enumerate(WIDTHS):
        model.get_layer(f"norm{i}").gamma.assign(random.uniform(-1, 1, width))
    return model


@keras.saving.register_keras_serializable(package="tests")
def nothing(y_true, y_pred):
    """A loss that is constant: what moves is the penalty's."""
    return 0.0 * keras.ops.sum(y_pred, -1)


def trained(prepared, epochs, *, jit=False, fresh=True, initial_epoch=0):
    if fresh:
        optimizer = keras.optimizers.SGD(RATE, momentum=MOMENTUM)
        prepared.compile(optimizer, nothing, jit_compile=jit)
    prepared.fit(X, X[:, :2], batch_size=8, epochs=epochs, initial_epoch=initial_epoch,
                 shuffle=False, verbose=0)  # fmt: skip
    return prepared


METHOD = MorphNet(strength=STRENGTH, alive_above=ALIVE)


@functools.cache
def whole():
    return trained(METHOD.prepare(scales()), 4)


def test_training_equals_the_formula_in_numpy():
    """Sheet C4.3 over twelve steps, through momentum, with channels dying on the way."""
    model = scales()
    first, second = (np.asarray(model.get_layer(f"norm{i}").gamma, np.float64) for i in (0, 1))
    momenta, counts = [np.zeros(6), np.zeros(5)], []
    for _ in range(12):
        a, b = (np.abs(first) > ALIVE).sum(), (np.abs(second) > ALIVE).sum()
        counts.append((a, b))
        # dense0: 4 in; dense1 between the groups; head: 2 out
        added = [(4 + b) * np.sign(first), (a + 2) * np.sign(second)]
        for gamma, momentum, g in zip((first, second), momenta, added, strict=True):
            momentum *= MOMENTUM
            momentum -= RATE * STRENGTH * g
            gamma += momentum
    assert len(set(counts)) > 1
    for i, wanted in enumerate((first, second)):
        mine = np.asarray(whole().get_layer(f"norm{i}").gamma)
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-6)  # float32
    figures = whole().update.figures()
    a, b = (np.abs(first) > ALIVE).sum(), (np.abs(second) > ALIVE).sum()
    assert figures["alive_macs"] == 4 * a + a * b + 2 * b
    assert figures["alive"] == pytest.approx((a + b) / 11)
    g = 4 * np.abs(first).sum() + a * np.abs(second).sum() + b * np.abs(first).sum()
    g += 2 * np.abs(second).sum()
    assert figures["cost_penalty"] == pytest.approx(STRENGTH * g, rel=1e-4)


def test_what_is_not_alive_goes():
    prepared = whole()
    kept = METHOD.plan(prepared).kept
    for i in (0, 1):
        gamma = np.abs(np.asarray(prepared.get_layer(f"norm{i}").gamma))
        assert kept[f"dense{i}"] == tuple(np.flatnonzero(gamma > ALIVE))
    assert verify(prepared, METHOD.plan(prepared)).passed


def test_going_on_after_saving_is_the_same_training(tmp_path):
    trained(METHOD.prepare(scales()), 2).save(tmp_path / "half.keras")
    loaded = keras.models.load_model(tmp_path / "half.keras")
    trained(loaded, 4, fresh=False, initial_epoch=2)
    for first, second in zip(whole().variables, loaded.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


def test_xla_trains_alike():
    fast = trained(METHOD.prepare(scales()), 4, jit=True)
    for first, second in zip(whole().variables, fast.variables, strict=True):
        # float32, in another order
        np.testing.assert_allclose(np.asarray(first), np.asarray(second), rtol=1e-4, atol=1e-6)


# ---- expansion ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.floats(0.01, 1000))
def test_the_largest_factor_is_found(limit):
    factor = largest_factor(lambda w: w <= limit)
    assert factor <= limit < factor * (1 + 1e-11)


def test_rounding_of_widths():
    assert [scaled(10, w, 1) for w in (0.01, 1.04, 1.05, 1.25)] == [1, 10, 11, 13]
    assert [scaled(24, w, 8) for w in (0.1, 1.16, 1.17)] == [8, 24, 32]
    assert scaled(5, 1.5, 8) == 8  # narrower than one multiple: a whole number
    assert scaled(3, 1.5, 8, inner=4) == 4  # heads of width 4 go in pairs: 12 -> 16


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("name", ["chain", "residual", "concatenated"])
def test_expand_is_maximal(name, round_to):
    """Sheet C4.5, step 3: the largest w with F(w O') <= budget; a little more exceeds it."""
    model = NETS[name]()
    before = snapshot(model)
    budget = 2 * measure(model).macs
    result = expand(model, macs=budget, round_to=round_to)
    assert same(before, model)
    assert result.cost == {"macs": measure(result.model).macs}
    assert result.cost["macs"] <= budget
    graph = analyse(model)
    unit = {g.name: round_to if g.width >= round_to else 1 for g in graph.prunable}
    assert result.widths == {
        g.name: scaled(g.width, result.multiplier, round_to) for g in graph.prunable
    }
    assert all(width % unit[name] == 0 for name, width in result.widths.items())
    terms = CostTerms(CostModel(graph), graph.prunable, "macs")
    more = [scaled(g.width, result.multiplier * (1 + 1e-9), round_to) for g in graph.prunable]
    times = [
        np.bincount(np.arange(w) % g.width, minlength=g.width)
        for g, w in zip(graph.prunable, more, strict=True)
    ]
    assert terms.cost(np.concatenate(times)) > budget


def test_expand_from_other_widths_and_within_two_budgets():
    model = toys.chain()
    whole_cost = measure(model)
    base = {"conv0": 1, "conv1": 12, "conv2": 4}
    result = expand(model, base, macs=whole_cost.macs, params=whole_cost.parameters)
    cost = measure(result.model)
    assert result.multiplier > 1
    assert result.widths == {n: scaled(w, result.multiplier, 1) for n, w in base.items()}
    assert cost.macs <= whole_cost.macs and cost.parameters <= whole_cost.parameters
    assert result.cost == {"macs": cost.macs, "params": cost.parameters}
    kept = expand(model, macs=2 * whole_cost.macs, ignore=["conv1"])
    assert analyse(kept.model)["conv1"].width == 12


# ---- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images[:256].reshape(-1, 8, 8, 1) / 16).astype("float32"), labels[:256]


def small_net():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = inputs = keras.Input((8, 8, 1), name="image")
    for i, width in enumerate((8, 12)):
        x = layers.Conv2D(width, 3, strides=2 - i, name=f"conv{i}")(x)
        x = layers.BatchNormalization(name=f"norm{i}")(x)
        x = layers.ReLU(name=f"relu{i}")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(10, name="head")(x), name="small")


OPTIONS = {"learning_rate": 0.05, "batch_size": 32, "verbose": 0}


def test_run_on_digits_meets_the_macs(digits):
    model = small_net()
    before = snapshot(model)
    result = MorphNet(macs=0.5).run(model, digits, epochs=3, seed=1, **OPTIONS)
    assert same(before, model)
    assert result.macs <= 0.5
    assert measure(result.model).macs == round(result.macs * measure(model).macs)
    assert verify(result.trained, result.plan).passed
    penalties = result.record.history["cost_penalty"]
    assert penalties[-1] < penalties[0]


def test_shrink_and_expand(digits):
    """Sheet C4.5: two rounds at the seed's MACs, then a training from scratch."""
    model = small_net()
    seed = measure(model).macs
    method = MorphNet(strength=20 / seed, alive_above=0.5)
    result = shrink_expand(
        model, digits, method=method, rounds=2, epochs=1, scratch={"epochs": 1, "verbose": 0},
        **OPTIONS,
    )  # fmt: skip
    assert len(result.rounds) == 2 and result.scratch is not None
    for entry in result.rounds:
        assert entry.cost["macs"] <= seed
        assert entry.widths == {n: scaled(w, entry.multiplier, 1) for n, w in entry.shrunk.items()}
    first = result.rounds[0]
    assert any(first.shrunk[n] < width for n, width in (("conv0", 8), ("conv1", 12)))
    assert first.multiplier > 1
    assert {n: analyse(result.model)[n].width for n in result.widths} == dict(result.widths)
    assert measure(result.model).macs == result.rounds[-1].cost["macs"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MorphNet(resource="latency"), ArgumentError, "resource"),
        (lambda: MorphNet(strength=0), ArgumentError, "strength"),
        (lambda: MorphNet(alive_above=-1), ArgumentError, "alive_above"),
        (lambda: MorphNet(l1_fraction=2), ArgumentError, "l1_fraction"),
        (lambda: expand(toys.chain()), ArgumentError, "budget"),
        (lambda: expand(toys.chain(), macs=0.5), ArgumentError, "macs"),
        (lambda: expand(toys.chain(), macs=10), BudgetError, "room"),
        (lambda: expand(toys.chain(), {"head": 3}, macs=10**9), ArgumentError, "head"),
        (lambda: expand(toys.chain(), macs=10**9, ignore=["conv*"]), BudgetError, "can grow"),
        (lambda: shrink_expand(0, 0, method=METHOD, rounds=0, epochs=1), ArgumentError, "rounds"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
