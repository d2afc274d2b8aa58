"""AutoPruner."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import tfprune
from tests import toys
from tests.methods.models import mlp, residual, rows, same, snapshot, stir
from tfprune.errors import ArgumentError, BudgetError, ModelError
from tfprune.graph.evaluate import call_model
from tfprune.layers.batch_gate import BatchGate, GateProduct, gates_of
from tfprune.methods.autopruner import AutoPruner
from tfprune.surgery.verify import random_batch
from tfprune.testing import randomize

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
DATA = rows(64, 5, 2)


def mobile(seed=0):
    """Two inverted residuals on one stream, without strides."""
    keras.utils.set_random_seed(seed)

    def unit(tensor, make, name, relu=True):
        tensor = layers.BatchNormalization(name=f"{name}_bn")(make(name=name)(tensor))
        return layers.ReLU(6, name=f"{name}_relu")(tensor) if relu else tensor

    def pointwise(filters):
        return lambda name: layers.Conv2D(filters, 1, use_bias=False, name=name)

    def depthwise(name):
        return layers.DepthwiseConv2D(3, padding="same", use_bias=False, name=name)

    inputs = keras.Input((8, 8, 1))
    stream = unit(layers.Conv2D(6, 3, padding="same", name="stem")(inputs), pointwise(4), "thin")
    for number in (1, 2):
        branch = unit(stream, pointwise(12), f"expand{number}")
        branch = unit(branch, depthwise, f"depthwise{number}")
        branch = unit(branch, pointwise(4), f"project{number}", relu=False)
        stream = layers.Add(name=f"add{number}")([stream, branch])
    features = layers.GlobalAveragePooling2D()(stream)
    return stir(keras.Model(inputs, layers.Dense(3, name="head")(features)), seed)


def joined(seed=0):
    """Concatenation read whole, as a slice and behind a flatten; a nested model."""
    keras.utils.set_random_seed(seed)
    inner = keras.Input((6, 6, 5))
    y = layers.Conv2D(6, 3, padding="same", activation="relu", name="inside")(inner)
    y = layers.Conv2D(4, 1, name="outside")(y)
    nested = keras.Model(inner, y, name="nested")
    inputs = keras.Input((6, 6, 2))
    a = layers.Conv2D(4, 3, padding="same", activation="relu", name="a")(inputs)
    b = layers.Conv2D(6, 3, padding="same", activation="relu", name="b")(inputs)
    both = layers.Concatenate(name="both")([a, inputs, b])
    c = layers.Conv2D(5, 1, activation="relu", name="c")(both)
    d = layers.Conv2D(4, 1, name="d")(both[..., 3:9])
    e = layers.Add(name="sum")([nested(c), d])
    x = layers.Dense(8, activation="relu", name="wide")(layers.Flatten(name="flat")(e))
    return randomize(keras.Model(inputs, layers.Dense(3, name="head")(x)))


NETWORKS = {
    "residual": lambda: stir(residual()),
    "depthwise and excitation": toys.residual,
    "mobile": mobile,
    "joined": joined,
}


def coded(method, model, seed=0):
    """A prepared model whose gates have a random code, as after training."""
    prepared = method.prepare(model)
    random = np.random.default_rng(seed)
    for gate in gates_of(prepared).values():
        code = random.permutation(np.arange(gate.state.code.shape[0]) % 2)
        gate.state.code.assign(code)
        gate.state.mean.assign(0.1 + 0.8 * code)
        gate.state.steps.assign(20)
    return prepared


@pytest.mark.parametrize("name", NETWORKS)
def test_a_code_of_zeros_is_a_removal(name) -> None:
    """Sheet B4, decision rule, and B0: a gate of zero at every reader equals removing the channel.

    The finished model has no gate, and the plan fits the model that was given.
    """
    source = NETWORKS[name]()
    method = AutoPruner(10, keep=0.5, map_size=3)
    assert not method.left(source)
    prepared = coded(method, source)
    gates = gates_of(prepared)
    assert set(gates) == {group.name for group in tfprune.analyse(source).prunable}
    plan = method.plan(prepared)
    for group, gate in gates.items():
        assert plan.kept[group] == tuple(np.flatnonzero(np.asarray(gate.state.code)))
    finished = method.finish(prepared)
    assert {type(layer).__module__.partition(".")[0] for layer in finished.layers} == {"keras"}
    batch = random_batch(tfprune.analyse(source), seed=1, examples=4)
    expected = call_model(prepared, batch)[0].numpy()
    assert np.abs(expected).max() > 0
    # the same products in float32 sums without the zeros
    np.testing.assert_allclose(call_model(finished, batch)[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        call_model(plan.apply(source), batch)[0], expected, rtol=1e-5, atol=1e-5
    )
    assert tfprune.verify(source, plan).passed


def test_where_gates_stand_around_a_depthwise_convolution() -> None:
    """Sheet B4, MobileNetV2: v comes from the expansion, and multiplies its output and the next."""
    prepared = AutoPruner(10, keep=0.5).prepare(mobile())
    products = [layer for layer in prepared.layers if isinstance(layer, GateProduct)]
    behind = [_names_around(layer) for layer in products]
    assert ("expand1_relu", "depthwise1") in behind
    assert ("depthwise1_relu", "project1") in behind
    # the stream's readers: both expansions, and the head
    readers = [after for _, after in behind if after in ("expand1", "expand2", "head")]
    assert readers == ["expand1", "expand2", "head"]
    assert gates_of(prepared)["expand1"].kernel.shape == (4 * 4 * 12, 12)


def _names_around(product):
    tensor = product._inbound_nodes[0].input_tensors[0]
    before = tensor._keras_history.operation.name
    return before, product._outbound_nodes[0].operation.name


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def test_training_steps_are_the_papers() -> None:
    """Forward, loss, gradients both ways to X, schedule and adaptive lambda, by hand in float64."""
    keep, every, rate, alpha, stop, steps = 0.25, 2, 0.05, 0.5, 2.0, 6
    method = AutoPruner(
        4, keep=keep, alpha=(alpha, stop), every=every, alpha_raise=0.5, grace=3, penalty=3.0
    )
    model = method.prepare(mlp(widths=(8,), features=5, classes=2))
    gate = gates_of(model)["fc1"]
    gate.kernel.assign(np.asarray(gate.kernel) / 10)
    w1, b1, w2, b2, u, c = (
        np.asarray(v, np.float64)
        for v in (
            *model.get_layer("fc1").weights, *model.get_layer("head").weights,
            gate.kernel, gate.bias,
        )
    )  # fmt: skip
    x, _ = rows(12 * steps, 5, 2, seed=3)
    t = np.random.default_rng(4).standard_normal((12 * steps, 2)).astype("float32")
    model.compile(keras.optimizers.SGD(rate), "mse")
    model.fit(x, t, batch_size=12, shuffle=False, verbose=0)

    penalty, raised, bits, raises = 3.0, 0.0, np.zeros(8), 0
    for step in range(steps):
        inputs, targets = (part[12 * step : 12 * step + 12].astype(np.float64) for part in (x, t))
        slope = alpha + (stop - alpha) * min(step / 4, 1) + raised
        before = inputs @ w1 + b1
        a = np.maximum(before, 0)
        mean = a.mean(0)
        v = sigmoid(slope * (mean @ u + c))
        error = (a * v) @ w2 + b2 - targets
        d_out = 2 * error / error.size
        d_gated = d_out @ w2.T
        d_v = (d_gated * a).sum(0) + penalty * 2 * (v.mean() - keep) / 8
        d_z = d_v * v * (1 - v) * slope
        d_a = d_gated * v + (d_z @ u.T) / 12  # through the product, and through the mean
        d_before = d_a * (before > 0)
        gradients = [
            inputs.T @ d_before, d_before.sum(0), (a * v).T @ d_out, d_out.sum(0),
            np.outer(mean, d_z), d_z,
        ]  # fmt: skip
        w1, b1, w2, b2, u, c = (
            weight - rate * gradient
            for weight, gradient in zip((w1, b1, w2, b2, u, c), gradients, strict=True)
        )
        bits += v > 0.5
        if (step + 1) % every == 0:
            index = bits / every > 0.5
            penalty, bits = 100 * abs(keep - index.mean()), np.zeros(8)
            if step + 1 >= 3 and ((v < 0.2) | (v > 0.8)).mean() < 0.9:
                raised, raises = raised + 0.5, raises + 1
    assert raises == 2 and penalty != 3.0
    # float32 over six steps
    for variable, expected in [
        (model.get_layer("fc1").kernel, w1), (model.get_layer("fc1").bias, b1),
        (model.get_layer("head").kernel, w2), (model.get_layer("head").bias, b2),
        (gate.kernel, u), (gate.bias, c),
    ]:  # fmt: skip
        np.testing.assert_allclose(np.asarray(variable), expected, rtol=1e-4, atol=1e-5)
    assert float(gate.state.penalty.numpy()) == pytest.approx(penalty, rel=1e-4)
    assert float(gate.state.raised.numpy()) == raised
    assert np.array_equal(np.asarray(gate.state.code) > 0.5, index)


def small():
    """One dense layer that loses channels: compiling the training takes longest."""
    return mlp(widths=(12,), features=5, classes=2)


def trained(method, epochs=2, model=None, **options):
    """A prepared model after some epochs of four steps."""
    model = method.prepare(small()) if model is None else model
    if not model.compiled:
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), LOSS, **options)
    done = int(np.asarray(model.optimizer.iterations)) // 4
    history = model.fit(
        *DATA, batch_size=16, initial_epoch=done, epochs=epochs, shuffle=False, verbose=0,
        callbacks=method.callbacks(),
    )  # fmt: skip
    return model, history.history


def test_values_become_two_sided_as_alpha_grows() -> None:
    """Sheet B4: with a small slope values stay in between, with a large one they are 0 or 1."""
    method = AutoPruner(40, keep=0.5, alpha_raise=0, every=4)
    model, history = trained(method, epochs=12)
    # linear from 0.1 to 100 over 40 steps, and flat from there
    expected = [0.1 + 99.9 * min(step / 40, 1) for step in range(4, 52, 4)]
    assert history["alpha"] == pytest.approx(expected)
    gate = gates_of(model)["fc1"]
    hidden = model.get_layer("fc1")(DATA[0])
    values = [np.asarray(gate.values(hidden, alpha)) for alpha in (0.01, gate.alpha)]
    shares = [np.mean((v < 0.2) | (v > 0.8)) for v in values]
    # of 12 channels one may be in between; the penalty keeps about half of them open
    assert shares[0] == 0 and shares[1] > 0.9
    assert values[1].mean() == pytest.approx(0.5, abs=0.2)


@pytest.fixture(scope="module")
def digits():
    """A run on real digits to half the MACs."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8, 1) / 16).astype("float32")
    source = residual()
    head = layers.Dense(10, name="digits")(source.get_layer("pool").output)
    source = keras.Model(source.inputs, head, name="digits")
    before = snapshot(source)
    method = AutoPruner(30, macs=0.5, every=5)
    train, validation = (x[:640], y[:640]), (x[640:800], y[640:800])
    result = method.run(source, train, validation, epochs=4, learning_rate=0.05, verbose=0)
    assert same(before, source)
    return source, result


