"""Reshape, flatten, permute, repeat, tile and their kin; the block splitting behind them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given
from hypothesis import strategies as st

from tfprune.graph import analyse
from tfprune.graph.rules.reshape import blocks

from .oracle import assert_masked_equals_pruned, chain

FRAMEWORKS = [keras, tf_keras]
ops = keras.ops


def _model(framework: Any, *middle: Any, shape: tuple[int | None, ...] = (4, 6, 2)) -> Any:
    """Eight labelled channels, ``middle``, and something that reads whatever comes out."""
    layers = framework.layers
    first = layers.Conv2D(8, 1, name="a") if len(shape) == 3 else layers.Dense(8, name="a")
    return chain(framework, shape, first, *middle, layers.Dense(3, name="last"))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    "target",
    [
        (24, 8), (-1, 8), (2, 2, 6, 8), (4, 48), (192,), (6, 4, 8), (4, 6, 2, 4), (4, 6, 8, 1),
        (1, 4, 6, 8), (4, 12, 4),
    ],
)  # fmt: skip
def test_reshape(framework: Any, target: tuple[int, ...]) -> None:
    layers = framework.layers
    assert_masked_equals_pruned(_model(framework, layers.Reshape(target), layers.Flatten()), {"a"})


@pytest.mark.parametrize(
    "target", [(-1, 24, 8), (-1, 4, 6, 2, 4), (-1, 192)]
)  # fmt: skip
def test_operations_that_reshape(target: tuple[int, ...]) -> None:
    assert_masked_equals_pruned(_model(keras, lambda x: ops.reshape(x, target)), {"a"})
    assert_masked_equals_pruned(_model(tf_keras, lambda x: tf.reshape(x, target)), {"a"})


def test_a_reshape_that_mixes_the_batch_freezes() -> None:
    model = _model(keras, lambda x: ops.reshape(x, (-1, 8)))
    assert_masked_equals_pruned(model, set())
    assert "not known" in analyse(model)["a"].reason


def test_a_reshape_with_a_free_size() -> None:
    layers = keras.layers
    model = _model(keras, layers.Reshape((-1, 2, 4)), layers.Reshape((-1, 8)), shape=(None, 6))
    assert_masked_equals_pruned(model, {"a"})


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_flatten_behind_two_labelled_axes_keeps_one(framework: Any) -> None:
    layers = framework.layers
    model = chain(
        framework, (5, 6), layers.EinsumDense("abc,cde->abde", (5, 4, 8), name="a"),
        layers.Flatten(), layers.Dense(3),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"a#2"})


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_flatten(framework: Any, data_format: str) -> None:
    assert_masked_equals_pruned(_model(framework, framework.layers.Flatten(data_format)), {"a"})


@pytest.mark.parametrize(
    ("function", "tf_function"),
    [
        (lambda x: ops.transpose(x, (0, 3, 1, 2)), lambda x: tf.transpose(x, (0, 3, 1, 2))),
        (lambda x: ops.moveaxis(x, -1, 1), None),
        (lambda x: ops.moveaxis(x, (1, 2), (2, 3)), None),
        (lambda x: ops.swapaxes(x, -1, 1), None),
        (lambda x: ops.expand_dims(x, -2), lambda x: tf.expand_dims(x, -2)),
        (lambda x: ops.expand_dims(x, (1, -1)), None),
        (lambda x: ops.squeeze(x[:, :, :1], 2), lambda x: tf.squeeze(x[:, :, :1], 2)),
        (lambda x: ops.repeat(x, 2, axis=-1), lambda x: tf.repeat(x, 2, axis=-1)),
        (lambda x: ops.repeat(x, 2, axis=1), lambda x: tf.repeat(x, 2, axis=1)),
        (lambda x: ops.tile(x, (1, 1, 2, 3)), lambda x: tf.tile(x, (1, 1, 2, 3))),
        (lambda x: ops.flip(x, axis=-1), lambda x: tf.reverse(x, [-1])),
        (lambda x: ops.fliplr(x), None),
        (lambda x: ops.roll(x, 1, axis=1), lambda x: tf.roll(x, 1, axis=1)),
        (lambda x: ops.broadcast_to(ops.mean(x, 1, keepdims=True), (2, 4, 6, 8)), None),
    ],
)
def test_axes_move_with_their_labels(
    function: Callable[[Any], Any], tf_function: Callable[[Any], Any] | None
) -> None:
    flatten = keras.layers.Flatten()
    assert_masked_equals_pruned(_model(keras, function, flatten), {"a"})
    if tf_function is not None:
        flatten = tf_keras.layers.Flatten()
        assert_masked_equals_pruned(_model(tf_keras, tf_function, flatten), {"a"})


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: ops.roll(x, 1, axis=-1), "rolled"),
        (lambda x: ops.repeat(x, np.arange(1, 9), axis=-1), "different number"),
        (lambda x: ops.broadcast_to(x[..., :1], (2, 4, 6, 8)), "broadcast"),
    ],
)
def test_what_cannot_be_followed_says_so(function: Callable[[Any], Any], reason: str) -> None:
    assert reason in analyse(_model(keras, function))["a"].reason


@pytest.mark.parametrize(
    ("pattern", "lengths", "prunable"),
    [
        ("b h w c -> b (h w) c", {}, True),
        ("b h w (g c) -> b (g h) w c", {"g": 2}, True),
        ("b h w (g c) -> b g (h w c)", {"c": 4}, True),
        ("b h w c -> (b h) w c", {}, False),
    ],
)
def test_rearranging_by_a_pattern(pattern: str, lengths: dict[str, int], prunable: bool) -> None:
    # Keras can only do it symbolically where the batch has a given size.
    layers = keras.layers
    inputs = keras.Input(batch_shape=(2, 4, 6, 2))
    x = ops.rearrange(layers.Conv2D(8, 1, name="a")(inputs), pattern, **lengths)
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))
    assert_masked_equals_pruned(model, {"a"} if prunable else set())


def test_permute_and_repeat_vector() -> None:
    layers = keras.layers
    assert_masked_equals_pruned(_model(keras, layers.Permute((3, 1, 2)), layers.Flatten()), {"a"})
    assert_masked_equals_pruned(_model(keras, layers.RepeatVector(4), shape=(6,)), {"a"})


def test_depth_and_space() -> None:
    def there_and_back(x: Any) -> Any:
        return tf.nn.space_to_depth(tf.nn.depth_to_space(x, 2), 4)

    flatten = tf_keras.layers.Flatten()
    assert_masked_equals_pruned(_model(tf_keras, there_and_back, flatten, shape=(4, 8, 2)), {"a"})
    assert_masked_equals_pruned(
        _model(keras, lambda x: ops.depth_to_space(x, 2), keras.layers.Flatten()), {"a"}
    )


def test_a_reshape_shared_by_two_tensors() -> None:
    layers = keras.layers
    inputs = keras.Input((6,))
    reshape = layers.Reshape((2, 4))
    a, b = (reshape(layers.Dense(8, name=name)(inputs)) for name in ("a", "b"))
    x = layers.Concatenate(axis=1)([a, b])
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))
    assert len(analyse(model).prunable) == 1
    assert_masked_equals_pruned(model)


_SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=5)


@given(_SHAPES, st.randoms(use_true_random=False))
def test_blocks_cover_both_shapes_in_order(source: list[int], random: Any) -> None:
    factors = [p for size in source for p in {4: [2, 2], 6: [2, 3], 1: [1]}.get(size, [size])]
    target: list[int] = []
    for factor in factors:
        if target and random.random() < 0.5:
            target[-1] *= factor
        else:
            target.append(factor)
    runs = blocks(source, target)
    assert runs is not None
    assert [axis for left, _ in runs for axis in left] == list(range(len(source)))
    assert [axis for _, right in runs for axis in right] == list(range(len(target)))
    for left, right in runs:
        assert math.prod(source[a] for a in left) == math.prod(target[a] for a in right)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ((4, 6), (4, 6), [((0,), (0,)), ((1,), (1,))]),
        ((4, 6), (24,), [((0, 1), (0,))]),
        ((None, 6), (None, 2, 3), [((0,), (0,)), ((1,), (1, 2))]),
        ((4, 6), (6, 4), [((0, 1), (0, 1))]),
        ((8,), (1, 1, 8), [((0,), (0, 1, 2))]),
    ],
)
def test_blocks(source: Any, target: Any, expected: Any) -> None:
    runs = blocks(source, target)
    assert runs is not None
    assert [(tuple(left), tuple(right)) for left, right in runs] == expected


@pytest.mark.parametrize(("source", "target"), [((None, 6), (12,)), ((4, 6), (5, 5))])
def test_blocks_of_shapes_that_do_not_match(source: Any, target: Any) -> None:
    assert blocks(source, target) is None
