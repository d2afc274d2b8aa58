"""ISTA on scales of batch normalisation, and the rescaling that goes with it."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfprune
from tests.methods.models import residual, same, snapshot, stir, stripes
from tfprune.errors import ArgumentError, ModelError
from tfprune.graph.copying import copy_model
from tfprune.graph.masking import predict_on
from tfprune.methods.ista import ISTA, channel_costs
from tfprune.methods.rescaling import rescale, scale_flow
from tfprune.methods.slimming import scales_of

layers = keras.layers
# A few float32 layers, sums in another order or factors of alpha in between; of the largest output.
ROUNDING = 2e-6


def _norm(x, name):
    return layers.BatchNormalization(name=f"{name}_bn", momentum=0.9)(x)


def exact():
    """Nothing padded: a convolution, a depthwise one, one of 1x1, pooling, flatten, dense."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8, 8, 1))
    x = layers.ReLU()(_norm(layers.Conv2D(6, 3, name="a")(inputs), "a"))
    x = layers.ReLU()(_norm(layers.DepthwiseConv2D(3, use_bias=False, name="d")(x), "d"))
    x = layers.Activation("relu")(_norm(layers.Conv2D(8, 1, use_bias=False, name="b")(x), "b"))
    x = layers.MaxPooling2D(2)(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)), name="exact")


def joined(activation="relu", gate=False, bare=False):
    """A block whose end is added or, as a gate, multiplied to the stream; then concatenated."""
    keras.utils.set_random_seed(2)
    inputs = keras.Input((8, 8, 1))
    x = layers.Activation(activation)(_norm(layers.Conv2D(6, 3, name="a")(inputs), "a"))
    y = layers.Conv2D(6, 3, padding="same", name="b")(x)
    if not bare:
        y = _norm(y, "b")
    x = (layers.Multiply if gate else layers.Add)(name="meet")([x, y])
    z = layers.ReLU()(_norm(layers.Conv2D(4, 1, name="c")(x), "c"))
    x = layers.Concatenate()([layers.ReLU()(x), z])
    x = layers.Conv2D(5, 3, name="last")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalMaxPooling2D()(x)))


def _relative(first, second, x):
    a, b = (np.asarray(predict_on(model, [x])[0], np.float64) for model in (first, second))
    return np.abs(a - b).max() / np.abs(a).max()


def _set(model, name, values):
    """Sets scales, at the positions given; the others are 1."""
    gamma = model.get_layer(f"{name}_bn").gamma
    value = np.ones(gamma.shape)
    for channel, number in values.items():
        value[channel] = number
    gamma.assign(value)


# -- the penalty -------------------------------------------------------------------------------


def test_costs_of_channels() -> None:
    """Sheet B5 step 1: (own filter + slices that read it + map) / image; shared among scales."""
    graph = tfprune.analyse(residual())
    found = channel_costs(graph, graph.prunable)
    stream = 9 * 1 + 9 * 6 + 9 * 6 + 9 * 10 + 2 * 64  # stem, second | first, last | two maps
    assert found == {
        "stem": stream / 64 / 2,
        "first": (9 * 8 + 9 * 8 + 64) / 64,
        "last": (9 * 8 + 3 + 64) / 64,
    }
    graph = tfprune.analyse(exact())
    # a: 9, depthwise 9, read by b's 8 filters; maps of 6x6 and 4x4. b: 6, behind the flatten 4 x 3
    assert channel_costs(graph, graph.prunable) == {
        "a": (9 + 9 + 8 + 36 + 16) / 64 / 2,
        "b": (6 + 2 * 2 * 3 + 16) / 64,
    }


