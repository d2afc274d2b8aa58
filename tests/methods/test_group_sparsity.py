"""Penalties on groups: the formulas in NumPy, the choice, and what is lost at the end."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests import toys
from tests.methods.models import rows, same, snapshot
from tfprune.cost import measure
from tfprune.errors import ArgumentError, BudgetError, ModelError
from tfprune.graph import analyse
from tfprune.layers.updates import MethodOptimizer
from tfprune.methods.group_sparsity import (
    GroupNormPenalty,
    GroupNormSparsity,
    GrowingPenalty,
    GrowingRegularisation,
    shrinkage,
    weakness,
)
from tfprune.surgery import verify

RATE, MOMENTUM = 0.05, 0.9


def linear(seed=0, features=7, hidden=6, classes=3):
    """Two layers without bias or activation, whose gradients are two products."""
    keras.utils.set_random_seed(seed)
    layers = [
        keras.layers.Dense(hidden, use_bias=False, name="first"),
        keras.layers.Dense(classes, use_bias=False, name="second"),
    ]
    return keras.Sequential([keras.Input((features,)), *layers], name="linear")


def targets(count=24, classes=3):
    return np.random.default_rng(5).standard_normal((count, classes)).astype("float32")


X, Y = rows()[0], targets()


def trained(prepared, epochs, *, jit=False, batch=8, callbacks=(), initial_epoch=0, fresh=True):
    """Plain mean squared error, SGD with momentum, a fixed order of batches."""
    if fresh:
        optimizer = keras.optimizers.SGD(RATE, momentum=MOMENTUM)
        prepared.compile(optimizer, "mse", jit_compile=jit)
    prepared.fit(
        X, Y, epochs=epochs, initial_epoch=initial_epoch, batch_size=batch, shuffle=False,
        verbose=0, callbacks=list(callbacks),
    )  # fmt: skip
    return prepared


def reference(model, epochs, penalty, batch=8):
    """The same training in float64; ``penalty(first, second, step)`` is added to the gradients."""
    first, second = (np.asarray(w).astype(np.float64) for w in model.weights)
    momenta = [np.zeros_like(first), np.zeros_like(second)]
    step = 0
    for _ in range(epochs):
        for start in range(0, len(X), batch):
            x, y = X[start : start + batch].astype(np.float64), Y[start : start + batch]
            error = 2 * (x @ first @ second - y) / y.size
            raw = [x.T @ error @ second.T, (x @ first).T @ error]
            added = penalty(first, second, step)
            for weight, momentum, g, a in zip((first, second), momenta, raw, added, strict=True):
                momentum *= MOMENTUM
                momentum -= RATE * (g + a)
                weight += momentum
            step += 1
    return first, second


def close(model, expected):
    for weight, value in zip(model.weights[:2], expected, strict=True):
        # float32 against float64 over a few steps
        np.testing.assert_allclose(np.asarray(weight), value, rtol=1e-4, atol=1e-6)


GROWTH, EVERY, CEILING = 0.02, 2, 0.05


def growing(**options):
    options = {"pruning_ratio": 0.5, "growth": GROWTH, "every": EVERY, "ceiling": CEILING,
               **options}  # fmt: skip
    return GrowingRegularisation(**options)


METHODS = {
    "group norm": GroupNormSparsity(reg=0.1, pruning_ratio=0.5),
    "greg1": growing(),
    "greg1, group": growing(penalised="group"),
    "graded": growing(variant="graded", penalised="group"),
}


@functools.cache
def whole(name):
    """A training of four epochs without interruption; only looked at."""
    return trained(METHODS[name].prepare(linear()), 4)


# ---- gamma -------------------------------------------------------------------------------------


def test_gamma_golden():
    """Sheet A9.5: 16 times for the weakest, once for the strongest; between them a power of 2."""
    gammas = np.asarray(shrinkage(np.array([9.0, 1.0, 4.0], np.float32), 4.0, root=True))
    np.testing.assert_allclose(gammas, [1, 16, 4], rtol=1e-6)  # norms 3, 1, 2: a half is 2^2
    squares = np.asarray(shrinkage(np.array([9.0, 1.0, 5.0], np.float32), 4.0, root=False))
    np.testing.assert_allclose(squares, [1, 16, 4], rtol=1e-6)


def test_gamma_is_one_where_all_are_equal():
    """Sheet A9.5, pitfall: I_max = I_min."""
    for value in (0.0, 3.0):
        gammas = np.asarray(shrinkage(np.full(4, value, np.float32), 4.0, root=True))
        np.testing.assert_array_equal(gammas, 1.0)


@settings(deadline=None, max_examples=40)
@given(arrays(np.float32, 5, elements=st.floats(0, 100, width=32)), st.floats(0, 6))
def test_gamma_is_within_its_range_falls_with_the_norm_and_ignores_scale(squares, alpha):
    gammas = np.asarray(shrinkage(squares, alpha, root=True))
    # 1e-5: powers in float32
    assert np.all(gammas >= 1 - 1e-5) and np.all(gammas <= 2**alpha * (1 + 1e-5))
    order = np.argsort(squares, kind="stable")
    assert np.all(np.diff(gammas[order]) <= 1e-5 * 2**alpha)
    np.testing.assert_allclose(np.asarray(shrinkage(squares * 4, alpha, root=True)), gammas,
                               rtol=1e-4)  # fmt: skip


# ---- the penalty on all members -----------------------------------------------------------------


def concatenated():
    """Two branches side by side, one of which is also read alone, and a flatten."""
    keras.utils.set_random_seed(3)
    layers = keras.layers
    inputs = keras.Input((4, 4, 2), name="image")
    a = layers.Conv2D(3, 1, name="left")(inputs)
    b = layers.Conv2D(4, 3, padding="same", name="right")(inputs)
    x = layers.BatchNormalization(name="both_norm")(layers.Concatenate(name="both")([a, b]))
    x = layers.Add(name="sum")([x, layers.Conv2D(7, 1, name="skip")(inputs)])
    x = layers.Flatten(name="flat")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name="concatenated")


NETS = {"residual": toys.residual, "concatenated": concatenated, "chain": toys.chain}


def by_hand(graph, alpha=4.0, root=True):
    """gamma_k w for every weight, written with loops over the members' positions."""
    added = {}
    for group in graph.prunable:
        members = [member for member in group.members if member.scored]
        norms = np.zeros(group.width)
        for member in members:
            weight = np.moveaxis(np.asarray(member.variable, np.float64), member.axis, 0)
            for position, channel in zip(member.positions, member.channels, strict=True):
                norms[channel] += (weight[position] ** 2).sum()
        values = np.sqrt(norms) if root else norms
        gammas = 2 ** (alpha * (values.max() - values) / (values.max() - values.min()))
        for member in members:
            total = added.setdefault(id(member.variable), np.zeros(member.variable.shape))
            view = np.moveaxis(total, member.axis, 0)
            weight = np.moveaxis(np.asarray(member.variable, np.float64), member.axis, 0)
            for position, channel in zip(member.positions, member.channels, strict=True):
                view[position] += gammas[channel] * weight[position]
    return added


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("name", sorted(NETS))
def test_penalty_equals_the_formula_on_all_members(name, root):
    """Sheet A9.5: makers, scales and readers, in coupled groups, slices and behind a flatten."""
    model = NETS[name]()
    graph = analyse(model)
    update = GroupNormPenalty(reg=0.25, root=root)
    update.bind(graph)
    zeros = {id(v): keras.ops.zeros(v.shape) for v in model.trainable_variables}
    result = update.gradients(zeros, 0.1)
    expected = by_hand(graph, root=root)
    assert expected
    for variable in model.trainable_variables:
        wanted = 0.25 * expected.get(id(variable), np.zeros(variable.shape))
        np.testing.assert_allclose(np.asarray(result[id(variable)]), wanted, rtol=2e-4, atol=1e-5)


