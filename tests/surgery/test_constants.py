"""Constants of removed channels go into biases and moving means."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tf_keras
from hypothesis import event, given, settings
from hypothesis import strategies as st

import tfprune
from tests.toys import images, residual
from tfprune.errors import DataError
from tfprune.graph import analyse
from tfprune.graph.evaluate import call_model
from tfprune.graph.plan import PruningPlan
from tfprune.surgery import remove_zero_channels
from tfprune.surgery.constants import absorbed
from tfprune.testing import randomize
from tfprune.testing.strategies import draw_model

layers = keras.layers
# Relative to the largest output: a few float32 sums in another order ("exact to 1e-6", sheet B5).
ROUNDING = 2e-6


def _gone(graph, lost):
    return {
        name: np.setdiff1d(np.arange(graph[name].width), channels)
        for name, channels in lost.items()
    }


def _zero_scales(model, lost):
    """Zeroes every scale of these channels, and leaves the shifts: what ISTA ends in."""
    graph = analyse(model)
    for name, channels in lost.items():
        for member in graph[name].followers:
            if member.weight == "gamma":
                value = np.asarray(member.variable).copy()
                value[member.positions[np.isin(member.channels, channels)]] = 0
                member.variable.assign(value)
    return model


def _error(model, lost, x, data=None, absorb=True):
    """(difference of the smaller model to the model, over the largest output; the absorption).

    That the oracle agrees is checked on the way: masked with the new values == applied.
    """
    graph = analyse(model)
    kept = _gone(graph, lost)
    found = absorbed(graph, kept, data)
    plan = PruningPlan.of(graph, kept, values=found.values if absorb else None)
    assert tfprune.verify(model, plan, tolerance=1e-5)
    expected = [np.asarray(y) for y in call_model(model, [x])]
    received = [np.asarray(y) for y in call_model(plan.apply(model), [x])]
    largest = max(np.abs(y).max() for y in expected)
    worst = max(np.abs(a - b).max() for a, b in zip(expected, received, strict=True))
    return worst / largest, found


def _net(padding="valid", use_bias=False, norm=True, framework=keras, **reader):
    """conv, BN, ReLU, a reader with or without bias, BN, ReLU, flatten and a dense head."""
    kl = framework.layers
    inputs = framework.Input((8, 8, 3))
    x = kl.Conv2D(8, 3, padding="same", use_bias=False, name="maker")(inputs)
    x = kl.ReLU()(kl.BatchNormalization(name="first")(x))
    kind = reader.pop("kind", "Conv2D")
    args = {"filters": 6, "kernel_size": 3, "padding": padding, "name": "reader"}
    x = getattr(kl, kind)(use_bias=use_bias, **{**args, **reader})(x)
    if norm:
        x = kl.BatchNormalization(name="second")(x)
    x = kl.Flatten()(kl.ReLU()(x))
    return randomize(framework.Model(inputs, kl.Dense(4, name="head")(x)))


LOST = {"maker": [1, 4, 5]}
SINK = {True: "reader/bias", False: "second/moving_mean"}


@pytest.mark.parametrize("framework", [keras, tf_keras], ids=["keras", "tf_keras"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_without_padding_it_is_exact(framework, use_bias) -> None:
    """Sheet B5 step 4: bias += shift, or moving mean -= shift; 6e-8 there with VALID padding."""
    model = _zero_scales(_net("valid", use_bias, framework=framework), LOST)
    error, found = _error(model, LOST, images())
    assert error < ROUNDING
    assert list(found.values) == [SINK[use_bias]]
    assert found.exact == {"maker": True} and not found.reasons
    assert _error(model, LOST, images(), absorb=False)[0] > 1e3 * ROUNDING


@pytest.mark.parametrize("use_bias", [True, False])
def test_the_shift_is_the_papers(use_bias) -> None:
    """shift_o = sum_k relu(beta_k) sum_hw W[h, w, k, o], by hand in numpy."""
    model = _zero_scales(_net("same", use_bias), LOST)
    graph = analyse(model)
    found = absorbed(graph, _gone(graph, LOST))
    gone = LOST["maker"]
    a = np.maximum(np.asarray(model.get_layer("first").beta)[gone], 0)
    assert a.any()
    shift = np.einsum("k,hwko->o", a, np.asarray(model.get_layer("reader").kernel)[:, :, gone])
    layer, weight = SINK[use_bias].split("/")
    before = np.asarray(getattr(model.get_layer(layer), weight))
    after = before + shift if use_bias else before - shift
    # float32 against float64: 36 products
    np.testing.assert_allclose(found.values[SINK[use_bias]], after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_bias", [True, False])
def test_with_padding_the_border_differs(use_bias) -> None:
    """Sheet B5 step 4: .035 with SAME padding against .30 without absorption, there."""
    model = _zero_scales(_net("same", use_bias), LOST)
    graph = analyse(model)
    kept = _gone(graph, LOST)
    found = absorbed(graph, kept)
    assert found.exact == {"maker": False}
    assert "'reader', whose padded border" in found.reasons["maker"]
    assert "'reader', whose padded border" in str(found)
    # In front of the dense head: exact inside, not at the border, but better than nothing there.
    end = model.get_layer("second" if not use_bias else "reader").output
    part = keras.Model(model.input, [end, model.output])
    plans = [PruningPlan.of(graph, kept, values=values) for values in (found.values, None)]
    smaller = [plan.apply(model) for plan in plans]
    name = "second" if not use_bias else "reader"
    maps = [
        keras.Model(m.input, m.get_layer(name).output).predict(images(), verbose=0) for m in smaller
    ]
    expected = part.predict(images(), verbose=0)[0]
    errors = [np.abs(found_map - expected) for found_map in maps]
    assert errors[0][:, 1:-1, 1:-1].max() < ROUNDING * np.abs(expected).max()
    assert errors[0].max() > 1e3 * ROUNDING
    assert errors[0].mean() < errors[1].mean() / 2


@pytest.mark.parametrize(
    "reader",
    [
        {"kernel_size": 1, "padding": "same"},
        {"strides": 2},
        {"dilation_rate": 2},
        {"groups": 2},
        {"kind": "SeparableConv2D", "depth_multiplier": 2},
        {"kind": "SeparableConv2D", "kernel_size": 1, "padding": "same"},
    ],
    ids=["1x1", "strides", "dilation", "groups", "separable", "separable-1x1"],
)
def test_readers_that_are_exact(reader) -> None:
    # Grouped: the channels at one offset are one channel; 0 of 4 are positions 0 and 4.
    lost = {"maker": [0, 3]} if "groups" in reader else LOST
    model = _zero_scales(_net(**reader), lost)
    error, found = _error(model, lost, images())
    assert error < ROUNDING and all(found.exact.values()), str(found)
    assert list(found.values) == ["second/moving_mean"]
    assert _error(model, lost, images(), absorb=False)[0] > 1e3 * ROUNDING


def test_what_cannot_be_absorbed_is_reported() -> None:
    model = _zero_scales(_net(norm=False), LOST)
    error, found = _error(model, LOST, images())
    assert not found.values and error > 1e3 * ROUNDING
    assert "no bias nor a batch normalisation right behind" in found.reasons["maker"]
    model = _net()  # scales that are not zero
    error, found = _error(model, LOST, images())
    assert not found.values and error > 1e3 * ROUNDING
    assert found.reasons["maker"] == "3 channels not constant where 'reader' reads"


def test_a_layer_that_is_not_understood_takes_only_silent_channels() -> None:
    inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization(name="first")(layers.Conv2D(8, 3, name="maker")(inputs))
    x = layers.Conv2DTranspose(4, 2, strides=2, name="reader")(layers.ReLU()(x))
    model = randomize(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))))
    _zero_scales(model, LOST)
    beta = np.asarray(model.get_layer("first").beta).copy()
    beta[LOST["maker"]] = [-1, -1, 1]
    model.get_layer("first").beta.assign(beta)
    _, found = _error(model, LOST, images())
    assert found.reasons["maker"] == (
        "1 channel read by 'reader' (Conv2DTranspose), which cannot absorb a constant"
    )
    beta[5] = -1  # ReLU makes all three zero
    model.get_layer("first").beta.assign(beta)
    error, found = _error(model, LOST, images())
    assert error < ROUNDING and found.exact["maker"]


def test_a_normalisation_that_another_layer_reads_around_is_no_sink() -> None:
    """The reader's output goes elsewhere, too: the shift would be missed there."""
    inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, name="maker")(inputs))
    x = layers.Conv2D(4, 1, use_bias=False, name="reader")(layers.ReLU()(x))
    x = layers.Add()([x, layers.BatchNormalization()(x)])
    model = randomize(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))))
    _, found = _error(_zero_scales(model, LOST), LOST, images())
    assert not found.values and not found.exact["maker"]


