"""Reductions over the channels: statistics are taken without removed ones, others freeze."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from tfprune.graph import analyse
from tfprune.graph.plan import PruningPlan

from .oracle import assert_masked_equals_pruned, chain

ops = keras.ops


@pytest.mark.parametrize("axis", [-1, (1, 3), (1, 2, 3)])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("function", [ops.mean, ops.max, ops.amin, ops.std, ops.var])
def test_statistics(function: Callable[..., Any], keepdims: bool, axis: Any) -> None:
    model = chain(
        keras, (4, 4, 3), keras.layers.Conv2D(8, 1, name="conv"),
        lambda x: function(x, axis=axis, keepdims=keepdims),
        lambda x: ops.reshape(x, (-1, 16 if axis == -1 else 4 if axis == (1, 3) else 1)),
        keras.layers.Dense(3, name="head"),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"conv"})
    group = analyse(model)["conv"]
    assert not group.exact
    assert "over the channels" in group.inexact_reason


@pytest.mark.parametrize("function", [tf.reduce_mean, tf.reduce_max, tf.math.reduce_std])
def test_statistics_of_tf_keras(function: Callable[..., Any]) -> None:
    layers = tf_keras.layers
    inputs = tf_keras.Input((4, 4, 3))
    x = layers.Conv2D(8, 1, name="conv")(inputs)
    gate = layers.Conv2D(1, 3, padding="same", name="gate")(function(x, axis=-1, keepdims=True))
    x = layers.Flatten()(x * gate)
    assert_masked_equals_pruned(tf_keras.Model(inputs, layers.Dense(3)(x)), {"conv"})


def test_the_mean_is_that_of_the_kept_channels() -> None:
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(6, name="hidden")(inputs)
    model = keras.Model(inputs, ops.mean(hidden, axis=-1, keepdims=True))
    small = PruningPlan.of(analyse(model), {"hidden": [0, 3, 5]}).apply(model)
    x = np.random.default_rng(0).standard_normal((5, 4)).astype("float32")
    expected = (x @ np.asarray(model.get_layer("hidden").kernel))[:, [0, 3, 5]].mean(1)
    # Float32: sums of a few terms of order one.
    np.testing.assert_allclose(np.asarray(small(x))[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize("function", [ops.sum, ops.prod, ops.argmax, ops.logsumexp, ops.median])
def test_other_reductions_freeze(function: Callable[..., Any]) -> None:
    model = chain(
        keras, (4, 6), keras.layers.Dense(8, name="hidden"),
        lambda x: ops.cast(function(x, axis=-1), "float32"), keras.layers.Dense(3),
    )  # fmt: skip
    group = analyse(model)["hidden"]
    assert not group.prunable
    assert "reduces over the channels" in group.reason
