"""Filter correlations: the loss, the pairs, and what is left (sheet B8.2)."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tfprune.errors import ArgumentError, BudgetError
from tfprune.graph import analyse
from tfprune.methods.cfp import CorrelationUpdate, FilterCorrelation, falling_widths, top_pairs
from tfprune.surgery import apply
from tfprune.testing import randomize

layers = keras.layers
# Relative to the largest output: a few float32 layers with sums in another order.
ROUNDING = 1e-5


def _net(seed=0):
    """A residual stream with a depthwise convolution, an inner layer behind a normalisation."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu", name="stem")(inputs)
    y = layers.Conv2D(6, 3, padding="same", use_bias=False, name="inner")(x)
    y = layers.ReLU()(layers.BatchNormalization(name="norm")(y))
    y = layers.Conv2D(8, 1, name="back")(y)
    x = layers.ReLU()(layers.Add()([x, layers.DepthwiseConv2D(3, padding="same", name="dw")(y)]))
    return keras.Model(inputs, layers.Dense(10, name="head")(layers.Flatten()(x)))


def _chain(norm=False):
    """One convolution that is read behind a flatten."""
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, use_bias=not norm, name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x) if norm else x
    x = layers.Flatten()(layers.MaxPooling2D(2)(layers.ReLU()(x)))
    return randomize(keras.Model(inputs, layers.Dense(3, name="head")(x)))


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x[:320].reshape(-1, 8, 8, 1) / 16).astype("float32"), y[:320]


def _bound(model, penalty=1.0, absorb=False, **pairs):
    update = CorrelationUpdate(penalty, absorb)
    update.bind(analyse(model))
    for name, partner in pairs.items():
        update.held.partners[name].assign(partner)
    return update


def _rho(x, y):
    return np.corrcoef(np.ravel(x), np.ravel(y))[0, 1]


# -- the loss ----------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_formula() -> None:
    """C_S = exp(-mean |rho|) over the pairs of all layers, Pearson's rho by numpy."""
    model = randomize(_net())
    update = _bound(model, stem=[0, 3, 2, 1, 5, 4, 6, 7], inner=[0, 1, 2, 5, 4, 3])
    stem, back, inner = (np.asarray(model.get_layer(n).kernel) for n in ("stem", "back", "inner"))
    # The stream is made by two kernels: a filter is what both make of a channel.
    stream = np.concatenate([stem.reshape(-1, 8), back.reshape(-1, 8)]).T
    rho = [_rho(stream[1], stream[3]), _rho(stream[4], stream[5])]
    rho.append(_rho(inner[..., 3], inner[..., 5]))
    found = update.figures()
    assert found["pairs"] == 3
    # float32 sums of some fifty products
    assert found["correlation"] == pytest.approx(np.mean(np.abs(rho)), rel=1e-5)
    assert found["correlation_loss"] == pytest.approx(np.exp(-np.mean(np.abs(rho))), rel=1e-5)


def test_the_range_of_the_loss() -> None:
    """Sheet B8.2: from 1/e, for multiples of either sign, to 1, for no correlation or no pair."""
    model = _chain()
    update = _bound(model, conv=[1, 0, 3, 2])
    kernel = np.zeros((3, 3, 2, 4), "float32")
    kernel.reshape(18, 4)[:, 0] = np.arange(18)
    kernel.reshape(18, 4)[:, 2] = np.arange(18) % 5
    kernel[..., 1], kernel[..., 3] = 3 * kernel[..., 0] + 1, -kernel[..., 2]
    model.get_layer("conv").kernel.assign(kernel)
    assert update.figures()["correlation_loss"] == pytest.approx(np.exp(-1), rel=1e-6)
    # Signs that alternate, and signs that change once, after an even number: orthogonal.
    kernel.reshape(18, 4)[:, [0, 2]] = (np.arange(18) % 2 * 2 - 1)[:, None]
    kernel.reshape(18, 4)[:, [1, 3]] = np.where(np.arange(18) < 10, 1, -1)[:, None]
    model.get_layer("conv").kernel.assign(kernel)
    assert update.figures()["correlation_loss"] == pytest.approx(1, abs=1e-6)
    assert _bound(model).figures() == {"pairs": 0, "correlation": 0, "correlation_loss": 1}