def test_channels_first() -> None:
    """The axis of the normalisation is looked at, not taken for the last."""
    inputs = keras.Input((3, 8, 8))
    first = {"data_format": "channels_first"}
    x = layers.Conv2D(8, 3, name="maker", **first)(inputs)
    x = layers.ReLU()(layers.BatchNormalization(axis=1)(x))
    x = layers.Conv2D(6, 3, use_bias=False, name="reader", **first)(x)
    y = layers.BatchNormalization(axis=1, name="second")(x)
    model = randomize(keras.Model(inputs, layers.Dense(4)(layers.Flatten()(layers.ReLU()(y)))))
    x = np.moveaxis(images(), -1, 1)
    error, found = _error(_zero_scales(model, LOST), LOST, x)
    assert error < ROUNDING and list(found.values) == ["second/moving_mean"]
    inputs = keras.Input((6, 6, 3))  # normalised along a spatial axis of the same size
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 1, name="maker")(inputs)))
    x = layers.Conv2D(6, 1, use_bias=False, name="reader")(x)
    y = layers.BatchNormalization(axis=1)(x)
    model = randomize(keras.Model(inputs, layers.Dense(4)(layers.Flatten()(y))))
    _, found = _error(_zero_scales(model, LOST), LOST, images(size=6))
    assert not found.values