def test_shifts_and_biases_are_left_alone_and_so_is_what_is_ignored():
    model = toys.chain()
    update = GroupNormPenalty(reg=1.0, ignore=["conv0", "conv1", "conv2"])
    update.bind(analyse(model))
    zeros = {id(v): keras.ops.zeros(v.shape) for v in model.trainable_variables}
    assert all(not np.any(np.asarray(g)) for g in update.gradients(zeros, 0.1).values())
    update = GroupNormPenalty(reg=1.0, ignore=["conv0", "conv1"])
    update.bind(analyse(model))
    touched = {
        variable.path
        for variable in model.trainable_variables
        if np.any(np.asarray(update.gradients(zeros, 0.1)[id(variable)]))
    }
    assert touched == {"conv2/kernel", "norm2/gamma", "head/kernel"}


def test_a_frozen_weight_counts_but_does_not_move():
    model = linear()
    model.layers[0].trainable = False
    update = GroupNormPenalty(reg=1.0)
    update.bind(analyse(model))
    (second,) = model.trainable_variables
    result = update.gradients({id(second): keras.ops.zeros(second.shape)}, 0.1)
    assert list(result) == [id(second)]
    np.testing.assert_allclose(np.asarray(result[id(second)]), by_hand(analyse(model))[id(second)],
                               rtol=1e-5)  # fmt: skip


def test_training_equals_the_formula_in_numpy():
    """Momentum included; gamma anew in every step."""

    def penalty(first, second, step):
        norms = np.sqrt((first**2).sum(0) + (second**2).sum(1))
        gammas = 2 ** (4 * (norms.max() - norms) / (norms.max() - norms.min()))
        return 0.1 * gammas * first, 0.1 * gammas[:, None] * second

    close(whole("group norm"), reference(linear(), 4, penalty))


