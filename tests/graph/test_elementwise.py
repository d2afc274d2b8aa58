"""Operations on single values, merges, and what they meet."""

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


def _two_branches(framework: Any, merge: Callable[[Any, Any], Any]) -> Any:
    layers = framework.layers
    inputs = framework.Input((6, 6, 2))
    a = layers.Conv2D(8, 3, name="a")(inputs)
    b = layers.Conv2D(8, 3, name="b")(inputs)
    x = layers.Flatten()(merge(a, b))
    return framework.Model(inputs, layers.Dense(3, name="last")(x))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", ["Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"])
def test_merges_unite_channels(framework: Any, name: str) -> None:
    model = _two_branches(framework, lambda a, b: getattr(framework.layers, name)()([a, b]))
    assert len(analyse(model).prunable) == 1
    small = assert_masked_equals_pruned(model)
    assert small.get_layer("a").filters == small.get_layer("b").filters == 4


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("axis", [3, -1])
def test_concatenation_keeps_channels_apart(framework: Any, axis: int) -> None:
    layers = framework.layers
    model = _two_branches(framework, lambda a, b: layers.Concatenate(axis=axis)([a, b, a]))
    assert_masked_equals_pruned(model, {"a", "b"})


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_concatenation_in_space_unites_channels(framework: Any) -> None:
    layers = framework.layers
    model = _two_branches(framework, lambda a, b: layers.Concatenate(axis=1)([a, b]))
    assert len(analyse(model).prunable) == 1
    assert_masked_equals_pruned(model)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", ["Add", "Average", "Multiply"])
def test_one_tensor_twice(framework: Any, name: str) -> None:
    layers = framework.layers
    model = chain(
        framework, (6,), layers.Dense(8, name="a"),
        lambda x: getattr(layers, name)()([x, x]), layers.Dense(3),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"a"})


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_gate_per_channel(framework: Any) -> None:
    layers = framework.layers
    inputs = framework.Input((6, 6, 2))
    x = layers.Conv2D(8, 3, name="a")(inputs)
    gate = layers.GlobalAveragePooling2D()(x)
    gate = layers.Dense(4, activation="relu", name="squeeze")(gate)
    gate = layers.Dense(8, activation="sigmoid", name="excite")(gate)
    x = layers.Multiply()([x, layers.Reshape((1, 1, 8))(gate)])
    model = framework.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))
    assert_masked_equals_pruned(model, {"a", "squeeze"})


def test_broadcast_over_channels_freezes_the_one() -> None:
    layers = keras.layers
    model = _two_branches(
        keras, lambda a, b: layers.Multiply()([a, layers.Conv2D(1, 1, name="map")(b)])
    )
    assert_masked_equals_pruned(model, {"a", "b"})


def test_a_partner_from_the_input_freezes() -> None:
    layers = keras.layers
    inputs = keras.Input((6,))
    x = layers.Add()([layers.Dense(6, name="a")(inputs), inputs])
    model = keras.Model(inputs, layers.Dense(3, name="last")(x))
    assert_masked_equals_pruned(model, set())
    assert "cannot be removed" in analyse(model)["a"].reason


@pytest.mark.parametrize(
    "merge",
    [
        lambda a, b: a + b,
        lambda a, b: a * b - 0.5 * a,
        lambda a, b: a / (ops.abs(b) + 1.0),
        lambda a, b: ops.where(a > 0, a, b),
        lambda a, b: ops.maximum(a, b) ** 2,
        lambda a, b: ops.clip(a, -1.0, 1.0) + ops.minimum(b, 0.3),
        lambda a, b: ops.arctan2(a, b),
        lambda a, b: ops.logaddexp(a, b),
        lambda a, b: ops.cast(ops.logical_and(a > 0, b > 0), "float32"),
    ],
)
def test_binary_operations(merge: Callable[[Any, Any], Any]) -> None:
    model = _two_branches(keras, merge)
    assert len(analyse(model).prunable) == 1
    assert_masked_equals_pruned(model)


