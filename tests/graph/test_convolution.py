"""Convolutions of every kind, in both data formats, and pooling between them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tf_keras

from tfprune.errors import ModelError
from tfprune.graph import analyse

from .oracle import assert_masked_equals_pruned, chain

FRAMEWORKS = [keras, tf_keras]


def _tail(layers: Any) -> list[Any]:
    return [layers.Flatten(), layers.Dense(3, name="last")]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_plain_and_transposed_convolutions(framework: Any, rank: int) -> None:
    layers = framework.layers
    plain = getattr(layers, f"Conv{rank}D")
    transposed = getattr(layers, f"Conv{rank}DTranspose")
    small = assert_masked_equals_pruned(
        chain(
            framework,
            (*[6] * rank, 2),
            plain(8, 3, activation="relu", name="a"),
            layers.BatchNormalization(name="bn"),
            transposed(6, 3, strides=2, activation="tanh", name="b"),
            plain(4, 2, use_bias=False, strides=2, name="c"),
            *_tail(layers),
        ),
        {"a", "b", "c"},
    )
    assert small.get_layer("b").filters == 3
    assert tuple(small.get_layer("b").kernel.shape[-2:]) == (3, 4)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("rank", [1, 2])
def test_depthwise_and_separable_convolutions(framework: Any, multiplier: int, rank: int) -> None:
    layers = framework.layers
    depthwise = getattr(layers, f"DepthwiseConv{rank}D")
    separable = getattr(layers, f"SeparableConv{rank}D")
    small = assert_masked_equals_pruned(
        chain(
            framework,
            (*[8] * rank, 2),
            getattr(layers, f"Conv{rank}D")(8, 3, name="a"),
            depthwise(3, depth_multiplier=multiplier, activation="relu", name="dw"),
            layers.BatchNormalization(),
            separable(6, 3, depth_multiplier=multiplier, name="b"),
            *_tail(layers),
        ),
        {"a", "b"},
    )
    assert int(small.get_layer("b").depthwise_kernel.shape[-2]) == 4 * multiplier


@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_depthwise_convolution_of_the_raw_input_stays(multiplier: int) -> None:
    layers = keras.layers
    model = chain(
        keras, (6, 6, 3), layers.DepthwiseConv2D(3, depth_multiplier=multiplier),
        layers.Conv2D(6, 1, name="a"), *_tail(layers),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"a"})


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_groups_lose_the_same_offsets(framework: Any) -> None:
    layers = framework.layers
    small = assert_masked_equals_pruned(
        chain(
            framework,
            (6, 6, 2),
            layers.Conv2D(8, 3, name="a"),
            layers.Conv2D(12, 3, groups=2, name="grouped"),
            *_tail(layers),
        ),
        {"a", "grouped"},
    )
    assert tuple(small.get_layer("grouped").kernel.shape) == (3, 3, 2, 6)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_group_per_channel_is_a_depthwise_convolution(framework: Any) -> None:
    layers = framework.layers
    small = assert_masked_equals_pruned(
        chain(
            framework,
            (6, 6, 2),
            layers.Conv2D(8, 3, name="a"),
            layers.Conv2D(16, 3, groups=8, name="grouped"),
            *_tail(layers),
        ),
        {"a"},
    )
    assert small.get_layer("grouped").groups == 4
    assert small.get_layer("grouped").filters == 8


def test_channels_first() -> None:
    # No width equals a number of channels: keras.ops.add (3.15, TensorFlow) takes (1, n, 1, 1) for
    # a bias of the last axis if that has size n, and the layers would add it to the wrong axis.
    layers = keras.layers
    first = {"data_format": "channels_first"}
    model = chain(
        keras,
        (2, 17, 15),
        layers.Conv2D(8, 3, name="a", **first),
        layers.BatchNormalization(axis=1),
        layers.DepthwiseConv2D(3, **first),
        layers.MaxPooling2D(2, padding="same", **first),
        layers.UpSampling2D(2, **first),
        layers.ZeroPadding2D(1, **first),
        layers.Cropping2D(1, **first),
        layers.SeparableConv2D(6, 1, name="b", **first),
        layers.SpatialDropout2D(0.5, **first),
        layers.Conv2DTranspose(4, 2, name="c", **first),
        layers.PReLU(shared_axes=(2, 3)),
        layers.Flatten(**first),
        layers.Dense(3),
    )
    assert_masked_equals_pruned(model, {"a", "b", "c"})


@pytest.mark.parametrize("keepdims", [False, True])
def test_global_pooling_in_both_formats(keepdims: bool) -> None:
    layers = keras.layers
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(8, 3, name="a")(inputs)
    last = layers.GlobalAveragePooling2D(keepdims=keepdims)(x)
    first = layers.GlobalMaxPooling2D(keepdims=keepdims, data_format="channels_first")(
        layers.Permute((3, 1, 2))(x)
    )
    outputs = [layers.Dense(3)(layers.Flatten()(y)) for y in (last, first)]
    assert_masked_equals_pruned(keras.Model(inputs, outputs), {"a"})


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_spatial_layers_let_channels_pass(framework: Any, rank: int) -> None:
    layers = framework.layers

    def of(kind: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(layers, f"{kind}{rank}D")(*args, **kwargs)

    model = chain(
        framework,
        (*[8] * rank, 2),
        of("Conv", 8, 1, name="a"),
        of("MaxPooling", 2),
        of("UpSampling", 2),
        of("AveragePooling", 2, strides=1),
        of("ZeroPadding", 1),
        of("Cropping", 1),
        of("SpatialDropout", 0.3),
        of("GlobalMaxPooling"),
        layers.Dense(3),
    )
    assert_masked_equals_pruned(model, {"a"})


def test_adaptive_pooling() -> None:
    layers = keras.layers
    model = chain(
        keras, (8, 8, 2), layers.Conv2D(8, 1, name="a"), layers.AdaptiveAveragePooling2D(4),
        layers.AdaptiveMaxPooling2D(2), *_tail(layers),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"a"})


def test_pooling_over_an_axis_of_channels_freezes_them() -> None:
    layers = keras.layers
    model = chain(
        keras, (6, 8), layers.Dense(8, name="a"), layers.Permute((2, 1)),
        layers.MaxPooling1D(3, strides=1, padding="same"), *_tail(layers),
    )  # fmt: skip
    assert_masked_equals_pruned(model, set())
    assert "MaxPooling1D" in analyse(model)["a"].reason


def test_softmax_over_positions_lets_channels_pass() -> None:
    layers = keras.layers
    model = chain(
        keras, (6, 6, 2), layers.Conv2D(8, 3, name="a"), layers.Softmax(axis=[1, 2]),
        layers.Conv2D(6, 1, activation="softmax", name="b"), *_tail(layers),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"a"})
    assert "softmax" in analyse(model)["b"].reason


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_layer_as_activation(framework: Any) -> None:
    layers = framework.layers
    model = chain(
        framework, (6, 6, 2), layers.Conv2D(8, 3, activation=layers.LeakyReLU(), name="a"),
        layers.Conv2D(6, 3, activation=layers.Softmax(), name="b"), *_tail(layers),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"a"})


def test_a_layer_with_weights_as_activation() -> None:
    layers = tf_keras.layers
    tail = [layers.Flatten(), layers.Dense(3)]
    model = chain(
        tf_keras, (6, 6, 2), layers.Conv2D(8, 3, activation=layers.PReLU(), name="a"), *tail
    )
    small = assert_masked_equals_pruned(model, {"a"})
    assert tuple(small.get_layer("a").activation.alpha.shape) == (4, 4, 4)


def test_keras_3_builds_such_activations_too_late() -> None:
    layers = keras.layers
    model = chain(
        keras, (6, 6, 2), layers.Conv2D(8, 3, activation=layers.PReLU(), name="a"), *_tail(layers)
    )
    with pytest.raises(ModelError, match=r"PReLU as the activation of 'a'.*layer of its own"):
        analyse(model)


def test_macs_of_convolutions() -> None:
    layers = keras.layers
    graph = analyse(
        chain(
            keras,
            (8, 8, 2),
            layers.Conv2D(8, 3, name="plain"),
            layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise"),
            layers.SeparableConv2D(6, 1, name="separable"),
            layers.Conv2DTranspose(4, 2, strides=2, name="transposed"),
            layers.Conv2D(8, 1, groups=2, name="grouped"),
            *_tail(layers),
        )
    )
    macs: dict[str, float] = {}
    for term in graph.record.macs:
        value = (term.coefficient or 0) * float(np.prod([len(f) for f in term.factors]))
        macs[term.path] = macs.get(term.path, 0) + value
    assert macs["plain"] == 6 * 6 * 9 * 2 * 8
    assert macs["depthwise"] == 4 * 4 * 9 * 16
    assert macs["separable"] == 4 * 4 * (16 + 16 * 6)
    assert macs["transposed"] == 4 * 4 * 4 * 6 * 4
    assert macs["grouped"] == 8 * 8 * (4 / 2) * 8
