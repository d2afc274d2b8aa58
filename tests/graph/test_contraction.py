"""Products of tensors with each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from tfprune.graph import analyse

from .oracle import assert_masked_equals_pruned

FRAMEWORKS = [keras, tf_keras]
ops = keras.ops


def _model(framework: Any, function: Callable[[Any, Any], Any]) -> Any:
    """``function`` of ``a``: (batch, 5, 8) and ``b``: (batch, 5, 8)."""
    layers = framework.layers
    inputs = framework.Input((5, 6))
    a, b = (layers.Dense(8, name=name)(inputs) for name in ("a", "b"))
    x = layers.Flatten()(function(a, b))
    return framework.Model(inputs, layers.Dense(3, name="last")(x))


def _swap(x: Any) -> Any:
    return ops.swapaxes(x, 1, 2)


@pytest.mark.parametrize(
    ("function", "prunable"),
    [
        (lambda a, b: ops.matmul(a, _swap(b)), set()),  # channels are contracted
        (lambda a, b: ops.matmul(ops.softmax(a[:, :, :5], axis=1), b), {"b"}),
        (lambda a, b: ops.matmul(_swap(a), b)[:, 0], {"b"}),
        (lambda a, b: ops.einsum("btc,bsc->bts", a, b), set()),
        (lambda a, b: ops.einsum("btc,btd->bd", a[:, :, :4], b), {"b"}),
        (lambda a, b: ops.einsum("...c,...c->...c", a, b), {"a"}),  # both, united
        (lambda a, b: ops.einsum("btc,td", a, np.ones((5, 2), "float32")), {"a"}),
        (lambda a, b: ops.tensordot(a, np.ones((5, 2), "float32"), [[1], [0]]), {"a"}),
        (lambda a, b: ops.tensordot(a, np.ones((8, 2), "float32"), 1), set()),
        (lambda a, b: ops.inner(a, np.ones((2, 8), "float32")), set()),
        (lambda a, b: ops.dot(_swap(a), np.ones((5, 2), "float32")), {"a"}),
        (lambda a, b: ops.matmul(a, np.ones((8, 4), "float32")), set()),
        (lambda a, b: ops.outer(ops.sum(a), np.ones(2, "float32")), set()),
    ],
)
# Keras 3.15's tensordot compares free sizes by int.__ne__.
@pytest.mark.filterwarnings("ignore:NotImplemented should not be used:DeprecationWarning")
def test_operations(function: Callable[[Any, Any], Any], prunable: set[str]) -> None:
    model = _model(keras, function)
    alive = {group.name for group in analyse(model).prunable}
    # Slicing splits a branch into a frozen and a free group, of one name and a number.
    assert {name for name in alive if "#" not in name} >= prunable
    assert (not prunable and not alive) or prunable
    assert_masked_equals_pruned(model)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda a, b: tf.matmul(a, b, transpose_b=True), 0),
        (lambda a, b: tf.matmul(tf.nn.softmax(tf.matmul(a, b, transpose_b=True)), b), 0),
        (lambda a, b: tf.einsum("btc,btd->bcd", a, b), 1),
        (lambda a, b: tf.einsum("btc,btc->btc", a, b), 1),
        (lambda a, b: tf.tensordot(a, np.ones((5, 2), "float32"), [[1], [0]]), 1),
    ],
)
def test_functions_of_tensorflow(function: Callable[[Any, Any], Any], count: int) -> None:
    model = _model(tf_keras, function)
    assert (len(analyse(model).prunable) > 0) is (count > 0)
    assert_masked_equals_pruned(model)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("axes", "free"), [(1, True), (2, False), ((1, 1), True), (-1, False)])
def test_dot_layer(framework: Any, axes: Any, free: bool) -> None:
    model = _model(framework, lambda a, b: framework.layers.Dot(axes)([a, b]))
    assert (len(analyse(model).prunable) > 0) is free
    assert_masked_equals_pruned(model)


def test_dot_product_attention_unites_heads() -> None:
    layers = keras.layers
    inputs = keras.Input((5, 6))
    query, key, value = (
        layers.EinsumDense("abc,cde->abde", (5, 4, 6), name=name)(inputs) for name in "qkv"
    )
    x = ops.dot_product_attention(query, key, value)
    model = keras.Model(inputs, layers.EinsumDense("abde,def->abf", (5, 3))(x))
    graph = analyse(model)
    assert [group.width for group in graph.prunable] == [4]
    assert_masked_equals_pruned(model)
    assert any("contracted" in group.reason for group in graph.groups)


def test_convolutions_with_a_given_kernel_freeze_and_are_counted() -> None:
    layers = keras.layers
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(8, 1, name="a")(inputs)
    x = ops.conv(x, np.ones((3, 3, 8, 4), "float32"))
    model = keras.Model(inputs, layers.Dense(3, name="last")(layers.Flatten()(x)))
    assert_masked_equals_pruned(model, set())
    graph = analyse(model)
    assert "belong to no layer" in graph["a"].reason
    [term] = [term for term in graph.record.macs if term.path.startswith("conv") or
              term.path == "conv"]  # fmt: skip
    assert term.coefficient == 4 * 4 * 3 * 3 * 8 * 4


def test_macs_of_products() -> None:
    graph = analyse(_model(keras, lambda a, b: ops.matmul(_swap(a), b)))
    [term] = [term for term in graph.record.macs if term.path.startswith("matmul")]
    assert (term.coefficient or 0) * np.prod([len(f) for f in term.factors]) == 8 * 5 * 8