def test_the_gradient_is_the_tape_s() -> None:
    """With removed channels, and a filter that is constant."""
    model = randomize(_net())
    kernel = np.asarray(model.get_layer("inner").kernel).copy()
    kernel[..., 2] = 0.25
    model.get_layer("inner").kernel.assign(kernel)
    update = _bound(model, penalty=0.7, stem=[0, 3, 2, 1, 5, 4, 6, 7], inner=[0, 5, 4, 3, 2, 1])
    update.held.there["stem"].assign([1, 1, 1, 1, 1, 1, 0, 1])
    update.held.there["inner"].assign([1, 1, 1, 0, 1, 1])
    update.update({}, 0.0)
    variables = [model.get_layer(n).kernel for n in ("stem", "back", "inner")]
    with tf.GradientTape() as tape:
        parts = {name: update._pairs(name) for name in update.held.filters}
        count, total = update._sums(parts)
        loss = 0.7 * tf.exp(-total / count)
    expected = tape.gradient(loss, [v.value for v in variables])
    before = {id(v): tf.ones(v.shape) for v in variables}
    found = update.gradients(before, 0.1)
    assert found.keys() == before.keys()
    for variable, gradient in zip(variables, expected, strict=True):
        assert np.abs(gradient).max() > 1e-3
        # float32; gradients of order 0.1
        np.testing.assert_allclose(found[id(variable)] - 1, gradient, atol=2e-6)
    # A step against it makes the pairs more alike.
    correlation = update.figures()["correlation"]
    for variable in variables:
        variable.assign(variable - 0.1 * (found[id(variable)] - 1))
    assert update.figures()["correlation"] > correlation + 1e-3


def test_entries_that_read_removed_channels_do_not_count() -> None:
    model = randomize(_net())
    update = _bound(model, inner=[1, 0, 2, 3, 4, 5])
    there = np.array([1, 0, 1, 0, 0, 1, 1, 1])
    update.held.there["stem"].assign(there)
    update.update({}, 0.0)
    kernel = np.asarray(model.get_layer("inner").kernel)
    assert not kernel[:, :, there == 0].any()
    rho = _rho(kernel[:, :, there == 1, 0], kernel[:, :, there == 1, 1])
    assert update.figures()["correlation"] == pytest.approx(abs(rho), rel=1e-5)


# -- pairs -------------------------------------------------------------------------------------


def test_top_pairs() -> None:
    rows = np.array([[1.0, -1, 0], [1, 1, -2], [2, -2, 0.1], [-1, -1, 2], [0, 1, -1]])
    rows -= rows.mean(1, keepdims=True)
    # 1 and 3 are opposite, 0 and 2 nearly multiples; 4 is left.
    assert top_pairs(rows, 1) == [(1, 3)]
    assert top_pairs(rows, 2) == [(1, 3), (0, 2)]
    assert top_pairs(rows, 1, np.array([True, True, True, False, False])) == [(0, 2)]