def test_residual_stream_and_several_readers() -> None:
    """Two normalisations on one stream; a 3x3, a 1x1 and, flattened, a dense layer read it."""
    inputs = keras.Input((8, 8, 3))
    norm = layers.BatchNormalization
    x = layers.ReLU()(norm()(layers.Conv2D(8, 3, use_bias=False, name="stem")(inputs)))
    y = layers.ReLU()(norm()(layers.Conv2D(8, 3, padding="same", use_bias=False, name="b")(x)))
    y = norm()(layers.Conv2D(8, 1, use_bias=False, name="c")(y))
    x = layers.ReLU()(layers.Add()([x, y]))
    left = layers.Conv2D(4, 3, name="left")(x)
    right = norm(name="mean")(layers.Conv2D(4, 1, use_bias=False, name="right")(x))
    ends = [layers.Flatten()(z) for z in (left, right, layers.AveragePooling2D(2)(x))]
    outputs = [layers.Dense(3, name=f"head{i}")(z) for i, z in enumerate(ends)]
    model = randomize(keras.Model(inputs, outputs))
    lost = {"stem": [0, 2, 7], "b": [3]}
    _zero_scales(model, lost)
    graph = analyse(model)
    assert {m.path for m in graph["stem"].members if m.masked} == {"b", "left", "right", "head2"}
    error, found = _error(model, lost, images())
    # 'b' reads the stream with padding, so the stream is not exact; 'c' has 1x1 kernels.
    assert found.exact == {"stem": False, "b": True}
    assert {"left/bias", "mean/moving_mean", "head2/bias"} < set(found.values)
    assert error < _error(model, lost, images(), absorb=False)[0] / 2
    # Without the block's channels that 'b' makes from the border, all is exact.
    kernel = model.get_layer("b").kernel
    value = np.asarray(kernel).copy()
    value[:, :, [0, 2, 7]] = 0
    kernel.assign(value)
    error, found = _error(model, lost, images())
    assert error < ROUNDING and all(found.exact.values())


def test_flatten_and_depthwise() -> None:
    """Behind a padded depthwise convolution a constant is none; behind a dense layer it is."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, name="maker")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="first")(x))
    sides = [
        layers.DepthwiseConv2D(3, padding=padding, name=padding)(x) for padding in ("valid", "same")
    ]
    outputs = [
        layers.Conv2D(4, 1, name=f"point_{n}")(z)
        for n, z in zip(("valid", "same"), sides, strict=True)
    ]
    outputs = [layers.Dense(3)(layers.Flatten()(z)) for z in outputs]
    model = randomize(keras.Model(inputs, outputs))
    _zero_scales(model, LOST)
    model.get_layer("first").beta.assign(np.ones(8))
    _, found = _error(model, LOST, images())
    assert list(found.values) == ["point_valid/bias"]
    assert found.reasons["maker"].endswith("not constant where 'point_same' reads")
    small = keras.Model(inputs, outputs[0])
    error, found = _error(small, LOST, images())
    assert error < ROUNDING and found.exact["maker"]


def test_a_gate_is_seen_through() -> None:
    """Channel times gate: what arrives varies although the channel's own layer is silent."""
    model = residual()
    _, found = _error(model, {"expand": [3]}, images())
    assert "not constant where 'project' reads" in found.reasons["expand"]