def test_a_run_meets_the_macs(digits) -> None:
    """Exactly as many channels stay as the uniform allocation says, whatever the code was."""
    source, result = digits
    whole = tfprune.cost.measure(source).macs
    assert tfprune.cost.measure(result.model).macs == pytest.approx(result.macs * whole)
    uniform = tfprune.plan(source, macs=0.5, round_to=1)
    assert {k: len(v) for k, v in result.plan.kept.items()} == {
        k: len(v) for k, v in uniform.kept.items()
    }
    assert 0.4 < result.macs <= 0.5
    # the stored code is the plan's: rounding is all that is left
    assert 0 < result.difference < 1e-5
    assert tfprune.verify(source, result.plan).passed
    # r of each gate is what stays
    for name, gate in gates_of(result.trained).items():
        kept = result.plan.kept[name]
        assert gate.keep == pytest.approx(len(kept) / gate.state.code.shape[0])
        assert tuple(np.flatnonzero(np.asarray(gate.state.code))) == kept
    history = result.record.history
    assert len(history["macs"]) == 4 and set(history["macs"]) == {result.macs}
    assert {"alpha", "gate_penalty", "decided", "kept_by_code", "width/stem"} <= set(history)


def test_the_code_decides() -> None:
    """With ``keep`` the plan is the code; one channel stays where the code is all zeros."""
    method = AutoPruner(10, keep=0.5)
    prepared = coded(method, stir(residual()))
    gates = gates_of(prepared)
    gates["first"].state.code.assign([0.5, 0.55, 0.0, 1.0, 0.45, 0.2])
    gates["last"].state.code.assign(np.zeros(10))
    gates["last"].state.mean.assign(np.linspace(0.0, 0.3, 10))
    plan = method.plan(prepared)
    assert plan.kept["first"] == (1, 3) and plan.kept["last"] == (9,)
    # a target takes the code first, then the mean value
    fixed = AutoPruner(10, pruning_ratio=0.5)
    prepared = coded(fixed, stir(residual()))
    gates_of(prepared)["first"].state.code.assign([1, 1, 0, 0, 0, 0])
    gates_of(prepared)["first"].state.mean.assign([0.6, 0.7, 0.3, 0.1, 0.4, 0.2])
    assert fixed.plan(prepared).kept["first"] == (0, 1, 4)


