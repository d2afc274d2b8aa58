"""Attention layers, of Keras 3 and tf_keras."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tf_keras

from tfprune.graph import analyse

from .oracle import assert_masked_equals_pruned

FRAMEWORKS = [keras, tf_keras]


def _transformer(framework: Any, shape: tuple[int, ...] = (5, 6), **options: Any) -> Any:
    layers = framework.layers
    inputs = framework.Input(shape)
    x = layers.Dense(8, name="a")(inputs)
    y = layers.MultiHeadAttention(4, 6, name="mha", **options)(x, x)
    x = layers.Add()([x, y])
    return framework.Model(inputs, layers.Dense(3, name="last")(x))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("options", [{}, {"value_dim": 5, "use_bias": False}])
def test_heads_widths_and_residual_are_pruned(framework: Any, options: dict[str, Any]) -> None:
    model = _transformer(framework, **options)
    small = assert_masked_equals_pruned(
        model, {"a", "mha:heads", "mha:key width", "mha:value width"}
    )
    mha = small.get_layer("mha")
    assert tuple(mha._query_dense.kernel.shape) == (4, 2, 3)
    assert mha.get_config()["num_heads"] == 2


def test_gate_and_explicit_scores() -> None:
    layers = keras.layers
    inputs = keras.Input((5, 6))
    x = layers.Dense(8, name="a")(inputs)
    y, scores = layers.MultiHeadAttention(4, 6, use_gate=True, output_shape=7, name="mha")(
        x, x, return_attention_scores=True
    )
    # Scores (batch, heads, steps, steps): heads become channels of a convolution.
    z = layers.Conv2D(3, 1, data_format="channels_first", name="conv")(scores)
    model = keras.Model(inputs, [layers.Dense(3)(y), layers.Flatten()(z)])
    assert_masked_equals_pruned(
        model, {"a", "mha:heads", "mha:key width", "mha:value width", "mha:output"}
    )


def test_cross_attention_over_two_axes() -> None:
    layers = keras.layers
    first, second = keras.Input((2, 3, 6)), keras.Input((2, 3, 5))
    query, value = layers.Dense(8, name="q")(first), layers.Dense(6, name="v")(second)
    key = layers.Dense(7, name="k")(second)
    y = layers.MultiHeadAttention(2, 4, attention_axes=(1, 2), output_shape=6, name="mha")(
        query, value, key
    )
    model = keras.Model([first, second], layers.Dense(3)(y))
    assert_masked_equals_pruned(
        model,
        {"q", "v", "k", "mha:heads", "mha:key width", "mha:value width", "mha:output"},
    )


@pytest.mark.parametrize("causal", [False, True])
def test_masks_of_padding_and_causal(causal: bool) -> None:
    layers = keras.layers
    inputs = keras.Input((5,))
    x = layers.Embedding(4, 8, mask_zero=True, name="words")(inputs)
    y = layers.MultiHeadAttention(4, 4, name="mha")(x, x, use_causal_mask=causal)
    model = keras.Model(inputs, layers.Dense(3)(layers.Add()([x, y])))
    assert_masked_equals_pruned(
        model,
        {"words", "mha:heads", "mha:key width", "mha:value width"},
        inputs=np.array([[1, 2, 3, 0, 0], [3, 1, 0, 0, 0]]),
    )


def test_macs_of_attention() -> None:
    graph = analyse(_transformer(keras))
    macs = sum(
        (term.coefficient or 0) * np.prod([len(labels) for labels in term.factors])
        for term in graph.record.macs
        if term.path == "mha"
    )
    steps, width, heads, head = 5, 8, 4, 6
    projections = 4 * steps * width * heads * head
    assert macs == projections + 2 * steps * steps * heads * head


@pytest.mark.parametrize(
    ("query_heads", "key_heads"),
    [(8, 4), (4, 4), (4, 1)],  # shared by two queries, one each, one for all
)
def test_grouped_query_attention(query_heads: int, key_heads: int) -> None:
    layers = keras.layers
    inputs = keras.Input((5, 6))
    x = layers.Dense(8, name="a")(inputs)
    y = layers.GroupQueryAttention(4, query_heads, key_heads, use_gate=True, name="gqa")(x, x)
    model = keras.Model(inputs, layers.Dense(3)(layers.Add()([x, y])))
    assert_masked_equals_pruned(model, {"a", "gqa:heads", "gqa:head width"})


def test_grouped_query_attention_is_as_wide_as_its_inputs() -> None:
    layers = keras.layers
    inputs = keras.Input((5, 6))
    y = layers.GroupQueryAttention(4, 8, 4, name="gqa")(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(3)(y))
    assert_masked_equals_pruned(model, {"gqa:heads", "gqa:head width"})


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_dot_product_attention_prunes_values_only(framework: Any) -> None:
    layers = framework.layers
    inputs = framework.Input((5, 6))
    query, value, key = (layers.Dense(8, name=name)(inputs) for name in ("q", "v", "k"))
    y, scores = layers.Attention(use_scale=True)([query, value, key], return_attention_scores=True)
    model = framework.Model(inputs, [layers.Dense(3)(y), scores])
    assert_masked_equals_pruned(model, {"v"})
    assert "multiplied with each other" in analyse(model)["q"].reason


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_scale_of_additive_attention_reads_queries_and_keys(framework: Any) -> None:
    layers = framework.layers
    inputs = framework.Input((5, 6))
    query, value, key = (layers.Dense(8, name=name)(inputs) for name in ("q", "v", "k"))
    y = layers.AdditiveAttention()([query, value, key])
    model = framework.Model(inputs, layers.Dense(3)(y))
    graph = analyse(model)
    assert_masked_equals_pruned(model, {group.name for group in graph.prunable})
    assert len(graph.prunable) == 2  # queries go with keys


def test_additive_attention_without_scale_freezes() -> None:
    layers = keras.layers
    inputs = keras.Input((5, 6))
    query, value = layers.Dense(8, name="q")(inputs), layers.Dense(8, name="v")(inputs)
    y = layers.AdditiveAttention(use_scale=False)([query, value])
    assert_masked_equals_pruned(keras.Model(inputs, layers.Dense(3, name="last")(y)), set())
