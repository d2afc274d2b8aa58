"""Gates that look at a batch: formulas against numpy, and how they get into a model and out."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
from keras import ops

import tfprune
from tests.methods.models import residual, same, snapshot, stir, stripes
from tfprune.errors import ModelError
from tfprune.graph.masking import predict_on
from tfprune.layers.batch_gate import (
    BatchGate,
    GateProduct,
    GateRules,
    GateState,
    gates_of,
    with_gates,
    without_gates,
)
from tfprune.methods.autopruner import AutoPruner, _sites

RULES = GateRules(
    alpha=(0.5, 2.5), alpha_steps=10, alpha_every=1, alpha_raise=1.0, grace=0, penalty=10.0,
    adaptive_penalty=True, every=4,
)  # fmt: skip


def gate(positions, axis, shape, keep=0.5, map_size=7, **options):
    layer = BatchGate("group", positions, axis, keep, map_size, RULES, **options)
    layer.build(shape)
    return layer


def halves(x):
    """The 2x2 maximum of maps (height, width, channels) of even size."""
    h, w, c = x.shape
    return x.reshape(h // 2, 2, w // 2, 2, c).max((1, 3))


def averages(x, size):
    """Adaptive average pooling of the first axis, entry by entry."""
    n = len(x)
    bounds = [(math.floor(i * n / size), math.ceil((i + 1) * n / size)) for i in range(size)]
    return np.stack([x[start:stop].mean(0) for start, stop in bounds])


IDENTITY = [[0], [1], [2]]


@pytest.mark.parametrize("side", [4, 7, 8, 14, 17])
def test_the_pooled_average_of_maps(side) -> None:
    """Sheet B4, gate steps 1 and 2: the mean over the batch, the 2x2 maximum but for small maps."""
    x = np.random.default_rng(side).standard_normal((5, side, side, 3)).astype("float32")
    expected = x.mean(0)
    if side > 7:
        even = side // 2 * 2
        expected = halves(expected[:even, :even])
    if side == 17:  # 8x8 is still too large
        expected = averages(averages(expected, 7).swapaxes(0, 1), 7).swapaxes(0, 1)
    layer = gate(IDENTITY, 3, x.shape)
    # float32 means
    np.testing.assert_allclose(layer.features(x), expected.reshape(-1), atol=1e-6)
    assert layer.kernel.shape == (expected.size, 3)


def test_other_shapes() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((5, 6)).astype("float32")
    # of dense layers: the mean; three of the channels stand elsewhere, and two positions are others
    np.testing.assert_allclose(
        gate([[5], [0], [2]], 1, x.shape).features(x), x.mean(0)[[5, 0, 2]], atol=1e-6
    )
    # behind a flatten of 3x3 pixels and two channels: nine positions each, at most four averages
    x = random.standard_normal((5, 18)).astype("float32")
    positions = np.arange(18).reshape(9, 2).T.tolist()
    expected = averages(x.mean(0).reshape(9, 2), 4).reshape(-1)
    np.testing.assert_allclose(
        gate(positions, 1, x.shape, map_size=2).features(x), expected, atol=1e-6
    )
    # channels first, and a free axis, which is averaged whole
    x = random.standard_normal((5, 3, 4, 10)).astype("float32")
    layer = gate(IDENTITY, 1, (None, 3, 4, None))
    expected = x.mean((0, 3)).T.reshape(-1)
    np.testing.assert_allclose(layer.features(x), expected, atol=1e-6)


def test_values_penalty_and_first_weights() -> None:
    """Sheet B4, steps 3 and 4, the loss, and the initialisation N(0, 10 sqrt(2 / n))."""
    x = np.random.default_rng(1).standard_normal((6, 12, 12, 40)).astype("float32")
    layer = gate([[i] for i in range(40)], 3, x.shape, keep=0.3, seed=3)
    kernel = np.asarray(layer.kernel, np.float64)
    n = 6 * 6 * 40
    assert kernel.shape == (n, 40) and not np.asarray(layer.bias).any()
    # 57,600 draws: the standard deviation is within 1 % but for one time in 10^3
    assert kernel.std() == pytest.approx(10 * math.sqrt(2 / n), rel=0.02)
    bias = np.linspace(-1, 1, 40)
    layer.bias.assign(bias)
    z = halves(x.astype(np.float64).mean(0)).reshape(-1) @ kernel + bias
    expected = 1 / (1 + np.exp(-0.5 * z))  # alpha of the first step
    received = np.asarray(layer(x, training=True))
    # float32 sums of 1,440 products
    np.testing.assert_allclose(received, expected, atol=1e-5)
    (penalty,) = layer.losses
    assert float(penalty) == pytest.approx(10 * (expected.mean() - 0.3) ** 2, rel=1e-4)


def test_the_slope() -> None:
    """Linear from step to step, or in stairs; what was raised is on top."""
    slopes = [float(RULES.slope(ops.convert_to_tensor(step), 0.0)) for step in (0, 5, 10, 99)]
    assert slopes == pytest.approx([0.5, 1.5, 2.5, 2.5])
    stairs = GateRules(**{**vars(RULES), "alpha_every": 5})
    slopes = [float(stairs.slope(ops.convert_to_tensor(step), 3.0)) for step in (4, 5, 9, 10)]
    assert slopes == pytest.approx([3.5, 4.5, 4.5, 5.5])


def reference(values, keep, every, grace, raise_by, adaptive):
    """The adaptive rules of sheet B4, written from the sheet: (code, lambda, raised, guard)."""
    code, penalty, raised, guard = np.ones(values.shape[1]), 10.0, 0.0, 0.95
    history = []
    for step in range(1, len(values) + 1):
        if step % every == 0:
            window = values[step - every : step]
            code = (window > 0.5).mean(0)
            index = code > 0.5
            if adaptive:
                penalty = 100 * abs(keep - index.mean())
            v = values[step - 1]
            if step >= grace and ((v < 0.2) | (v > 0.8)).mean() < 0.9:
                raised += raise_by
            if 1 - index.mean() >= guard:
                raised += raise_by
                guard = max(guard - 0.05, 1 - keep)
        history.append((code, penalty, raised, guard))
    return history


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_adaptive_rules(adaptive) -> None:
    """Over 60 steps: undecided values, decided ones, and windows in which nearly all are shut."""
    random = np.random.default_rng(5)
    undecided = random.uniform(0, 1, (20, 30))
    decided = random.choice([0.01, 0.99], (15, 30))
    shut = np.full((25, 30), 0.03)
    values = np.concatenate([undecided, decided, shut]).astype("float32")
    rules = GateRules(**{**vars(RULES), "every": 5, "grace": 12, "adaptive_penalty": adaptive})
    expected = reference(values, 0.9, 5, 12, 1.0, adaptive)
    zeros, ones = np.zeros(30, np.float32), np.ones(30, np.float32)
    state = GateState(0, zeros, zeros, ones, ones, 10.0, 0.0, np.float32(0.95))
    seen = set()
    for step, (v, (code, penalty, raised, guard)) in enumerate(zip(values, expected, strict=True)):
        state = state.after(ops.convert_to_tensor(v), 0.9, rules)
        # float32
        np.testing.assert_allclose(state.code, code, atol=1e-6)
        assert float(state.penalty) == pytest.approx(penalty, rel=1e-5, abs=1e-4)
        assert float(state.raised) == raised
        assert float(state.guard) == pytest.approx(guard, rel=1e-6)
        if (step + 1) % 5 == 0:
            mean = values[step - 4 : step + 1].mean(0)
            np.testing.assert_allclose(state.mean, mean, atol=1e-6)
        seen.add(raised)
    # steps 15 and 20 are undecided and past the grace, 5 windows are shut
    assert max(seen) == 2 + 5
    assert float(state.guard) == pytest.approx(0.95 - 5 * 0.05, rel=1e-6)


def test_inference_uses_the_code() -> None:
    layer = gate(IDENTITY, 1, (None, 3))
    x = np.ones((2, 3), np.float32)
    assert np.asarray(layer(x)).tolist() == [1, 1, 1]  # no code yet: nothing goes
    layer.state.code.assign([0.75, 0.5, 0.25])
    assert np.asarray(layer(x)).tolist() == [1, 0, 0]
    assert not layer.losses and layer.steps_made == 0


def test_products() -> None:
    """Several gates on one tensor, positions without one, and the type of the tensor."""
    layer = GateProduct(1, [1, 4, 0, 2, 1])
    x = np.arange(10, dtype="float32").reshape(2, 5) + 1
    gates = [ops.convert_to_tensor([0.5, 0.25]), ops.convert_to_tensor([0.0, 9.0])]
    expected = x * np.array([0.25, 1, 0.5, 0, 0.25])
    np.testing.assert_allclose(layer(x, gates), expected)
    assert layer(ops.cast(x, "bfloat16"), gates).dtype == "bfloat16"
    again = GateProduct.from_config(layer.get_config())
    np.testing.assert_allclose(again(x, gates), expected)


def test_into_a_model_and_out_again() -> None:
    """Nothing else changes: weights, flags, groups, MACs, and outputs while nothing is shut."""
    model = stir(residual())
    model.get_layer("first").trainable = False
    before = snapshot(model)
    graph = tfprune.analyse(model)
    sites, left = _sites(graph)
    assert not left
    # the stream is read twice, by the block and behind the addition
    read = {name: [place.call.op.name for place in site.places] for name, site in sites.items()}
    assert read == {"stem": ["first", "last"], "first": ["second"], "last": ["head"]}
    gated = with_gates(graph, sites, dict.fromkeys(sites, 0.5), rules=RULES)
    assert list(gates_of(gated)) == ["stem", "first", "last"]
    plain = without_gates(gated)
    x, _ = stripes(8)
    for other in (gated, plain):
        assert np.array_equal(predict_on(other, [x])[0], predict_on(model, [x])[0])
        assert not other.get_layer("first").trainable and other.get_layer("last").trainable
        found = tfprune.analyse(other)
        assert [(g.name, g.width, g.prunable) for g in found] == [
            (g.name, g.width, g.prunable) for g in graph
        ]
        assert tfprune.cost.measure(other).macs == tfprune.cost.measure(model).macs
    assert same(before, model) and same(before, plain)
    assert tfprune.analyse(plain).structure.renaming(graph.structure) is not None
    assert not [layer for layer in plain.layers if isinstance(layer, BatchGate | GateProduct)]


def test_time_masks_pass() -> None:
    tokens = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(10, 8, mask_zero=True, name="table")(tokens)
    x = keras.layers.Dense(6, activation="relu", name="hidden")(x)
    model = keras.Model(tokens, keras.layers.Dense(3, name="head")(keras.layers.LSTM(4)(x)))
    prepared = AutoPruner(10, keep=0.5).prepare(model)
    assert set(gates_of(prepared)) == {"table", "hidden"}
    steps = np.array([[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 9]])
    np.testing.assert_allclose(
        predict_on(prepared, [steps])[0], predict_on(model, [steps])[0], atol=1e-6
    )


def test_a_model_of_tf_keras() -> None:
    import tf_keras

    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [tf_keras.Input((4,)), layers.Dense(6, "relu", name="first"), layers.Dense(2, name="head")]
    )
    with pytest.raises(ModelError, match="of tf_keras"):
        AutoPruner(10, keep=0.5).prepare(model)