def test_costs_without_images() -> None:
    """Rows: an image of size 1. Sequences: their steps. Free sizes: refused."""

    def network(shape):
        layer = layers.Dense if len(shape) == 1 else lambda n, name: layers.Conv1D(n, 3, name=name)
        inputs = x = keras.Input(shape)
        if len(shape) > 1 and shape[0]:
            x = layers.LayerNormalization(axis=[1, 2])(x)
        x = layers.ReLU()(_norm(layer(6, name="a")(x), "a"))
        if len(shape) > 1:
            x = layers.GlobalAveragePooling1D()(x)
        return keras.Model(inputs, layers.Dense(2)(x))

    graph = tfprune.analyse(network((5,)))
    assert channel_costs(graph, graph.prunable) == {"a": 5 + 2 + 1}
    graph = tfprune.analyse(network((20, 5)))
    assert channel_costs(graph, graph.prunable) == {"a": (3 * 5 + 2 + 18) / 20}
    with pytest.raises(ModelError, match="fixed size"):
        ISTA().prepare(network((None, 5)))


def test_channels_first() -> None:
    inputs = keras.Input((1, 8, 8))
    x = layers.Conv2D(6, 3, data_format="channels_first", name="a")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(axis=1)(x))
    graph = tfprune.analyse(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))))
    assert channel_costs(graph, graph.prunable) == {"a": (9 + 36 * 2 + 36) / 64}


# -- the step ----------------------------------------------------------------------------------


def test_the_step_is_the_papers() -> None:
    """Sheet B5 step 3, against numpy: prox for scales, SGD with momentum for all else."""
    inputs = keras.Input((5,))
    x = layers.Concatenate()(
        [_norm(layers.Dense(4, name="a")(inputs), "a"), layers.Dense(2)(inputs)]
    )
    x = layers.ReLU()(_norm(x, "both"))
    source = stir(keras.Model(inputs, layers.Dense(3, name="head")(x)))
    random = np.random.default_rng(0)
    x, y = random.standard_normal((24, 5)).astype("float32"), random.integers(0, 3, 24)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    penalty, rate = 0.05, 0.2

    twin = copy_model(source)
    gammas = {name: twin.get_layer(f"{name}_bn").gamma for name in ("a", "both")}
    # a: 5 own, 3 to read, maps of 1 in both normalisations; two scales each. The second producer
    # of the concatenation has one scale: 5 own, 3 to read, 1.
    costs = {"a": [(5 + 3 + 2) / 2] * 4, "both": [(5 + 3 + 2) / 2] * 4 + [5 + 3 + 1] * 2}
    rest = [v for v in twin.trainable_variables if v.name != "gamma"]
    velocity = [np.zeros(v.shape) for v in rest]
    for start in range(0, 24, 8):
        part = slice(start, start + 8)
        with tf.GradientTape() as tape:
            value = loss(y[part], twin(x[part], training=True))
        sources = [v.value for v in (*rest, *gammas.values())]
        gradients = [np.asarray(g) for g in tape.gradient(value, sources)]
        for number, variable in enumerate(rest):
            velocity[number] = 0.9 * velocity[number] - rate * gradients[number]
            variable.assign_add(velocity[number])
        for (name, gamma), gradient in zip(gammas.items(), gradients[len(rest) :], strict=True):
            moved = np.asarray(gamma) - rate * gradient
            eta = rate * penalty * np.array(costs[name])
            gamma.assign(np.sign(moved) * np.maximum(np.abs(moved) - eta, 0))

    model = ISTA(penalty).prepare(source)
    model.compile(keras.optimizers.SGD(rate, momentum=0.9), loss)
    model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
    for ours, expected in zip(model.weights[: len(twin.weights)], twin.weights, strict=True):
        # float32 over three steps
        np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), atol=2e-6)


def test_zeros_stay_zero() -> None:
    """Without a gradient a scale loses mu rho lambda a step, then is 0, whatever the optimizer."""
    rate, penalty = 0.1, 0.4
    model = ISTA(penalty, ignore=["last"]).prepare(residual())
    model.get_layer("head").kernel.assign(np.zeros((10, 3)))
    model.get_layer("head").trainable = False
    start = np.array([1.0, -1.0, 0.5, 0.2, -0.1, 0.0])
    model.get_layer("first_bn").gamma.assign(start)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss)
    model.fit(*stripes(24), batch_size=8, epochs=1, verbose=0)
    eta = 3 * rate * penalty * (9 * 8 + 9 * 8 + 64) / 64
    expected = np.sign(start) * np.maximum(np.abs(start) - eta, 0)
    found = np.asarray(model.get_layer("first_bn").gamma)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (expected == 0).sum() == 3 and not found[expected == 0].any()
    # ignored: neither penalised nor owned
    np.testing.assert_array_equal(model.get_layer("last_bn").gamma, np.ones(10))
    assert len(model.update.owned) == 3