def test_half_way_through_a_file(tmp_path) -> None:
    """Saved with its optimizer and loaded, a model goes on as if nothing had been."""
    method = AutoPruner(8, macs=0.5, alpha=(0.1, 2.0), every=3)
    whole, _ = trained(method)
    half, _ = trained(method, epochs=1)
    half.save(tmp_path / "half.keras")
    loaded = keras.models.load_model(tmp_path / "half.keras")
    loaded, _ = trained(method, model=loaded)
    for a, b in zip(whole.variables, loaded.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=a.path)
    assert method.plan(loaded).kept == method.plan(whole).kept
    assert [gate.steps_made for gate in gates_of(loaded).values()] == [8]

    compiled, _ = trained(method, jit_compile=True)
    for a, b in zip(whole.trainable_variables, compiled.trainable_variables, strict=True):
        # float32 in another order, over 8 steps
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5, err_msg=a.path)


def test_mixed_precision() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        source = small()
    finally:
        keras.config.set_dtype_policy("float32")
    method = AutoPruner(8, macs=0.5, every=3)
    model, history = trained(method, model=method.prepare(source))
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    assert model.get_layer("fc1").compute_dtype == "bfloat16"
    assert all(np.isfinite(np.asarray(v)).all() for v in model.variables)
    assert np.isfinite(history["loss"]).all()
    assert method.finish(model).get_layer("fc1").compute_dtype == "bfloat16"


