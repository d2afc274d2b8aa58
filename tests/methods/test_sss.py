"""Sparse Structure Selection."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfprune
from tests.methods.models import residual, rows, same, snapshot, stir, stripes
from tfprune.cost import measure
from tfprune.errors import ArgumentError, BudgetError
from tfprune.graph.blocks import blocks_of
from tfprune.graph.masking import predict_on
from tfprune.methods.branch_ends import end_of
from tfprune.methods.sss import SparseStructureSelection, apg_step
from tfprune.testing import randomize

layers = keras.layers
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


# -- the step ----------------------------------------------------------------------------------


def steps(clamp, count=400, rate=0.1, penalty=0.01, momentum=0.9):
    """All (lambda, lambda') of the sheet's problem: minimise 0.5 ||lambda - a||^2."""
    target = np.array([1, 0.3, 0.005, -0.2, 0.02])
    factor, velocity = np.ones(5), np.zeros(5)
    for _ in range(count):
        settled, velocity, factor = (
            np.asarray(part)
            for part in apg_step(
                factor, velocity, factor - target, rate, penalty, momentum, clamp=clamp
            )
        )
        yield settled, factor


@pytest.mark.parametrize(
    ("clamp", "expected"),
    [(False, [0.99, 0.29, 0, -0.19, 0.01]), (True, [0.99, 0.29, 0, 0, 0.01])],
)
def test_where_the_steps_lead(clamp, expected) -> None:
    """Sheet A5, "oracle without training": soft thresholding of a by gamma."""
    *_, (settled, factor) = steps(clamp)
    found = factor if clamp else settled
    # errors shrink by sqrt(mu (1 - eta)) = 0.9 per step, and 0.9^400 < 1e-18
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[2] == 0
    assert clamp == (found[3] == 0)


def test_the_stored_point_is_ahead_of_the_factor() -> None:
    """Sheet A5: lambda'_t = lambda_t + mu (lambda_t - lambda_{t-1}), at every step."""
    before = np.ones(5)
    for settled, factor in steps(False, 50):
        # float32: a few roundings of numbers near one
        np.testing.assert_allclose(factor, settled + 0.9 * (settled - before), atol=1e-6)
        before = settled


def test_it_is_the_textbook_method() -> None:
    """Sheet A5: d = l + mu (l - l_before), z = d - eta grad(d), l = S(z)."""
    target = np.array([1, 0.3, 0.005, -0.2, 0.02])
    last, before = np.ones(5), np.ones(5)
    for settled, _ in steps(False, 50):
        point = last + 0.9 * (last - before)
        z = point - 0.1 * (point - target)
        before, last = last, np.sign(z) * np.maximum(np.abs(z) - 0.1 * 0.01, 0)
        np.testing.assert_allclose(settled, last, atol=1e-6)  # see above


# -- in a network ------------------------------------------------------------------------------

WIDTHS = {"a": (3, 4), "p": (4, 5), "q": (5, 4), "c": (4, 2)}


def linear(seed=0):
    """A stem, a block with an addition and a head, all linear."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((3,))
    dense = {
        name: layers.Dense(shape[1], use_bias=name == "q", name=name)
        for name, shape in WIDTHS.items()
    }
    stream = dense["a"](inputs)
    branch = dense["q"](dense["p"](stream))
    stream = layers.Add(name="sum")([stream, branch])
    return randomize(keras.Model(inputs, dense["c"](stream)))


def explicit(values, x):
    """The same network with the factors in it: on the stream, inside the block, on the block."""
    stream = x @ values["a"]
    inner = (stream * values["stream"]) @ values["p"]
    branch = ((inner * values["inner"]) @ values["q"] + values["bias"]) * values["block"]
    return ((stream + branch) * values["stream"]) @ values["c"]


def test_it_trains_the_network_with_factors_in_it() -> None:
    """Five steps of W by Nesterov's momentum and of the factors by APG, written independently.

    W: v = mu v + (g + wd w), w -= eta (g + wd w + mu v); factors: the three lines of sheet A5.
    """
    rate, penalty, mu, decay = 0.05, 0.3, 0.9, 0.02
    method = SparseStructureSelection(penalty, momentum=mu, weight_decay=decay)
    model = method.prepare(linear())
    x, y = np.random.default_rng(0).standard_normal((2, 40, 3)).astype("float32")
    y = y[:, :2]
    weights = {
        **{name: np.asarray(model.get_layer(name).kernel).astype(np.float64) for name in WIDTHS},
        "bias": np.asarray(model.get_layer("q").bias).astype(np.float64),
    }
    factors = {"stream": np.ones(4), "inner": np.ones(5), "block": np.ones(())}
    momenta = {name: np.zeros(value.shape) for name, value in {**weights, **factors}.items()}
    model.compile(keras.optimizers.SGD(rate, momentum=mu, nesterov=True), "mse")
    for start in range(0, 40, 8):
        batch = x[start : start + 8], y[start : start + 8]
        model.fit(*batch, batch_size=8, verbose=0)
        values = {k: tf.Variable(v) for k, v in {**weights, **factors}.items()}
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((explicit(values, batch[0].astype("float64")) - batch[1]) ** 2)
        gradients = {k: g.numpy() for k, g in tape.gradient(loss, values).items()}
        for name in weights:
            g = gradients[name] + decay * weights[name]
            momenta[name] = mu * momenta[name] + g
            weights[name] = weights[name] - rate * (g + mu * momenta[name])
        for name, value in factors.items():
            z = value - rate * gradients[name]
            settled = np.sign(z) * np.maximum(np.abs(z) - rate * penalty, 0)
            momenta[name] = settled - value + mu * momenta[name]
            factors[name] = np.maximum(0, settled + mu * momenta[name])
    found = model.update.values("channels")
    # float32 over five steps
    close = {"rtol": 2e-4, "atol": 2e-5}
    np.testing.assert_allclose(found["a"], factors["stream"], **close)
    np.testing.assert_allclose(found["p"], factors["inner"], **close)
    np.testing.assert_allclose(model.update.values("blocks")["sum"], factors["block"], **close)
    assert np.ptp(factors["stream"]) > 0.01 and factors["block"] != 1
    effective = {
        "a": weights["a"],
        "p": factors["stream"][:, None] * weights["p"],
        "q": factors["inner"][:, None] * weights["q"] * factors["block"],
        "c": factors["stream"][:, None] * weights["c"],
    }
    for name, expected in effective.items():
        np.testing.assert_allclose(np.asarray(model.get_layer(name).kernel), expected, **close)
    np.testing.assert_allclose(
        np.asarray(model.get_layer("q").bias), weights["bias"] * factors["block"], **close
    )


def test_prepared_models_compute_what_they_did() -> None:
    model = stir(residual())
    x, _ = stripes(6)
    before = snapshot(model)
    prepared = SparseStructureSelection().prepare(model)
    np.testing.assert_array_equal(predict_on(prepared, [x])[0], predict_on(model, [x])[0])
    assert same(before, model)
    assert prepared.update.values("blocks") == {"joined": 1}
    widths = {name: len(value) for name, value in prepared.update.values("channels").items()}
    assert widths == {"stem": 8, "first": 6, "last": 10}


def test_a_factor_at_zero_can_return() -> None:
    """Sheet A5, "pitfalls": its gradient is of W, which is still there."""
    model = SparseStructureSelection(1e-6, weight_decay=0).prepare(linear())
    block = next(f for f in model.update.held.factors if f.kind == "blocks")
    block.factor.assign(0.0), block.settled.assign(0.0)
    for scaled in model.update.held.scaled.values():
        scaled.variable.assign(scaled.full * scaled.multiplier())
    assert not np.any(np.asarray(model.get_layer("q").kernel))
    x = np.random.default_rng(0).standard_normal((8, 3)).astype("float32")
    wanted = np.asarray(linear()(x))  # with the block
    model.compile(keras.optimizers.SGD(0.001), "mse")
    model.fit(x, wanted, epochs=3, verbose=0)
    assert model.update.values("blocks")["sum"] > 0
    assert np.any(np.asarray(model.get_layer("q").kernel))


def set_factors(model, values):
    """Sets factors by name, and the weights with them."""
    for known in model.update.held.factors:
        if known.name in values:
            known.factor.assign(np.asarray(values[known.name], np.float32))
            known.settled.assign(np.asarray(values[known.name], np.float32))
    for scaled in model.update.held.scaled.values():
        scaled.variable.assign(scaled.full * scaled.multiplier())
    return model


def test_what_is_at_zero_goes() -> None:
    method = SparseStructureSelection()
    first = np.array([1, 0, 0.5, 0, 1e-6, 2])
    model = set_factors(method.prepare(stir(residual())), {"first": first})
    assert method.plan(model).kept == {"first": (0, 2, 4, 5)}
    assert method.plan(model).blocks == ()
    set_factors(model, {"joined": 0})
    plan = method.plan(model)
    assert plan.blocks == ("joined",)
    x, _ = stripes(6)
    smaller = method.finish(model)
    assert {"first", "second", "joined"}.isdisjoint(layer.name for layer in smaller.layers)
    # the sum of the stream and of exact zeros
    np.testing.assert_array_equal(predict_on(smaller, [x])[0], predict_on(model, [x])[0])
    assert tfprune.verify(model, plan)


def test_without_the_clamp_lambda_decides() -> None:
    """Sheet A5: test sparsity on S(z), not on lambda'."""
    method = SparseStructureSelection(clamp=False)
    model = set_factors(method.prepare(residual()), {"first": [1, -0.2, 0.0, 0.3, 1, 1]})
    known = next(f for f in model.update.held.factors if f.name == "first")
    known.factor.assign([1, -0.1, 0.01, 0.0, 1, 1])
    assert method.plan(model).kept == {"first": (0, 1, 3, 4, 5)}
    np.testing.assert_allclose(
        method.scores(tfprune.analyse(model))["first"], [1, 0.2, 0, 0.3, 1, 1], rtol=1e-6
    )


# -- budgets -----------------------------------------------------------------------------------


def test_a_budget_takes_blocks_at_zero_first() -> None:
    """The limit is a part of the whole network, and the missing block counts for it."""
    model = residual()
    whole = measure(model).macs
    for macs in (0.7, 0.3):
        method = SparseStructureSelection(macs=macs)
        prepared = method.prepare(model)
        plan = method.plan(prepared)
        assert not plan.blocks and plan.kept
        assert measure(model, plan).macs <= macs * whole
        plan = method.plan(set_factors(prepared, {"joined": 0}))
        assert plan.blocks == ("joined",)
        assert measure(model, plan).macs <= macs * whole
    # what is left without the block: 576 windows of the stem and 5,760 of the last layer
    left = 64 * 9 * (8 + 80) + 30
    assert measure(model, method.plan(prepared)).macs < left < 0.7 * whole
    method = SparseStructureSelection(macs=0.7)
    assert not method.plan(set_factors(method.prepare(model), {"joined": 0})).kept


def tower():
    """Three blocks of the same cost, without batch normalisation."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = layers.Dense(8, name="stem")(inputs)
    for name in "abc":
        y = layers.Dense(4, activation="relu", name=f"{name}1")(x)
        x = layers.Add(name=name)([x, layers.Dense(8, name=f"{name}2")(y)])
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def test_a_budget_of_blocks_alone() -> None:
    """MACs: 48 + 3 * 64 + 24 = 264."""
    method = SparseStructureSelection(channels=False, macs=200)
    model = method.prepare(tower())
    set_factors(model, {"a": 0.5, "b": 0.2, "c": 0.7})
    assert method.plan(model).blocks == ("b",)
    for macs, blocks in ((199, ("a", "b")), (264, ()), (72, ("a", "b", "c"))):
        assert SparseStructureSelection(channels=False, macs=macs).plan(model).blocks == blocks
    set_factors(model, {"c": 0})
    assert SparseStructureSelection(channels=False, macs=264).plan(model).blocks == ("c",)
    with pytest.raises(BudgetError, match="72 that remain"):
        SparseStructureSelection(channels=False, macs=71).prepare(tower())


def test_a_pruning_ratio_counts_channels() -> None:
    method = SparseStructureSelection(pruning_ratio=0.25)
    model = set_factors(method.prepare(residual()), {"first": np.linspace(0.1, 0.6, 6)})
    # of 24 channels the six lowest; one of a group stays
    plan = method.plan(model)
    assert sum(plan.widths.values()) - sum(len(kept) for kept in plan.kept.values()) == 6
    assert plan.kept["first"] == (5,)


# -- where factors are -------------------------------------------------------------------------


def branch(*tail, shape=(6, 6, 3)):
    """A residual block of a convolution and what is given."""
    inputs = keras.Input(shape)
    x = layers.Conv2D(4, 1, name="stem")(inputs)
    y = x
    for layer in tail:
        y = layer(y)
    x = layers.Add(name="sum")([x, y])
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))


@pytest.mark.parametrize(
    ("tail", "names"),
    [
        (lambda: [layers.Conv2D(4, 1, name="end")], ["kernel", "bias"]),
        (lambda: [layers.Conv2D(4, 3), layers.ZeroPadding2D()], ["kernel", "bias"]),
        (lambda: [layers.Dense(4, use_bias=False), layers.Dropout(0.1)], ["kernel"]),
        (lambda: [layers.Conv2D(4, 1), layers.BatchNormalization()], ["gamma", "beta"]),
        (lambda: [layers.SeparableConv2D(4, 1)], ["pointwise_kernel", "bias"]),
        (lambda: [layers.DepthwiseConv2D(3, padding="same")], ["kernel", "bias"]),
        (lambda: [layers.Conv2D(4, 1, activation="relu")], ["kernel", "bias"]),
        (
            lambda: [layers.Conv2D(4, 1), layers.ReLU(), layers.MaxPooling2D(3, 1, "same")],
            ["kernel", "bias"],
        ),
    ],
    ids=range(8),
)
def test_the_end_of_a_branch(tail, names) -> None:
    """A factor on these weights is one on the branch."""
    model = randomize(branch(*tail()))
    graph = tfprune.analyse(model)
    (block,) = blocks_of(graph)
    weights, why = end_of(graph, block)
    assert [w.name for w in weights] == names and not why
    method = SparseStructureSelection(channels=False)
    prepared = method.prepare(model)
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype("float32")
    whole, third = predict_on(prepared, [x])[0], None
    third = predict_on(set_factors(prepared, {"sum": 1 / 3}), [x])[0]
    none = predict_on(set_factors(prepared, {"sum": 0}), [x])[0]
    # float32 sums of some hundred terms
    np.testing.assert_allclose(third, none + (whole - none) / 3, rtol=1e-4, atol=1e-4)
    assert np.abs(whole - none).max() > 0.01
    np.testing.assert_array_equal(predict_on(method.finish(prepared), [x])[0], none)


def test_ends_without_factors() -> None:
    twice = layers.Dense(4, name="twice")
    for tail, message in [
        ([layers.Conv2D(4, 1, activation="tanh")], "cannot be on"),
        ([layers.Conv2D(4, 1), layers.ReLU(max_value=6)], "cannot be on"),
        ([layers.Conv2D(4, 1), layers.BatchNormalization(scale=False)], "cannot be on"),
        ([twice, twice], "used elsewhere"),
    ]:
        model = branch(*tail)
        with pytest.warns(UserWarning, match=rf"1 blocks have no factors and stay: sum.*{message}"):
            prepared = SparseStructureSelection().prepare(model)
        assert message in SparseStructureSelection().plan(prepared).notes["blocks that stay"]


def test_negative_factors_do_not_pass_through_a_relu() -> None:
    graph = tfprune.analyse(branch(layers.Conv2D(4, 1, activation="relu")))
    (block,) = blocks_of(graph)
    assert end_of(graph, block)[0]
    assert not end_of(graph, block, positive=False)[0]


def test_weights_that_do_not_train() -> None:
    """Neither the block nor the channels that such a layer reads have factors."""
    model = branch(layers.Conv2D(4, 1, name="end"))
    model.get_layer("end").trainable = False
    with pytest.raises(ArgumentError, match="sum: end at its end does not train"):
        SparseStructureSelection().prepare(model)


def test_transformers() -> None:
    """The block of an attention layer ends in its output projection; norms are left alone."""
    inputs = keras.Input((5, 8))
    y = layers.LayerNormalization(name="norm")(inputs)
    x = layers.Add(name="sum")([inputs, layers.MultiHeadAttention(2, 4, name="attention")(y, y)])
    model = randomize(keras.Model(inputs, layers.Dense(2)(x)))
    method = SparseStructureSelection()
    prepared = set_factors(method.prepare(model), {"sum": 0})
    plan = method.plan(prepared)
    assert plan.blocks == ("sum",)
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")
    np.testing.assert_array_equal(
        predict_on(method.finish(prepared), [x])[0], predict_on(prepared, [x])[0]
    )


def coupled():
    """A depthwise convolution, a concatenation and a flatten."""
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(6, 3, padding="same", name="one")(inputs)
    y = layers.Conv2D(4, 1, name="two")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(layers.ReLU()(x))
    x = layers.Concatenate()([x, y])
    x = layers.Conv2D(3, 3, activation="relu", name="three")(x)
    return randomize(keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x))))


def test_coupled_channels() -> None:
    """A factor is on everything that reads a channel, wherever that is."""
    method = SparseStructureSelection()
    prepared = method.prepare(coupled())
    values = {"one": [1, 0, 1, 0, 1, 1], "two": [0, 1, 1, 1], "three": [1, 0, 1]}
    set_factors(prepared, values)
    plan = method.plan(prepared)
    assert plan.kept == {"one": (0, 2, 4, 5), "two": (1, 2, 3), "three": (0, 2)}
    x = np.random.default_rng(0).standard_normal((3, 6, 6, 2)).astype("float32")
    before, after = (
        predict_on(model, [x])[0] for model in (prepared, method.finish(prepared))
    )  # fmt: skip
    # float32 sums without exact zeros
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


# -- training ----------------------------------------------------------------------------------


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images[:512, ..., None] / 8 - 1).astype("float32"), data.target[:512] % 3


@pytest.fixture(scope="module")
def trained():
    """A strong penalty, so that structures go in a few epochs."""
    source = residual()
    before = snapshot(source)
    method = SparseStructureSelection(0.06, weight_decay=0)
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True)
    result = method.run(
        source, digits(), epochs=6, optimizer=optimizer, learning_rate=0.05, verbose=0
    )
    assert same(before, source)
    return result


def test_a_run_takes_structures_to_zero(trained) -> None:
    """Exact zeros: the bound is float32 rounding of sums without them."""
    assert trained.plan.kept
    assert trained.difference < 1e-5
    assert tfprune.verify(trained.trained, trained.plan)
    assert trained.model.count_params() < residual().count_params()
    history = trained.record.history
    assert history["zero_channels"][-1] > 0
    assert history["factor_penalty"][-1] < history["factor_penalty"][0]


def test_a_run_takes_blocks_to_zero() -> None:
    """Sums of the stream and of exact zeros: nothing at all is lost."""
    method = SparseStructureSelection(2.0, channels=False, weight_decay=0)
    result = method.run(
        tower(), rows(64, features=6), epochs=4, optimizer="sgd", learning_rate=0.05, verbose=0
    )
    assert result.plan.blocks == ("a", "b", "c")
    assert not result.plan.kept
    assert result.difference == 0
    assert measure(result.model).macs == 6 * 8 + 8 * 3
    assert result.record.history["zero_blocks"][-1] == 1


METHOD = SparseStructureSelection(0.3)


def compiled(jit=False):
    model = METHOD.prepare(linear())
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", jit_compile=jit)
    return model


def fit(model, first, last):
    x, y = np.random.default_rng(0).standard_normal((2, 32, 3)).astype("float32")
    for _ in range(first, last):
        model.fit(x, y[:, :2], batch_size=8, shuffle=False, verbose=0)
    return model


@pytest.fixture(scope="module")
def whole():
    return fit(compiled(), 0, 4)


def test_save_load_and_go_on(tmp_path, whole) -> None:
    """Two epochs, saved, loaded, two more: bit for bit four epochs."""
    fit(compiled(), 0, 2).save(tmp_path / "half.keras")
    resumed = fit(keras.models.load_model(tmp_path / "half.keras"), 2, 4)
    assert resumed.update.get_config() == METHOD.update().get_config()
    for one, other in zip(whole.weights, resumed.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert METHOD.plan(whole) == METHOD.plan(resumed)
    assert METHOD.plan(whole).kept  # something is at zero


def test_compiled_by_xla(whole) -> None:
    fast = fit(compiled(jit=True), 0, 4)
    for one, other in zip(whole.weights, fast.weights, strict=True):
        # float32 over sixteen steps, sums in another order
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-3, atol=1e-4)
    assert METHOD.plan(whole) == METHOD.plan(fast)


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty": 0}, "positive penalty"),
        ({"penalty": float("nan")}, "positive penalty"),
        ({"momentum": 1}, "momentum"),
        ({"weight_decay": -1}, "weight_decay from 0"),
        ({"channels": False, "blocks": False}, "neither"),
        ({"channels": False, "pruning_ratio": 0.5}, "counts channels"),
        ({"macs": 0.5, "pruning_ratio": 0.5}, "both"),
    ],
    ids=range(7),
)
def test_arguments(arguments, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        SparseStructureSelection(**arguments)


def test_models_and_options() -> None:
    inputs = keras.Input((3,))
    plain = keras.Model(inputs, layers.Dense(2)(inputs))
    with pytest.raises(ArgumentError, match="channels or blocks that can have factors"):
        SparseStructureSelection().prepare(plain)
    with pytest.raises(BudgetError):
        SparseStructureSelection(macs=1).prepare(residual())
    with pytest.raises(ArgumentError, match="ignore"):
        SparseStructureSelection(ignore=["nothing"]).prepare(residual())
    with pytest.raises(ArgumentError, match="no weight_decay"):
        METHOD.run(residual(), stripes(), epochs=1, weight_decay=1e-4)
    decaying = keras.optimizers.SGD(weight_decay=0.1)
    with pytest.raises(ArgumentError, match="with weight_decay"):
        METHOD.run(residual(), stripes(), epochs=1, optimizer=decaying)
    model = METHOD.prepare(residual())
    model.compile(keras.optimizers.SGD(use_ema=True), LOSS)
    with pytest.raises(ArgumentError, match="use_ema"):
        model.fit(*stripes(), callbacks=METHOD.callbacks(), verbose=0)


def test_ignored_groups_have_no_factors() -> None:
    method = SparseStructureSelection(ignore=["stem"])
    assert set(method.prepare(residual()).update.values("channels")) == {"first", "last"}
