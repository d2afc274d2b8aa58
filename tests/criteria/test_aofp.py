"""AOFP: the binary search by hand, the damage against layers called one by one, and the scores."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import keras
import numpy as np
import pytest
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

import tfprune
from tests import toys
from tests.criteria.test_gates import attention, concatenation, nested
from tfprune.criteria.aofp import (
    AOFP,
    begin,
    decided,
    draw,
    goes_on,
    ranked,
    removal_order,
    tallied,
)
from tfprune.criteria.damage import damage_of, readers_by_group, relative_change
from tfprune.errors import ArgumentError, DataError
from tfprune.graph.plan import PruningPlan
from tfprune.surgery import apply
from tfprune.testing import check_criterion

IMAGES = toys.images(24)
SMALL = {"draws": 1, "halves": 1, "batches": 2, "batch_size": 4}


def searched(means, alive=None, space=None):
    """A search in which every channel has one draw, of a given damage; ``None`` for no draw."""
    search = begin(len(means), np.arange(len(means)) if alive is None else alive, space)
    for channel, value in enumerate(means):
        if value is not None:
            search = tallied(search, np.array([channel]), value)
    return search


# The search without a network.


@given(st.integers(0, 10**6), st.integers(2, 40))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_half_of_the_space_is_drawn_without_replacement(seed, size):
    """Sheet B1, step 3a: g = floor(|U| / 2)."""
    space = np.sort(np.random.default_rng(seed).choice(100, size, replace=False))
    dropped = draw(np.random.default_rng(seed), space)
    assert len(dropped) == size // 2 == len(set(dropped.tolist()))
    assert np.isin(dropped, space).all() and (np.diff(dropped) > 0).all()


def test_every_half_comes_up():
    random = np.random.default_rng(0)
    drawn = {tuple(draw(random, np.array([3, 5, 8, 9])).tolist()) for _ in range(100)}
    assert drawn == {(3, 5), (3, 8), (3, 9), (5, 8), (5, 9), (8, 9)}


def test_means_by_hand():
    """Sheet B1, step 3e: T_j += t and N_j += 1 for j in D."""
    search = begin(4, np.arange(4))
    for dropped, damage in (([0, 1], 0.5), ([0, 2], 0.25), ([1, 2], 1.0)):
        search = tallied(search, np.array(dropped), damage)
    np.testing.assert_array_equal(search.total, [0.75, 1.5, 1.25, 0])
    np.testing.assert_array_equal(search.count, [2, 2, 2, 0])
    assert search.steps == 3
    order, means = ranked(search)
    np.testing.assert_array_equal(order, [0, 2, 1, 3])
    # Channel 3 was never dropped.
    np.testing.assert_array_equal(means, [0.375, 0.625, 0.75, np.inf])


def test_a_move_is_accepted_strictly_below_theta():
    """Sheet B1, step 4: worst is the g-th smallest; ``worst < theta``, not ``<=``."""
    search = searched([0.5, 0.125, 0.75, 0.25, 1.0])
    for theta in (0.2500001, 10.0):
        after, decision, worst = decided(search, theta)
        assert (decision, worst) == ("accept", 0.25)
        np.testing.assert_array_equal(after.alive, [0, 2, 4])
        np.testing.assert_array_equal(after.space, [0, 2, 4])
        assert not after.total.any() and not after.count.any() and after.steps == 0
    for theta in (0.25, 0.1):
        after, decision, worst = decided(search, theta)
        assert (decision, worst) == ("refine", 0.25)
        np.testing.assert_array_equal(after.alive, np.arange(5))
        np.testing.assert_array_equal(after.space, [1, 3])
        assert not after.total.any() and not after.count.any() and after.steps == 0


@pytest.mark.parametrize("space", [[1, 3], [1, 2, 3]])
def test_giving_up_begins_anew_with_all_that_is_left(space):
    search = searched([None, 0.5, 0.75, 0.625], np.array([1, 2, 3]), np.array(space))
    after, decision, worst = decided(search, 0.5)
    assert (decision, worst) == ("give up", 0.5)
    np.testing.assert_array_equal(after.space, [1, 2, 3])
    after, decision, _ = decided(search, 0.51)
    assert decision == "accept"
    np.testing.assert_array_equal(after.alive, [2, 3])


def test_what_was_never_dropped_is_never_accepted():
    after, decision, worst = decided(searched([0.0, None, None, None]), 1e30)
    assert decision == "refine" and worst == np.inf
    np.testing.assert_array_equal(after.space, [0, 1])


def test_fewest_channels_stay():
    search = searched([0.0] * 6)
    assert decided(search, 1.0, least=3)[1] == "accept"
    after, decision, _ = decided(search, 1.0, least=4)
    assert decision == "refine" and len(after.space) == 3 and goes_on(after, 4)
    assert not goes_on(begin(6, np.arange(4)), 4)
    assert not goes_on(begin(6, np.array([5])), 1)


def test_fixed_channels_are_not_searched():
    search = searched([None, 0.0, 0.0, 0.0], np.arange(4), np.array([1, 2, 3]))
    after, decision, _ = decided(search, 1.0, fixed=np.array([0]))
    assert decision == "accept"
    np.testing.assert_array_equal(after.alive, [0, 2, 3])
    np.testing.assert_array_equal(after.space, [2, 3])


@given(st.integers(0, 10**6), st.integers(2, 20), st.integers(1, 4))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_no_search_empties_a_group(seed, width, least):
    random = np.random.default_rng(seed)
    search, theta = begin(width, np.arange(width)), 0.5
    for _ in range(60):
        if not goes_on(search, least):
            break
        for _ in range(3):
            search = tallied(search, draw(random, search.space), float(random.random()))
        search, _, _ = decided(search, theta, least)
        assert len(search.alive) >= min(least, width)
        assert np.isin(search.space, search.alive).all()


@pytest.mark.parametrize(
    ("width", "halves", "expected"),
    [
        (8, None, (8 + 4 + 2) + (4 + 2) + 2),
        (128, None, sum(2 * n - 2 for n in (128, 64, 32, 16, 8, 4, 2))),
        (8, 1, 8 + 4 + 2),
        (5, 2, (5 + 2) + 3 + 2),
        (1, None, 0),
    ],
)
def test_how_much_is_measured(width, halves, expected):
    """Draws per channel of the spaces: of 8: 8, 4, 2; then of the 4 that are left, and of 2."""
    calls = []

    def damage(number, alive, dropped):
        assert np.isin(dropped, alive).all() and len(dropped) < len(alive)
        calls.append(number)
        return 1.0

    order, means = removal_order(width, damage, np.random.default_rng(0), draws=2, halves=halves)
    assert calls == list(range(2 * expected))
    assert len(order) == len(means) == len(set(order.tolist())) == width - 1


@pytest.mark.parametrize("seed", range(3))
def test_order_of_damages_that_add_up(seed):
    """Channels that cost 1 to 8: the search finds the whole order, cheapest first."""
    random = np.random.default_rng(seed)
    costs = 1 + random.permutation(8)

    def damage(number, alive, dropped):
        return float(costs[dropped].sum())

    # Neighbours differ by 4/7 in their mean of 1000 draws, whose noise is below 0.1.
    order, means = removal_order(8, damage, random, draws=250)
    np.testing.assert_array_equal(costs[order], np.arange(1, 8))
    # At g = 1 the damage is the channel's own: the ends of the three descents.
    np.testing.assert_array_equal(means[[0, 1, 4, 5, 6]], [1, 2, 5, 6, 7])


# The damage.


def test_relative_change_by_hand():
    base = np.array([[3.0, 0.0], [0.0, 4.0]], np.float32)
    assert relative_change(base, base) == 0
    assert relative_change(base, np.array([[3.0, 0.0], [0.0, 0.0]])) == 16 / 25
    assert relative_change(np.zeros(3), np.zeros(3)) == 0
    assert relative_change(np.zeros(3), np.ones(3)) == 1
    with pytest.raises(DataError, match="finite"):
        relative_change(base, base * np.nan)
    # Half precision would overflow at 65504.
    assert relative_change(np.full(8, 300, np.float16), np.zeros(8, np.float16)) == 1


def test_metric_site_of_the_sheet():
    """Sheet B1, step 3b: behind the next layer's convolution, normalisation and ReLU."""
    found = readers_by_group(tfprune.analyse(toys.chain()))
    sites = {
        name: [(r.call.op.name, *(call.op.name for call in r.behind)) for r in readers]
        for name, readers in found.items()
    }
    assert sites == {
        "conv0": [("conv1", "norm1", "relu1")],
        "conv1": [("conv2", "norm2", "relu2")],
        "conv2": [("head",)],
    }