# ---- growing regularisation --------------------------------------------------------------------


def test_greg1_equals_the_formula_in_numpy():
    """lambda(t) = min(tau, delta floor(t / K)), on the chosen filters alone."""
    model = linear()
    chosen = np.argsort(np.abs(np.asarray(model.weights[0])).sum(0))[:3]

    def penalty(first, second, step):
        strength = np.zeros(6)
        strength[chosen] = min(CEILING, GROWTH * (step // EVERY))
        return first * strength, 0 * second

    close(whole("greg1"), reference(model, 4, penalty))


def test_penalised_group_includes_what_reads():
    model = linear()
    chosen = np.argsort(np.abs(np.asarray(model.weights[0])).sum(0))[:3]

    def penalty(first, second, step):
        strength = np.zeros(6)
        strength[chosen] = min(CEILING, GROWTH * (step // EVERY))
        return first * strength, strength[:, None] * second

    close(whole("greg1, group"), reference(model, 4, penalty))


def test_graded_equals_the_formula_in_numpy():
    model, strength = linear(), np.zeros(6)

    def penalty(first, second, step):
        return first * strength, strength[:, None] * second

    # lambda grows after the step that its number divides, by the norms after that step
    seen = []

    def recorded(first, second, step):
        norms = (first**2).sum(0) + (second**2).sum(1)
        if step and step % EVERY == 0:
            weak = (norms.max() - norms) / (norms.max() - norms.min())
            strength[:] = np.minimum(CEILING, strength + GROWTH * weak)
        seen.append(strength.copy())
        return penalty(first, second, step)

    close(whole("graded"), reference(model, 4, recorded))
    assert len(np.unique(seen[-1])) > 3  # the channels differ


def test_the_chosen_ones_are_chosen_before_and_go():
    """Whatever training does to the norms: what is removed is what was chosen."""
    model = linear()
    method = growing(ceiling=CEILING)
    prepared = method.prepare(model)
    kept = method.plan(prepared).kept["first"]
    prepared.weights[0].assign(-np.asarray(model.weights[0])[:, ::-1])  # other norms
    assert method.plan(prepared).kept["first"] == kept
    np.testing.assert_array_equal(
        np.asarray(method.finish(prepared).weights[0]),
        np.asarray(prepared.weights[0])[:, list(kept)],
    )


def test_greg2_grows_for_all_then_chooses_by_what_became_of_the_norms():
    method = growing(variant="greg2", pick_ceiling=0.04, every=1)
    prepared = method.prepare(linear())
    seen = []

    class See(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(np.asarray(prepared.update.held.reg[0]))

    log, choose = method.callbacks()
    norms = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: norms.append(
            np.abs(np.asarray(prepared.weights[0])).sum(0)
        )
    )
    history = trained(prepared, 2, callbacks=[record, choose, See(), log])
    # first epoch: all grow by 0.02 up to 0.04 and stay there
    np.testing.assert_allclose(seen[:3], np.repeat([[0.02], [0.04], [0.04]], 6, 1), rtol=1e-6)
    goes = np.zeros(6)
    goes[np.argsort(norms[1])[:3]] = 1
    # second: the chosen go on to the ceiling, the others are free
    for line in seen[3:]:
        np.testing.assert_allclose(line, 0.05 * goes, rtol=1e-6)
    assert history.history.history["regularisation"] == pytest.approx([0.04, 0.05])
    assert method.plan(prepared).kept["first"] == tuple(np.flatnonzero(goes == 0))


def test_weakness_is_zero_where_all_are_equal():
    np.testing.assert_array_equal(np.asarray(weakness(np.ones(3, np.float32))), 0.0)


# ---- what is lost at the end --------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [toys.chain, toys.residual, concatenated], ids=lambda f: f.__name__
)
def test_what_a_reader_loses_is_within_the_norms_of_the_removed(make):
    """|sum_k w[k] a_k| <= sum_k n_k max |a_k|, at the layer that reads, for one group removed."""
    model = make()
    graph = analyse(model)
    group = next(g for g in graph.prunable if any(m.path == "head" for m in g.consumers))
    others = [g.name for g in graph.prunable if g is not group]
    method = GroupNormSparsity(pruning_ratio=0.5, ignore=others)
    plan = method.plan(model)
    assert list(plan.kept) == [group.name]
    assert verify(model, plan).passed
    shape = (3, *model.input_shape[1:])
    batch = np.random.default_rng(0).standard_normal(shape).astype("float32")
    read = keras.Model(model.input, model.get_layer("head").input)(batch)
    read = np.abs(np.asarray(read, np.float64)).max(0)
    (reader,) = (m for m in group.consumers if m.path == "head")
    gone = np.setdiff1d(np.arange(group.width), plan.kept[group.name])
    norms = np.zeros(group.width)
    for member in group.members:
        if member.scored:
            weight = np.moveaxis(np.asarray(member.variable, np.float64), member.axis, 0)
            np.add.at(norms, member.channels, (weight**2).reshape(len(weight), -1).sum(1)
                      [member.positions])  # fmt: skip
    removed = np.isin(reader.channels, gone)
    bound = (np.sqrt(norms)[reader.channels] * read[reader.positions])[removed].sum()
    lost = np.abs(np.asarray(model(batch)) - np.asarray(method.finish(model)(batch)))
    assert 0 < lost.max() <= bound * (1 + 1e-5)  # float32


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images[:256, :].reshape(-1, 8, 8, 1) / 16).astype("float32"), labels[:256]


def small_net():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = inputs = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(8, 3, strides=2, name="conv0")(x)
    x = layers.BatchNormalization(name="norm0")(x)
    x = layers.ReLU(name="relu0")(x)
    x = layers.Conv2D(12, 3, name="conv1")(x)
    x = layers.BatchNormalization(name="norm1")(x)
    x = layers.ReLU(name="relu1")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(10, name="head")(x), name="small")


RUNS = {
    "group norm": GroupNormSparsity(macs=0.5, reg=0.05),
    "greg1": GrowingRegularisation(macs=0.5, growth=0.5, every=1, ceiling=8, penalised="group"),
    "greg2": GrowingRegularisation(
        macs=0.5, variant="greg2", growth=0.5, every=1, ceiling=8, pick_ceiling=1,
        penalised="group",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(RUNS))
def test_run_on_digits_meets_the_macs(digits, name):
    model = small_net()
    before = snapshot(model)
    options = {"learning_rate": 0.05, "batch_size": 32, "optimizer": keras.optimizers.SGD()}
    result = RUNS[name].run(model, digits, epochs=4, verbose=0, seed=1, **options)
    assert same(before, model)
    assert result.macs <= 0.5
    assert measure(result.model).macs <= 0.5 * measure(model).macs
    assert verify(result.trained, result.plan).passed
    history = result.record.history
    if name == "group norm":
        assert history["group_penalty"][-1] < history["group_penalty"][0]
        assert history["accuracy"][-1] > history["accuracy"][0]
    else:
        # lambda 8 at a rate of 0.05 leaves 0.6 of a weight per step: nothing after an epoch
        assert history["norm_to_go"][-1] < 1e-2
        assert result.difference < 1e-2


# ---- saving, compilation, refusals ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["group norm", "greg1"])
def test_going_on_after_saving_is_the_same_training(name, tmp_path):
    method = METHODS[name]
    half = trained(method.prepare(linear()), 2)
    half.save(tmp_path / "half.keras")
    loaded = keras.models.load_model(tmp_path / "half.keras")
    assert isinstance(loaded.optimizer, MethodOptimizer)
    trained(loaded, 4, initial_epoch=2, fresh=False)
    for first, second in zip(whole(name).variables, loaded.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    assert method.plan(loaded) == method.plan(whole(name))


@pytest.mark.parametrize("name", ["group norm", "graded"])
def test_xla_trains_alike(name):
    fast = trained(METHODS[name].prepare(linear()), 4, jit=True)
    for first, second in zip(whole(name).variables, fast.variables, strict=True):
        # float32, in another order
        np.testing.assert_allclose(np.asarray(first), np.asarray(second), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupNormSparsity(), "Expected macs or pruning_ratio"),
        (lambda: GrowingRegularisation(), "Expected macs or pruning_ratio"),
        (lambda: GroupNormSparsity(macs=0.5, reg=0), "reg"),
        (lambda: GroupNormSparsity(macs=0.5, alpha=-1), "alpha"),
        (lambda: GroupNormSparsity(macs=0.5, normalize="sum"), "normalize"),
        (lambda: growing(growth=-1), "growth"),
        (lambda: growing(every=0), "every"),
        (lambda: growing(ceiling=float("nan")), "ceiling"),
        (lambda: growing(variant="greg3"), "variant"),
        (lambda: growing(penalised="all"), "penalised"),
        (lambda: growing(criterion="l2"), "criterion"),
        (lambda: growing(variant="greg2", pick_ceiling=0.1), "pick_ceiling"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_refuses_before_training_and_models_that_are_not_prepared():
    with pytest.raises(BudgetError, match="within reach"):
        growing(pruning_ratio=None, macs=1e-6).prepare(toys.chain())
    with pytest.raises(ModelError, match=r"GrowingRegularisation\.prepare"):
        growing().plan(linear())
    assert GrowingPenalty(0.1, 2).get_config()["every"] == 2