# -- the rescaling -----------------------------------------------------------------------------


@pytest.mark.parametrize("network", [residual, exact, joined], ids=["residual", "exact", "joined"])
def test_rescaling_changes_no_function(network) -> None:
    """Sheet B5 step 2: exact with beta scaled, too (1e-7 there); far off without."""
    model, x = stir(network()), stripes(6)[0]
    scaled = copy_model(model)
    flows = scale_flow(tfprune.analyse(scaled))
    assert len(flows) > 1 and not any(flow.obstacle for flow in flows.values())
    rescale(flows.values(), 0.01)
    assert _relative(model, scaled, x) < ROUNDING
    for name, value in _gammas(model).items():
        np.testing.assert_allclose(_gammas(scaled)[name], 0.01 * value, rtol=1e-6)
    # in training mode, too: batch normalisations take in what they did
    outputs = [np.asarray(net(x, training=True)) for net in (model, scaled)]
    assert np.abs(outputs[0] - outputs[1]).max() < 10 * ROUNDING * np.abs(outputs[0]).max()
    back = copy_model(model)
    for layer in back.layers:
        if layer.name.endswith("_bn"):
            layer.beta.assign(scaled.get_layer(layer.name).beta / 0.01 / 0.01)
    assert _relative(model, back, x) > 0.1
    rescale(scale_flow(tfprune.analyse(scaled)).values(), 100)
    for one, other in zip(model.weights, scaled.weights, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-6)


def _gammas(model):
    return {
        layer.name: np.asarray(layer.gamma) for layer in model.layers if hasattr(layer, "gamma")
    }


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"activation": "silu"}, "not positively homogeneous"),
        ({"activation": "relu6"}, "not positively homogeneous"),
        ({"gate": True}, "multiplies it"),
        ({"bare": True}, "adds scaled and other tensors"),
    ],
    ids=["silu", "relu6", "gate", "bare"],
)
def test_what_is_not_rescaled(options, why) -> None:
    """Sheet B5, pitfalls: such groups stay as they are, and that is said."""
    model, x = stir(joined(**options)), stripes(6)[0]
    flows = scale_flow(tfprune.analyse(model))
    assert why in flows["a"].obstacle and not flows["c"].obstacle
    with pytest.warns(UserWarning, match="does not reach 1 of 2 groups: a .*" + why):
        prepared = ISTA(alpha=0.1).prepare(model)
    assert _relative(model, prepared, x) < ROUNDING
    found, before = _gammas(prepared), _gammas(model)
    np.testing.assert_array_equal(found["a_bn"], before["a_bn"])
    np.testing.assert_allclose(found["c_bn"], 0.1 * before["c_bn"], rtol=1e-6)


def test_a_model_that_cannot_be_rescaled_at_all() -> None:
    inputs = keras.Input((5,))
    x = layers.Activation("tanh")(_norm(layers.Dense(4, name="a")(inputs), "a"))
    model = keras.Model(inputs, layers.Dense(2)(x))
    with pytest.raises(ArgumentError, match=r"by alpha.*\(Activation\) is not pos"):
        ISTA(alpha=0.1).prepare(model)
    ISTA().prepare(model)  # without alpha any activation will do


def test_nested_and_shared_layers_are_walked() -> None:
    inside = keras.Input((6, 6, 4))
    z = layers.ReLU()(_norm(layers.Conv2D(4, 3, padding="same", name="c")(inside), "c"))
    block = keras.Model(inside, z, name="block")
    inputs = keras.Input((8, 8, 1))
    x = layers.ReLU()(_norm(layers.Conv2D(4, 3, name="a")(inputs), "a"))
    x = block(block(x))
    model = stir(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))))
    x = stripes(4)[0]
    flows = scale_flow(tfprune.analyse(model))
    assert all(flow.guarded and not flow.obstacle for flow in flows.values())
    scaled = copy_model(model)
    rescale(scale_flow(tfprune.analyse(scaled)).values(), 0.1)
    assert _relative(model, scaled, x) < ROUNDING


