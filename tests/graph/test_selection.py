"""Concatenation, splitting, slicing, padding, gathering, stacking; reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from tfprune.graph import analyse

from .oracle import assert_masked_equals_pruned, chain

FRAMEWORKS = [keras, tf_keras]
ops = keras.ops


def _model(framework: Any, *middle: Any) -> Any:
    layers = framework.layers
    return chain(
        framework, (5, 6), layers.Dense(8, name="a"), *middle, layers.Flatten(),
        layers.Dense(3, name="last"),
    )  # fmt: skip


def _join(parts: list[Any]) -> Any:
    """Reads all parts, which may be of different widths, in another order."""
    return ops.concatenate(parts[::-1], axis=-1)


# What follows cuts the kept channels in two places: seed 0 keeps some on either side.
@pytest.mark.parametrize(
    "function",
    [
        lambda x: _join(ops.split(x, 2, axis=-1)),
        lambda x: _join(ops.split(x, [3, 5], axis=2)),
        lambda x: _join(list(ops.array_split(x, 3, axis=-1))),
        lambda x: _join([x[:, :, :5], x[..., 4:]]),
        lambda x: _join([x[:, 1:, :5], x[:, :4, -6:]]),
        lambda x: x[:, 2],
        lambda x: x[:, None, ::2, 1:],
        lambda x: ops.pad(x, ((0, 0), (1, 1), (2, 3)), constant_values=0.5),
        lambda x: ops.pad(x, ((0, 0), (2, 1), (0, 0)), mode="reflect"),
        lambda x: ops.take(x, np.array([5, 1, 1, -2, 7, 0]), axis=-1),
        lambda x: ops.stack([x, x * 2], axis=1),
        lambda x: ops.stack([x, x * 2], axis=-1),
        lambda x: _join(ops.unstack(x, axis=1)),
        lambda x: ops.glu(x, axis=-1),
        lambda x: ops.hstack([x, x]),
        lambda x: ops.append(x, x, axis=-1),
        lambda x: ops.concatenate(ops.hsplit(x, [2])[::-1], axis=1),
        lambda x: _join(ops.dsplit(x, 2)),
    ],
)
def test_selecting_operations(function: Callable[[Any], Any]) -> None:
    assert_masked_equals_pruned(_model(keras, function), {"a"})


@pytest.mark.parametrize(
    "function",
    [
        lambda x: tf.concat(tf.split(x, 2, axis=-1)[::-1], -1),
        lambda x: tf.concat(tf.split(value=x, num_or_size_splits=[3, 5], axis=2), axis=-1),
        lambda x: tf.concat([x[:, :, :5], x[..., 4:]], axis=-1),
        lambda x: x[:, 2],
        lambda x: x[:, tf.newaxis, ::2, 1:],
        lambda x: tf.pad(x, [[0, 0], [1, 1], [2, 3]]),
        lambda x: tf.pad(x, paddings=[[0, 0], [2, 1], [0, 0]], mode="REFLECT"),
        lambda x: tf.gather(x, [7, 6, 5, 4, 3, 2, 1, 0, 0], axis=-1),
        lambda x: tf.gather(x, indices=np.array([5, 1, 3, 2, 3, 4]), axis=2),
        lambda x: tf.stack([x, x * 2.0], axis=1),
    ],
)
def test_selecting_functions_of_tensorflow(function: Callable[[Any], Any]) -> None:
    assert_masked_equals_pruned(_model(tf_keras, function), {"a"})


def test_picking_one_channel_freezes_it_alone() -> None:
    layers = keras.layers
    inputs = keras.Input((6,))
    x = layers.Dense(8, name="a")(inputs)
    y = ops.expand_dims(x[:, 3], -1)
    model = keras.Model(inputs, layers.Dense(3)(layers.Concatenate()([x, y])))
    graph = analyse(model)
    assert [group.width for group in graph.groups if group.prunable] == [7]
    assert any("picked by its index" in group.reason for group in graph.groups)
    assert_masked_equals_pruned(model)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x[:, :, ::2], "with a step"),
        (lambda x: ops.unstack(x, axis=2)[0], "unstacked"),
        (lambda x: ops.pad(x, ((0, 0), (0, 0), (1, 1)), mode="symmetric"), "symmetric"),
        (lambda x: ops.take(x, np.array([[0, 1]]), axis=-1), "cannot be followed"),
        (lambda x: ops.take_along_axis(x, ops.argsort(x), axis=-1), "mixes"),
        (lambda x: ops.sum(x, axis=-1), "reduces"),
        (lambda x: ops.cumsum(x, axis=-1), "mixes"),
        (lambda x: ops.cumsum(x), "mixes"),
        (lambda x: ops.softmax(x), "mixes"),
        (lambda x: ops.sort(x), "mixes"),
        (lambda x: ops.top_k(x, 2)[0], "mixes"),
        (lambda x: ops.normalize(x), "mixes"),
        (lambda x: ops.logsumexp(x, axis=(1, 2)), "reduces"),
        (lambda x: ops.one_hot(ops.cast(x > 0, "int32"), 2), "raw data"),
    ],
)
def test_what_needs_all_channels_freezes_them(function: Callable[[Any], Any], reason: str) -> None:
    model = _model(keras, function)
    assert_masked_equals_pruned(model, set())
    assert any(reason in group.reason for group in analyse(model).groups if group.name[0] == "a")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.mean(x, axis=1),
        lambda x: ops.max(x, axis=-2, keepdims=True),
        lambda x: ops.sum(x, axis=(1,)),
        lambda x: ops.std(x, axis=1) + ops.var(x, axis=1) + ops.prod(x, axis=1),
        lambda x: ops.norm(x, axis=1),
        lambda x: ops.moments(x, axes=[1])[1],
        lambda x: ops.softmax(x, axis=1),
        lambda x: ops.cumsum(x, axis=1),
        lambda x: ops.top_k(ops.swapaxes(x, 1, 2), 2)[0],
        lambda x: ops.sort(x, axis=1),
        lambda x: ops.median(x, axis=1),
        lambda x: ops.diff(x, axis=1),
    ],
)
def test_reductions_over_steps_let_channels_pass(function: Callable[[Any], Any]) -> None:
    assert_masked_equals_pruned(_model(keras, function), {"a"})


@pytest.mark.parametrize(
    ("function", "passes"),
    [
        (lambda x: tf.reduce_mean(x, axis=1), True),
        (lambda x: tf.reduce_max(x, axis=-2, keepdims=True), True),
        (lambda x: tf.nn.softmax(x, axis=1), True),
        (lambda x: tf.nn.softmax(x), False),
        (lambda x: tf.reduce_sum(x, axis=-1), False),
        (lambda x: tf.math.l2_normalize(x), False),
        (lambda x: tf.cast(tf.argmax(x, axis=1), "float32"), True),
    ],
)
def test_reductions_of_tensorflow(function: Callable[[Any], Any], passes: bool) -> None:
    assert_masked_equals_pruned(_model(tf_keras, function), {"a"} if passes else set())


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_concatenation_with_the_input(framework: Any) -> None:
    layers = framework.layers
    inputs = framework.Input((6,))
    x = layers.Dense(8, name="a")(inputs)
    x = layers.Concatenate(axis=1)([inputs, x, inputs])
    model = framework.Model(inputs, layers.Dense(3)(x))
    small = assert_masked_equals_pruned(model, {"a"})
    assert tuple(small.layers[-1].kernel.shape) == (6 + 4 + 6, 3)