def test_what_is_left_alone() -> None:
    inputs = keras.Input((10, 3))
    x = layers.Conv1D(6, 3, activation="relu", name="read")(inputs)
    x = layers.LSTM(5, return_sequences=True, name="inside")(x)
    x = layers.LayerNormalization(name="norm")(layers.Dense(6, name="statistics")(x))
    base = keras.Sequential(
        [keras.Input((8, 6)), layers.Conv1D(4, 1, name="one"), layers.Conv1D(4, 1, name="two")],
        name="base",
    )
    x = layers.Dense(7, activation="relu", name="last")(base(x))
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))
    left = AutoPruner(10, keep=0.5).left(model)
    assert left["inside"] == "it is read inside of a layer"
    assert left["statistics"].startswith("statistics are taken across its channels")
    assert "sequential" in left["base/one"]
    prepared = AutoPruner(10, macs=0.8).prepare(model)
    assert set(gates_of(prepared)) == {"read", "base/two", "last"}
    # the budget is met by these alone
    kept = AutoPruner(10, macs=0.8).choice(tfprune.analyse(prepared)).kept
    assert set(kept) == {"read", "base/two", "last"}

    inputs = keras.Input((4,))
    step = keras.Model(inputs, layers.Dense(4, "relu", name="again")(inputs), name="step")
    inputs = keras.Input((4,))
    twice = keras.Model(inputs, layers.Dense(2, name="head")(step(step(inputs))))
    with pytest.raises(ArgumentError, match="AutoPruner can act on"):
        AutoPruner(10, keep=0.5).prepare(twice)


def test_ignored_groups_have_no_gate() -> None:
    method = AutoPruner(10, keep=0.5, ignore=["stem"], min_channels=6)
    prepared = method.prepare(residual())
    # six of six channels of the other group must stay
    assert set(gates_of(prepared)) == {"last"}
    sequential = AutoPruner(10, keep=0.5).prepare(mlp())
    groups = [layer.group for layer in sequential.layers if isinstance(layer, BatchGate)]
    assert groups == ["fc1", "fc2", "fc3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Received: none"),
        ({"keep": 0.5, "macs": 0.5}, "several"),
        ({"pruning_ratio": 0.5, "macs": 0.5}, "both"),
        ({"keep": 1.0}, "keep between"),
        ({"keep": 0.5, "alpha": (0.0, 1.0)}, "alpha as two"),
        ({"keep": 0.5, "alpha": (2.0, 1.0)}, "alpha as two"),
        ({"keep": 0.5, "alpha_steps": 0}, "alpha_steps"),
        ({"keep": 0.5, "every": 0}, "every"),
        ({"keep": 0.5, "grace": -1}, "grace"),
        ({"keep": 0.5, "penalty": float("nan")}, "penalty"),
        ({"keep": 0.5, "alpha_raise": -1.0}, "alpha_raise"),
        ({"keep": 0.5, "map_size": 0}, "map_size"),
    ],
    ids=range(12),
)
def test_arguments(arguments, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        AutoPruner(**{"alpha_steps": 10, **arguments})


def test_what_cannot_be_prepared_or_finished() -> None:
    with pytest.raises(BudgetError, match="macs"):
        AutoPruner(10, macs=0.001).prepare(residual())
    with pytest.raises(ArgumentError, match="ignore"):
        AutoPruner(10, keep=0.5, ignore=["nothing"]).prepare(residual())
    method = AutoPruner(10, keep=0.5)
    frozen = joined()
    frozen.get_layer("nested").trainable = False
    with pytest.raises(ModelError, match="with trainable=False"):
        method.prepare(frozen)
    prepared = method.prepare(residual())
    with pytest.raises(ModelError, match="trains by a method already"):
        method.prepare(prepared)
    with pytest.raises(ModelError, match="no training step"):
        method.finish(prepared)