def test_damage_of_a_chain_layer_by_layer():
    model = toys.chain()
    until = keras.Model(model.input, model.get_layer("relu0").output)
    behind = [model.get_layer(name) for name in ("conv1", "norm1", "relu1")]
    batches = [[IMAGES[:12]], [IMAGES[12:]]]
    damage = damage_of(tfprune.analyse(model), "conv0", batches)
    alive, dropped = np.array([0, 1, 3, 4, 6]), np.array([1, 6])
    for number, (batch,) in enumerate(batches):
        outputs = []
        for stays in (alive, [0, 3, 4]):
            mask = np.isin(np.arange(8), stays).astype("float32")
            x = until(batch, training=False) * mask
            for layer in behind:
                x = layer(x, training=False) if layer.name == "norm1" else layer(x)
            outputs.append(np.asarray(x, np.float64))
        expected = np.sum((outputs[0] - outputs[1]) ** 2) / np.sum(outputs[0] ** 2)
        # float32 squares are summed.
        assert damage(number, alive, dropped) == pytest.approx(expected, rel=1e-5)
        assert damage(number + 2, alive, dropped) == damage(number, alive, dropped)
        assert expected > 1e-3


def test_of_several_readers_the_largest_counts():
    """The stem of a residual block is read by the branch and, behind the sum, by the head."""
    model = toys.residual()
    graph = tfprune.analyse(model)
    assert len(readers_by_group(graph)["stem"]) == 2
    dropped = np.array([0, 5, 7])
    mask = np.ones(16, "float32")
    mask[dropped] = 0
    changes = []
    for source, layer in (("expand", "expand"), ("sum", "head")):
        reader = model.get_layer(layer)
        tensor = model.get_layer(source)
        before = tensor.input if source == "expand" else tensor.output
        x = np.asarray(keras.Model(model.input, before)(IMAGES, training=False))
        ends = [
            np.asarray(reader(value.reshape(len(x), -1) if layer == "head" else value), np.float64)
            for value in (x, x * mask)
        ]
        changes.append(np.sum((ends[0] - ends[1]) ** 2) / np.sum(ends[0] ** 2))
    found = damage_of(graph, "stem", [[IMAGES]])(0, np.arange(16), dropped)
    assert found == pytest.approx(max(changes), rel=1e-5)
    assert not np.isclose(changes[0], changes[1], rtol=1e-2)