def test_means_of_what_is_not_constant() -> None:
    """With data: bias += sum_k mean(a_k) sum_hw W, over all batches; better than nothing."""
    model = _net(norm=False, use_bias=True)
    x = images(20)
    graph = analyse(model)
    kept = _gone(graph, LOST)
    found = absorbed(graph, kept, x, batch_size=7)
    assert found.reasons["maker"] == (
        "3 channels not constant where 'reader' reads, where their mean is absorbed"
    )
    relu = keras.Model(model.input, model.get_layer("reader").input).predict(x, verbose=0)
    mean = relu[..., LOST["maker"]].mean((0, 1, 2), dtype="float64")
    kernel = np.asarray(model.get_layer("reader").kernel)[:, :, LOST["maker"]]
    expected = np.asarray(model.get_layer("reader").bias) + np.einsum("k,hwko->o", mean, kernel)
    np.testing.assert_allclose(found.values["reader/bias"], expected, rtol=0, atol=1e-5)
    with_means, _ = _error(model, LOST, x, data=x)
    assert with_means < _error(model, LOST, x, absorb=False)[0]
    with pytest.raises(DataError):
        absorbed(graph, kept, images(size=9))


def test_means_of_constants_are_the_constants() -> None:
    model = _zero_scales(_net(), LOST)
    graph = analyse(model)
    kept = _gone(graph, LOST)
    by_data, by_probes = absorbed(graph, kept, images()), absorbed(graph, kept)
    assert by_data.exact == by_probes.exact == {"maker": True}
    for name, value in by_data.values.items():
        np.testing.assert_allclose(value, by_probes.values[name], rtol=1e-6)


def test_shared_and_nested_layers() -> None:
    """A layer that is called twice absorbs what is the same in both calls, by its bias only."""
    block_input = keras.Input((6, 6, 8))
    z = layers.Conv2D(4, 1, use_bias=False, name="reader")(block_input)
    z = layers.BatchNormalization(name="norm")(z)
    block = keras.Model(block_input, z, name="block")
    inputs = keras.Input((8, 8, 3))
    maker = layers.Conv2D(8, 3, name="maker")
    first = layers.ReLU()(layers.BatchNormalization(name="bn")(maker(inputs)))

    def build(times):
        ends = [layers.Flatten()(block(layers.Identity()(first))) for _ in range(times)]
        return keras.Model(inputs, [layers.Dense(2)(end) for end in ends])

    once = _zero_scales(randomize(build(1)), LOST)
    error, found = _error(once, LOST, images())
    assert error < ROUNDING and list(found.values) == ["block/norm/moving_mean"]
    twice = build(2)
    _, found = _error(twice, LOST, images())
    assert not found.values and not found.exact["maker"]


@pytest.mark.parametrize("reader", [{}, {"groups": 2}], ids=["plain", "groups"])
def test_emptied_channels_use_the_same_sinks(reader) -> None:
    """``remove_zero_channels`` puts constants into moving means, too."""
    model = _net(**reader)
    gone = [0, 4] if reader else [2]
    kernel = np.asarray(model.get_layer("maker").kernel).copy()
    kernel[..., gone] = 0
    model.get_layer("maker").kernel.assign(kernel)
    model.get_layer("first").beta.assign(np.full(8, 5.0))
    small = remove_zero_channels(model)
    assert small.get_layer("maker").filters == 8 - len(gone)
    before, after = (np.asarray(call_model(m, [images()])[0]) for m in (model, small))
    np.testing.assert_allclose(after, before, rtol=0, atol=ROUNDING * np.abs(before).max())


def test_nothing_lost_is_nothing_found() -> None:
    graph = analyse(_net())
    found = absorbed(graph, {"maker": range(8)})
    assert not found.values and not found.exact
    with pytest.raises(KeyError):
        absorbed(graph, {"nobody": [0]})


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_generated_networks(data) -> None:
    """Exact where it says so; the plan with the new values always passes the oracle."""
    model = draw_model(data.draw, max_ops=4)
    graph = analyse(model)
    names = [group.name for group in graph.prunable]
    lost = {
        name: [0] for name in data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    }
    for name in lost:
        for member in graph[name].members:
            # Everything that makes or follows these channels is zero: constants, if ever.
            if member.scored and not member.masked:
                value = np.asarray(member.variable).copy()
                index = [slice(None)] * value.ndim
                index[member.axis] = member.positions[member.channels == 0]
                value[tuple(index)] = 0
                member.variable.assign(value)
    kept = _gone(graph, lost)
    found = absorbed(graph, kept)
    plan = PruningPlan.of(graph, kept, values=found.values)
    assert tfprune.verify(model, plan)
    event(f"{len(lost)} groups, {sum(found.exact.values())} exact, {len(found.values)} values")
    if all(found.exact.values()):
        batch = [images(4, channels=int(x.shape[-1]), seed=7) for x in model.inputs]
        before, after = call_model(model, batch), call_model(plan.apply(model), batch)
        for a, b in zip(before, after, strict=True):
            a, b = np.asarray(a), np.asarray(b)
            # some ten layers
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())