# -- the decision ------------------------------------------------------------------------------


def test_only_zeros_on_all_members_go() -> None:
    """Sheet B5, decision rule: gamma exactly 0; a stream's channel needs all of its scales zero."""
    method = ISTA()
    model = method.prepare(residual())
    _set(model, "stem", {0: 0, 1: 0, 2: 1e-30})
    _set(model, "second", {0: 0, 2: 0})
    _set(model, "first", {0: 1e-12, 3: 0})
    assert method.plan(model).kept == {"stem": tuple(range(1, 8)), "first": (0, 1, 2, 4, 5)}
    _set(model, "first", dict.fromkeys(range(6), 0))
    assert method.plan(model).kept["first"] == (0,)  # one channel stays


def test_streams_that_are_alive_without_scales_are_left_alone() -> None:
    model = joined(bare=True)
    flows = scale_flow(tfprune.analyse(model))
    assert {name: flow.guarded for name, flow in flows.items()} == {"a": False, "c": True}
    # a product ends with any of its factors: squeeze-and-excite blocks are pruned
    gated = joined(bare=True, gate=True)
    assert all(flow.guarded for flow in scale_flow(tfprune.analyse(gated)).values())
    method = ISTA()
    prepared = method.prepare(model)
    _set(prepared, "a", {0: 0})
    _set(prepared, "c", {1: 0})
    assert method.plan(prepared).kept == {"c": (0, 2, 3)}
    assert [gamma.path for gamma in prepared.update.owned] == ["c_bn/gamma"]


@pytest.mark.parametrize("alpha", [1.0, 0.01])
def test_constants_are_absorbed(alpha) -> None:
    """Sheet B5 steps 4 and 5: without padding the smaller network is the trained one."""
    method = ISTA(alpha=alpha)
    model = method.prepare(stir(exact()))
    for name, gone in (("a", [1, 4]), ("d", [1, 4, 5]), ("b", [0, 2, 7])):
        gamma = model.get_layer(f"{name}_bn").gamma
        value = np.asarray(gamma).copy()
        value[gone] = 0
        gamma.assign(value)
        model.get_layer(f"{name}_bn").beta.assign(alpha * np.linspace(0.5, 1, len(value)))
    smaller = method.finish(model)
    assert [smaller.get_layer(name).filters for name in "ab"] == [4, 5]
    assert _relative(model, smaller, stripes(8)[0]) < ROUNDING
    plan = method.plan(model)
    assert set(plan.values) == {"b_bn/moving_mean", "head/bias"}
    assert plan.notes["constants"] == "2 weights absorb; 2 of 2 groups exactly"
    assert tfprune.verify(model, plan)
    # scaled back: kept scales are as large as they were
    kept = [c for c in range(8) if c not in (0, 2, 7)]
    np.testing.assert_allclose(
        smaller.get_layer("b_bn").gamma, _gammas(stir(exact()))["b_bn"][kept], rtol=1e-6
    )


def test_scales_that_are_not_zero_are_taken_as_zero() -> None:
    """With macs: the finished network is the trained one with the lost scales at zero."""
    method = ISTA(macs=0.5, alpha=0.1)
    model = method.prepare(stir(exact()))
    plan = method.plan(model)
    silent = copy_model(model)
    graph = tfprune.analyse(silent)
    for name, kept in plan.kept.items():
        for member in scales_of(graph[name]):
            value = np.asarray(member.variable).copy()
            value[np.setdiff1d(np.arange(len(value)), kept)] = 0
            member.variable.assign(value)
    x, _ = stripes(8)
    assert _relative(silent, method.finish(model), x) < ROUNDING
    assert _relative(silent, model, x) > 0.01
    # the smallest scales go, as they are without alpha
    whole = method.scores(tfprune.analyse(model))
    expected = _gammas(stir(exact()))
    np.testing.assert_allclose(whole["a"], np.maximum(expected["a_bn"], expected["d_bn"]), 1e-6)