def test_inside_layers_the_outputs_count():
    """Attention heads: compared with the model that is pruned for real."""
    model = attention()
    graph = tfprune.analyse(model)
    heads = next(name for name in readers_by_group(graph) if name.endswith(":heads"))
    assert not readers_by_group(graph)[heads]
    batch = IMAGES[:6]
    pruned = apply(model, PruningPlan.of(graph, {heads: [0, 2]}))
    before, after = (np.asarray(m(batch), np.float64) for m in (model, pruned))
    expected = np.sum((before - after) ** 2) / np.sum(before**2)
    found = damage_of(graph, heads, [[batch]])(0, np.arange(3), np.array([1]))
    assert found == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-6


def test_calls_of_a_shared_model_are_all_seen():
    model = nested()
    graph = tfprune.analyse(model)
    names = [reader.call.op.name for reader in readers_by_group(graph)["stem"]]
    assert names.count("first") == 1 and names.count("shared") == 3
    assert damage_of(graph, "stem", [[IMAGES]])(0, np.arange(6), np.array([2])) > 0


# The criterion.


def with_dead_filters(dead=(1, 4, 6)):
    """A chain whose first layer has filters with ReLU outputs that are zero throughout."""
    model = toys.chain()
    norm = model.get_layer("norm0")
    for variable, alive, value in ((norm.gamma, 1.0, 0.0), (norm.beta, 0.3, -1.0)):
        array = np.full(variable.shape, alive)
        array[list(dead)] = value
        variable.assign(array)
    return model


