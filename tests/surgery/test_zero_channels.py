"""Channels that weight pruning has emptied go, and the outputs stay."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tf_keras

from tests.toys import chain, images, residual
from tfprune import zoo
from tfprune.errors import ModelError
from tfprune.graph import analyse
from tfprune.surgery import empty_channels, remove_zero_channels
from tfprune.testing import randomize

layers = keras.layers
# Removing zeros changes nothing but the order of sums; absorbing a constant adds one rounding.
ROUNDING = 1e-6


def _zero(model, name, axis, positions, weight="kernel"):
    variable = getattr(model.get_layer(name), weight)
    value = np.asarray(variable).copy()
    index = [slice(None)] * value.ndim
    index[axis] = positions
    value[tuple(index)] = 0
    variable.assign(value)


def _set(model, name, weight, positions, values):
    variable = getattr(model.get_layer(name), weight)
    value = np.asarray(variable).copy()
    value[positions] = values
    variable.assign(value)


def _same(model, small, x):
    before, after = model.predict(x, verbose=0), small.predict(x, verbose=0)
    np.testing.assert_allclose(after, before, rtol=0, atol=ROUNDING * np.abs(before).max())


def _padded(padding="valid", use_bias=True):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", name="maker")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU()(x)
    x = layers.Conv2D(6, 3, padding=padding, use_bias=use_bias, name="reader")(x)
    x = layers.Flatten()(x)
    return randomize(keras.Model(inputs, layers.Dense(4, name="head")(x)))


def test_unread_channels_go() -> None:
    model = _padded()
    _zero(model, "reader", 2, [1, 5])
    small = remove_zero_channels(model)
    assert small.get_layer("maker").filters == 6
    _same(model, small, images())


def test_silent_channels_go_whatever_reads_them() -> None:
    model = _padded("same", use_bias=False)
    _zero(model, "maker", 3, [0, 7])
    _set(model, "norm", "beta", [0, 7], -100.0)  # ReLU then gives exact zeros
    small = remove_zero_channels(model)
    assert small.get_layer("maker").filters == 6
    _same(model, small, images())


def test_constants_are_absorbed_where_that_is_exact() -> None:
    model = _padded("valid")
    _zero(model, "maker", 3, [2])
    _set(model, "norm", "beta", [2], 100.0)
    small = remove_zero_channels(model)
    assert small.get_layer("maker").filters == 7
    assert not np.allclose(small.get_layer("reader").bias, model.get_layer("reader").bias)
    _same(model, small, images())


@pytest.mark.parametrize(("padding", "use_bias"), [("same", True), ("valid", False)])
def test_constants_stay_where_it_is_not(padding, use_bias) -> None:
    model = _padded(padding, use_bias)
    _zero(model, "maker", 3, [2])
    _set(model, "norm", "beta", [2], 100.0)
    found = empty_channels(model)
    assert not found.count
    assert found.staying["maker"].startswith("1 stay: constant, and 'reader' cannot absorb it")
    assert found.staying["maker"] in str(found)
    small = remove_zero_channels(model)
    assert small.get_layer("maker").filters == 8
    _same(model, small, images())


def test_constants_behind_a_flatten_go_into_the_dense_bias() -> None:
    model = _padded()
    _zero(model, "reader", 3, [3])
    _set(model, "reader", "bias", [3], 2.5)
    small = remove_zero_channels(model)
    assert small.get_layer("head").kernel.shape == (6 * 6 * 5, 4)
    _same(model, small, images())


def test_one_removal_makes_the_next_possible() -> None:
    inputs = keras.Input((5,))
    x = layers.Dense(6, activation="relu", name="a")(inputs)
    x = layers.Dense(4, activation="relu", name="b")(x)
    model = randomize(keras.Model(inputs, layers.Dense(2, name="c")(x)))
    _zero(model, "c", 0, [1])
    # a's unit 3 is read by b's unit 1 only, which nobody reads
    kernel = np.asarray(model.get_layer("b").kernel).copy()
    kernel[3, [0, 2, 3]] = 0
    model.get_layer("b").kernel.assign(kernel)
    assert empty_channels(model).count == 1
    small = remove_zero_channels(model)
    assert [small.get_layer(name).units for name in "abc"] == [5, 3, 2]
    _same(model, small, np.random.default_rng(0).standard_normal((9, 5)).astype("float32"))


def test_a_residual_channel_goes_only_when_all_who_make_it_are_zero() -> None:
    model = residual()
    _zero(model, "stem", 3, [4])
    _set(model, "stem_norm", "beta", [4], -100.0)
    assert not empty_channels(model).count  # the projection makes it too
    _zero(model, "project", 3, [4])
    _set(model, "project", "bias", [4], 0.0)
    small = remove_zero_channels(model)
    assert small.get_layer("stem").filters == small.get_layer("project").filters == 15
    _same(model, small, images())


def test_a_whole_layer_keeps_one_channel() -> None:
    model = _padded()
    _zero(model, "reader", 2, slice(None))
    small = remove_zero_channels(model)
    assert small.get_layer("maker").filters == 1
    _same(model, small, images())


def test_layer_normalisation_keeps_its_channels() -> None:
    inputs = keras.Input((6,))
    x = layers.Dense(8, name="maker")(inputs)
    x = layers.LayerNormalization()(x)
    model = randomize(keras.Model(inputs, layers.Dense(3, name="head")(x)))
    _zero(model, "head", 0, [1])
    found = empty_channels(model)
    assert not found.count
    assert "1 stay" in found.staying["maker"]


@pytest.mark.parametrize("name", ["resnet20", "vgg", "mobilenet"])
def test_pruned_networks(name) -> None:
    """Real architectures, random channels emptied on both sides."""
    model = {
        "resnet20": lambda: zoo.resnet_cifar(20),
        "vgg": lambda: zoo.vgg_cifar(11),
        "mobilenet": lambda: keras.applications.MobileNetV2((32, 32, 3), 0.35, weights=None),
    }[name]()
    randomize(model)
    random = np.random.default_rng(0)
    graph = analyse(model)
    emptied = 0
    for group in graph.prunable:
        gone = random.random(group.width) < 0.3
        gone[0] = False
        for member in group.members:
            if member.masked:
                value = np.asarray(member.variable).copy()
                index = [slice(None)] * value.ndim
                index[member.axis] = member.positions[gone[member.channels]]
                value[tuple(index)] = 0
                member.variable.assign(value)
        emptied += int(gone.sum()) if group.exact else 0
    found = empty_channels(model)
    assert found.count >= emptied > 50
    small = remove_zero_channels(model)
    assert small.count_params() < 0.75 * model.count_params()
    x = images(4, 32)
    before, after = model.predict(x, verbose=0), small.predict(x, verbose=0)
    # float32 rounding over some 50 layers, as in tests/equivalence
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_nothing_to_remove_gives_a_copy() -> None:
    model = chain()
    small = remove_zero_channels(model)
    assert small is not model
    for a, b in zip(model.weights, small.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_source_stays_as_it_is() -> None:
    model = _padded()
    _zero(model, "maker", 3, [2])
    before = [np.asarray(weight).copy() for weight in model.weights]
    remove_zero_channels(model)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(np.asarray(weight), value)


def test_models_of_keras2() -> None:
    model = tf_keras.Sequential(
        [
            tf_keras.layers.InputLayer((5,)),
            tf_keras.layers.Dense(6, activation="relu", name="a"),
            tf_keras.layers.Dense(3, name="b"),
        ]
    )
    _zero(model, "a", 1, [0, 2])
    _set(model, "a", "bias", [0], 1.5)
    small = remove_zero_channels(model)
    assert small.get_layer("a").units == 4
    _same(model, small, np.random.default_rng(0).standard_normal((9, 5)).astype("float32"))


def test_weights_that_are_nan_are_refused() -> None:
    model = chain()
    _set(model, "head", "bias", [0], np.nan)
    with pytest.raises(ModelError, match="finite weights"):
        remove_zero_channels(model)