# -- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A run by the method's own rule, on a network where it is exact."""
    source = stir(exact())
    before = snapshot(source)
    method = ISTA(2.0)
    result = method.run(source, stripes(192), epochs=4, learning_rate=0.1, verbose=0)
    assert same(before, source)
    return result


def test_a_run_without_a_target_is_exact(trained) -> None:
    assert trained.plan.kept and trained.macs < 1
    assert "2 of 2 groups exactly" in trained.plan.notes["constants"]
    assert trained.difference < ROUNDING
    assert tfprune.verify(trained.trained, trained.plan)
    history = trained.record.history
    assert len(history["zero_scales"]) == 4
    assert 0 < history["zero_scales"][-1] < 1
    assert history["scale_penalty"][-1] < history["scale_penalty"][0]


def test_a_run_ends_at_the_macs_asked_for() -> None:
    """With padding, the border of constants is missed: measured, and less than without them."""
    method = ISTA(0.05, macs=0.5, alpha=0.5)
    result = method.run(stir(residual()), stripes(96), epochs=2, learning_rate=0.05, verbose=0)
    assert 0.3 < result.macs <= 0.5
    small = tfprune.analyse(result.model)
    assert all(small[name].width == len(kept) for name, kept in result.plan.kept.items())
    assert "padded border" in result.plan.notes["constants"]
    assert 0 < result.difference < 1
    assert tfprune.verify(result.trained, result.plan)


STEPPED = ISTA(2.0, alpha=0.5)


def _compiled(jit=False):
    model = STEPPED.prepare(stir(exact()))
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit,
    )
    return model


def _fit(model, start, end):
    data = stripes(32)
    model.fit(*data, 16, initial_epoch=start, epochs=end, shuffle=False, verbose=0)
    return model


@pytest.fixture(scope="module")
def whole():
    """Four epochs without interruption, in which some scales reach zero."""
    model = _fit(_compiled(), 0, 4)
    assert STEPPED.plan(model).kept
    return model


def test_save_load_and_go_on(tmp_path, whole) -> None:
    """Two epochs, saved, loaded, two more: bit for bit four epochs; alpha and rho come along."""
    _fit(_compiled(), 0, 2).save(tmp_path / "half.keras")
    resumed = _fit(keras.models.load_model(tmp_path / "half.keras"), 2, 4)
    assert (resumed.update.penalty, resumed.update.alpha) == (2.0, 0.5)
    for one, other in zip(whole.weights, resumed.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert STEPPED.plan(whole).kept == STEPPED.plan(resumed).kept


def test_compiled_by_xla(whole) -> None:
    compiled = _fit(_compiled(jit=True), 0, 4)
    for one, other in zip(whole.weights, compiled.weights, strict=True):
        # float32 over eight steps, sums in another order
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-3, atol=1e-4)
    assert STEPPED.plan(whole).kept == STEPPED.plan(compiled).kept


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty": 0}, "positive penalty"),
        ({"penalty": float("inf")}, "positive penalty"),
        ({"alpha": 0}, "positive alpha of at most 1"),
        ({"alpha": 2}, "positive alpha of at most 1"),
        ({"macs": 0.5, "pruning_ratio": 0.5}, "both"),
    ],
    ids=range(5),
)
def test_arguments(arguments, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        ISTA(**arguments)


def test_models_without_scales() -> None:
    inputs = keras.Input((5,))
    x = layers.ReLU()(layers.BatchNormalization(scale=False)(layers.Dense(4)(inputs)))
    with pytest.raises(ArgumentError, match="behind scales of batch normalisation only"):
        ISTA().prepare(keras.Model(inputs, layers.Dense(2)(x)))
    with pytest.raises(ArgumentError, match="ignore"):
        ISTA(ignore=["nothing"]).prepare(residual())