def test_dead_filters():
    """Sheet B1, check (i): no damage alone (g = 1), their partners' in company; they go first."""
    graph = tfprune.analyse(with_dead_filters())
    damage = damage_of(graph, "conv0", [[IMAGES]])
    alive = np.arange(8)
    for channel in range(8):
        assert (damage(0, alive, np.array([channel])) == 0) == (channel in (1, 4, 6))
    assert damage(0, alive, np.array([0, 1, 2, 4])) == damage(0, alive, np.array([0, 2])) > 0

    # At g = 1 the mean is 0, below any theta.
    search = begin(8, alive, np.array([3, 4]))
    for channel in (3, 4, 4, 3):
        dropped = np.array([channel])
        search = tallied(search, dropped, damage(0, alive, dropped))
    after, decision, worst = decided(search, 1e-30)
    assert (decision, worst) == ("accept", 0)
    np.testing.assert_array_equal(after.alive, [0, 1, 2, 3, 5, 6, 7])

    order, means = removal_order(8, damage, np.random.default_rng(0), draws=20)
    assert set(order[:3].tolist()) == {1, 4, 6}
    assert means[0] == 0 < means[3]


def keras2():
    tf_keras.utils.set_random_seed(0)
    inputs = tf_keras.Input((8, 8, 3))
    x = tf_keras.layers.Conv2D(6, 3, activation="relu", name="first")(inputs)
    x = tf_keras.layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = tf_keras.layers.ReLU(name="relu")(tf_keras.layers.Conv2D(5, 1, name="second")(x))
    x = tf_keras.layers.Flatten(name="flat")(x)
    return tf_keras.Model(inputs, tf_keras.layers.Dense(5, name="head")(x))


MODELS = {
    "plain": toys.chain,
    "residual and depthwise": toys.residual,
    "concatenation and flatten": concatenation,
    "tf_keras": keras2,
}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "plain"])
def test_contract(name):
    check_criterion(AOFP(IMAGES, **SMALL), MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
def test_plans(name):
    model = MODELS[name]()
    criterion = AOFP(IMAGES, **SMALL)
    plan = tfprune.plan(model, macs=0.5, criterion=criterion, round_to=1, order="global")
    assert plan.kept and tfprune.verify(model, plan)
    assert "AOFP" in plan.notes["criterion"]


def test_heads_are_scored():
    scores = AOFP(IMAGES, **{**SMALL, "batches": 1})(tfprune.analyse(attention()))
    assert all(np.isfinite(values).all() and values.max() > 0 for values in scores.values.values())


def test_scores_are_nested_and_depend_on_the_seed():
    graph = tfprune.analyse(toys.chain(widths=(6, 7)))
    first, second = (AOFP(IMAGES, **SMALL, seed=seed)(graph) for seed in (0, 1))
    for name in first:
        assert len(set(first[name].tolist())) == len(first[name])
    assert any(not np.array_equal(first[name], second[name]) for name in first)
    # Neither labels nor what comes after the batches count.
    data = IMAGES.copy()
    data[8:] = np.nan
    labelled = AOFP((data, np.zeros(24)), **SMALL)(graph)
    for name in first:
        np.testing.assert_array_equal(first[name], labelled[name])


def same_elsewhere(executor):
    graph = tfprune.analyse(toys.residual())
    here = AOFP(IMAGES, **SMALL)(graph)
    there = AOFP(IMAGES, **SMALL, executor=executor)(graph)
    assert list(here) == list(there)
    for name in here:
        np.testing.assert_array_equal(here[name], there[name])


def test_threads():
    with ThreadPoolExecutor(2) as executor:
        same_elsewhere(executor)


@pytest.mark.slow
def test_processes():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        same_elsewhere(executor)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draws": 0}, "draws"),
        ({"draws": 1.5}, "draws"),
        ({"halves": 0}, "halves"),
        ({"batches": 0}, "batches"),
        ({"batch_size": True}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"executor": "threads"}, "executor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments(options, words):
    with pytest.raises(ArgumentError, match=words):
        AOFP(IMAGES, **options)


def test_data():
    graph = tfprune.analyse(toys.chain())
    with pytest.raises(DataError, match="empty"):
        AOFP(IMAGES[:0])(graph)
    with pytest.raises(DataError, match="shape"):
        AOFP(IMAGES[:, :4])(graph)
    with pytest.raises(DataError):
        AOFP(None)(graph)
    with pytest.raises(DataError, match="finite"):
        AOFP(IMAGES * np.nan, draws=1)(graph)