@given(st.integers(2, 40), st.integers(0, 20), st.integers(0, 99))
def test_pairs_are_disjoint_and_greedy(width, count, seed) -> None:
    count = min(count, width // 2)
    rows = np.random.default_rng(seed).standard_normal((width, 5))
    rows -= rows.mean(1, keepdims=True)
    pairs = top_pairs(rows, count)
    assert len(pairs) == count == len({i for pair in pairs for i in pair}) // 2
    rho = np.abs(np.corrcoef(rows)) - 2 * np.eye(width)
    left = np.ones(width, bool)
    for pair in pairs:
        assert rho[pair] == pytest.approx(rho[np.ix_(left, left)].max())
        left[list(pair)] = False


@given(st.integers(1, 200), st.integers(1, 8), st.data())
def test_falling_widths(target, episodes, data) -> None:
    whole = data.draw(st.integers(target, 300))
    widths = falling_widths(whole, target, episodes)
    assert widths[0] == whole and len(widths) == episodes + 1
    assert all(b <= a <= 2 * b for a, b in itertools.pairwise(widths))
    # Within reach: exactly what was asked for.
    assert (widths[-1] == target) == (-(-whole // 2**episodes) <= target)


# -- absorption --------------------------------------------------------------------------------


def _made_alike(model, factor, norm):
    """Filter 2 becomes ``factor`` times filter 1, offsets as well; what else differs agrees."""
    kernel = np.asarray(model.get_layer("conv").kernel).copy()
    kernel[..., 2] = factor * kernel[..., 1]
    model.get_layer("conv").kernel.assign(kernel)
    if not norm:
        bias = np.asarray(model.get_layer("conv").bias).copy()
        bias[2] = factor * bias[1]
        model.get_layer("conv").bias.assign(bias)
        return
    op = model.get_layer("norm")
    gamma, beta, mean, variance = (np.array(w) for w in op.get_weights())
    # The statistics that batches would have; scales are in the proportion 0.5.
    mean[2], variance[2] = factor * mean[1], factor**2 * (variance[1] + op.epsilon) - op.epsilon
    gamma[2], beta[2] = 0.5 * gamma[1], 0.5 * beta[1]
    op.set_weights([gamma, beta, mean, variance])


@pytest.mark.parametrize("norm", [False, True])
def test_a_perfect_pair_is_absorbed_exactly(norm) -> None:
    """Sheet B8.2, step 4: exact when a > 0 and scales agree."""
    x = np.random.default_rng(0).standard_normal((5, 6, 6, 2)).astype("float32")
    for factor, absorb, exact in ((2.0, True, True), (1.0, True, True), (0.3, True, True),
                                  (-2.0, True, False), (2.0, False, False)):  # fmt: skip
        model = _chain(norm)
        _made_alike(model, factor, norm)
        method = FilterCorrelation(pruning_ratio=0.25, episodes=1, absorb=absorb)
        prepared = method.prepare(model)
        prepared.update.choose({"conv": 1})
        assert prepared.update.figures()["correlation"] == pytest.approx(1, abs=1e-6)
        plan = method.plan(prepared)
        # The one with the smaller norm goes; of equal ones the latter.
        assert plan.kept["conv"] == ((0, 2, 3) if abs(factor) > 1 else (0, 1, 3))
        before = np.asarray(model(x))
        after = np.asarray(apply(model, plan)(x))
        difference = np.abs(after - before).max() / np.abs(before).max()
        assert difference < ROUNDING if exact else difference > 0.01


def test_what_is_not_absorbed() -> None:
    """The stream has a depthwise convolution on its way."""
    prepared = FilterCorrelation(pruning_ratio=0.25, episodes=1, absorb=True).prepare(_net())
    prepared.update.choose({"stem": 2, "inner": 2})
    outcome = prepared.update.outcome()
    assert outcome["stem"][1] == {} and (~outcome["stem"][0]).sum() == 2


@pytest.mark.parametrize("absorb", [False, True])
def test_removed_in_training_as_in_the_end(absorb) -> None:
    """The plan of an open episode = its end; and the masked network = the smaller one."""
    method = FilterCorrelation(pruning_ratio=0.5, episodes=2, absorb=absorb)
    prepared = method.prepare(randomize(_net()))
    x = np.random.default_rng(0).standard_normal((5, 8, 8, 1)).astype("float32")
    whole = np.asarray(prepared(x))
    for _ in range(2):
        prepared.update.choose({"stem": 2, "inner": 1})
        open_one = method.finish(prepared)
        prepared.update.remove()
        masked, small = np.asarray(prepared(x)), np.asarray(method.finish(prepared)(x))
        scale = ROUNDING * np.abs(masked).max()
        np.testing.assert_allclose(np.asarray(open_one(x)), masked, rtol=0, atol=scale)
        np.testing.assert_allclose(small, masked, rtol=0, atol=scale)
        assert np.abs(masked - whole).max() > 100 * scale
    plan = method.plan(prepared)
    assert {name: len(kept) for name, kept in plan.kept.items()} == {"stem": 4, "inner": 4}
    scores = method.scores(analyse(prepared))
    assert tuple(np.flatnonzero(scores["stem"])) == plan.kept["stem"]


# -- training ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(digits):
    method = FilterCorrelation(macs=0.5, episodes=2, episode_epochs=2, penalty=1.0)
    return method.run(
        _net(), digits, epochs=5, learning_rate=0.05, batch_size=20, weight_decay=1e-4, verbose=0
    )


def _foretold():
    """The widths that the method foretells."""
    return FilterCorrelation(macs=0.5, episodes=2).widths(analyse(_net()))


def test_run(result) -> None:
    """It ends at the MACs asked for, and nothing changes when the channels go for real."""
    assert 0.4 < result.macs <= 0.5
    assert result.difference < ROUNDING
    history = result.record.history
    gone = [sum(w[i] - w[i + 1] for w in _foretold().values()) for i in range(2)]
    assert history["pairs"] == (gone[0], gone[0], gone[1], gone[1], 0) and min(gone) > 0
    # Within an episode the pairs become more alike.
    assert history["correlation"][1] > history["correlation"][0]
    assert history["correlation"][3] > history["correlation"][2]
    assert history["loss"][-1] < history["loss"][0]
    kept = {name: len(channels) for name, channels in result.plan.kept.items()}
    assert history["width/stem"][-1] == kept.get("stem", 8)
    assert history["macs"][0] > history["macs"][2] == pytest.approx(result.macs)


def test_removed_slices_stay_zero(result) -> None:
    """Although momentum and weight decay go on."""
    for name, state in result.trained.update.held.there.items():
        gone = np.flatnonzero(np.asarray(state) == 0)
        assert len(gone) == 0 or name in result.plan.kept
    gone = np.flatnonzero(np.asarray(result.trained.update.held.there["stem"]) == 0)
    assert len(gone)
    assert not np.asarray(result.trained.get_layer("inner").kernel)[:, :, gone].any()
    head = np.asarray(result.trained.get_layer("head").kernel).reshape(4, 4, 8, 10)
    assert not head[:, :, gone].any() and np.abs(head).max() > 0


def _tiny():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(6, 3, strides=4, activation="relu", name="conv")(inputs)
    return keras.Model(inputs, layers.Dense(10, name="head")(layers.Flatten()(x)))


def test_resuming(digits, tmp_path) -> None:
    """A run that stops within an episode ends as one that does not."""
    data, file, ends = tuple(part[:128] for part in digits), tmp_path / "state", []
    method = FilterCorrelation(pruning_ratio=0.5, episodes=2, episode_epochs=2, absorb=True)

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    options = {"epochs": 5, "learning_rate": 0.05, "verbose": 0, "checkpoint": file}
    with pytest.raises(KeyboardInterrupt):
        method.run(_tiny(), data, callbacks=[Stop()], **options)
    resumed = method.run(_tiny(), data, **options)
    assert resumed.record.resumed_from == 2
    options["checkpoint"] = None
    ends = [run.model.weights for run in (resumed, method.run(_tiny(), data, **options))]
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_saving_and_compiling(digits, tmp_path) -> None:
    """A loaded model has its pairs; XLA computes the same steps."""
    x, y = (part[:64] for part in digits)
    ends = []
    for jit in (False, True):
        method = FilterCorrelation(pruning_ratio=0.5, episodes=2)
        prepared = method.prepare(_tiny())
        prepared.update.choose({"conv": 2})
        prepared.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        for name, state in prepared.update.held.partners.items():
            np.testing.assert_array_equal(state, loaded.update.held.partners[name])
        assert loaded.update.figures()["pairs"] == 2
        loaded.compile(
            keras.optimizers.SGD(0.05),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=jit,
        )
        loaded.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
        ends.append(loaded.get_weights())
    for one, other in zip(*ends, strict=True):
        # four float32 steps, sums in another order
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "macs or pruning_ratio. Received: neither"),
        ({"macs": 0.5, "penalty": 0.0}, "positive penalty"),
        ({"macs": 0.5, "penalty": np.inf}, "positive penalty"),
        ({"macs": 0.5, "episodes": 0}, "episodes"),
        ({"macs": 0.5, "episode_epochs": 1.5}, "episode_epochs"),
    ],
)
def test_bad_arguments(options, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        FilterCorrelation(**options)


def test_out_of_reach(digits) -> None:
    with pytest.raises(ArgumentError, match="at least 3 episodes for 'stem' to fall from 8 to 1"):
        FilterCorrelation(pruning_ratio=0.8, episodes=2).prepare(_net())
    with pytest.raises(BudgetError, match="budget within reach"):
        FilterCorrelation(macs=1e-6).prepare(_net())
    with pytest.raises(ArgumentError, match="at least 6 epochs"):
        FilterCorrelation(macs=0.5).run(_net(), digits, epochs=5)
    with pytest.raises(ArgumentError, match=r"FilterCorrelation\.prepare"):
        FilterCorrelation(macs=0.5).plan(_net())
    inputs = keras.Input((4,))
    with pytest.raises(ArgumentError, match="has none"):
        FilterCorrelation(macs=0.5).prepare(keras.Model(inputs, layers.Dense(2)(inputs)))