@pytest.mark.parametrize(
    "merge",
    [
        lambda a, b: a + b,
        lambda a, b: tf.math.subtract(a, b) * 2.0,
        lambda a, b: tf.maximum(a, b) / 3.0,
        lambda a, b: tf.where(a > 0.0, a, b),
        lambda a, b: tf.math.squared_difference(a, b),
        lambda a, b: tf.add_n([a, b, a]),
        lambda a, b: 1.0 - tf.nn.relu6(a) ** 2.0 + tf.sigmoid(b) + tf.nn.silu(a),
        lambda a, b: tf.clip_by_value(a, -1.0, 1.0) + tf.nn.leaky_relu(b) + tf.tanh(b),
        lambda a, b: tf.abs(a) + tf.sqrt(tf.math.square(b)) + tf.exp(-b) + tf.cast(a, "float32"),
    ],
)
def test_operations_of_tensorflow_in_tf_keras(merge: Callable[[Any, Any], Any]) -> None:
    model = _two_branches(tf_keras, merge)
    assert len(analyse(model).prunable) == 1
    assert_masked_equals_pruned(model)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_constants_are_cut_with_the_channels(framework: Any) -> None:
    constant = np.arange(8, dtype="float32") / 4
    table = np.ones((6, 1, 1), "float32")[:4] * np.arange(1, 5, dtype="float32")[:, None, None]
    model = _two_branches(framework, lambda a, b: a * constant + b * constant - table)
    assert len(analyse(model).prunable) == 1
    assert_masked_equals_pruned(model)


@pytest.mark.parametrize(
    "function",
    [
        ops.abs, ops.relu, ops.leaky_relu, ops.gelu, ops.silu, ops.tanh, ops.sigmoid, ops.softplus,
        ops.hard_sigmoid, ops.hard_silu, ops.elu, ops.selu, ops.square, ops.exp, ops.negative,
        ops.sign, ops.floor, ops.round, ops.erf, ops.stop_gradient, ops.nan_to_num, ops.sin,
        ops.log_sigmoid, ops.celu, ops.soft_shrink, ops.squareplus, ops.copy, ops.zeros_like,
        lambda x: ops.cast(x, "float64"), lambda x: ops.log1p(ops.abs(x)),
    ],
)  # fmt: skip
def test_operations_on_single_values(function: Callable[[Any], Any]) -> None:
    layers = keras.layers
    model = chain(keras, (5, 6), layers.Dense(8, name="a"), function, layers.Dense(3))
    assert_masked_equals_pruned(model, {"a"})


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ReLU", {"max_value": 2.0, "negative_slope": 0.1}), ("LeakyReLU", {}), ("ELU", {}),
        ("PReLU", {}), ("PReLU", {"shared_axes": [1]}), ("Activation", {"activation": "swish"}),
        ("Dropout", {"rate": 0.5}), ("GaussianNoise", {"stddev": 0.5}),
        ("GaussianDropout", {"rate": 0.5}), ("AlphaDropout", {"rate": 0.5}),
        ("ActivityRegularization", {"l2": 0.1}), ("SpatialDropout1D", {"rate": 0.5}),
    ],
)  # fmt: skip
def test_layers_on_single_values(framework: Any, name: str, options: dict[str, Any]) -> None:
    layers = framework.layers
    model = chain(
        framework, (5, 6), layers.Dense(8, name="a"), getattr(layers, name)(**options),
        layers.Dense(3),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"a"})


def test_masking_looks_at_all_channels() -> None:
    layers = keras.layers
    model = chain(
        keras, (5, 6), layers.Dense(8, activation="relu", name="a"), layers.Masking(),
        layers.LSTM(4, name="lstm"), layers.Dense(3),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"lstm"})
    assert "Masking" in analyse(model)["a"].reason


def test_a_function_of_the_user_as_activation_freezes() -> None:
    layers = keras.layers
    model = chain(
        keras, (6,), layers.Dense(8, name="a"), layers.Activation(lambda x: ops.cumsum(x, -1)),
        layers.Dense(3),
    )  # fmt: skip
    assert not analyse(model)["a"].prunable
    assert "not a built-in one" in analyse(model)["a"].reason
