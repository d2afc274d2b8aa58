"""Dense, EinsumDense, embeddings."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tf_keras

from tfprune.cost import measure
from tfprune.errors import ModelError
from tfprune.graph import analyse
from tfprune.graph.plan import PruningPlan

from .oracle import assert_masked_equals_pruned, chain

FRAMEWORKS = [keras, tf_keras]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (3, 4, 6)])
def test_dense_on_any_rank(framework: Any, shape: tuple[int, ...]) -> None:
    layers = framework.layers
    small = assert_masked_equals_pruned(
        chain(
            framework, shape, layers.Dense(8, activation="gelu", name="a"),
            layers.Dense(6, use_bias=False, name="b"), layers.Flatten(), layers.Dense(3),
        ),
        {"a", "b"},
    )  # fmt: skip
    assert tuple(small.get_layer("b").kernel.shape) == (4, 3)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("equation", "output_shape", "bias_axes", "last", "groups"),
    [
        ("abc,cd->abd", (5, 6), "d", "abd,de->abe", {"a", "b"}),
        ("...x,xy->...y", (6,), "y", "...y,yz->...z", {"a", "b"}),
        ("abc,cde->abde", (5, 4, 6), "de", "abde,def->abf", {"a", "b", "b#2"}),
        ("abc,cde->abed", (5, 6, 4), "d", "abed,def->abf", {"a", "b", "b#2"}),
        ("abc,bcd->abd", (5, 6), None, "abd,de->abe", {"a", "b"}),  # a kernel per step
        ("abc,c->abc", (5, 8), "c", "abc,cd->abd", {"a"}),  # a scale
        ("abc,bd->adc", (4, 8), None, "adc,dce->ae", {"a", "b"}),  # mixes steps
    ],
)
def test_einsum_dense(
    framework: Any,
    equation: str,
    output_shape: tuple[int, ...],
    bias_axes: str | None,
    last: str,
    groups: set[str],
) -> None:
    layers = framework.layers
    shape = (3,) if last.endswith(("ae", "z")) else (5, 3)
    model = chain(
        framework, (5, 6), layers.Dense(8, name="a"),
        layers.EinsumDense(equation, output_shape, bias_axes=bias_axes, name="b"),
        layers.EinsumDense(last, shape, name="last"),
    )  # fmt: skip
    assert_masked_equals_pruned(model, groups)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_embeddings(framework: Any) -> None:
    layers = framework.layers
    small = assert_masked_equals_pruned(
        chain(framework, (5,), layers.Embedding(4, 8, name="words"), layers.Dense(3)),
        {"words"},
        inputs=np.array([[1, 2, 3, 0, 0]]),
    )
    assert small.get_layer("words").output_dim == 4


@pytest.mark.parametrize("tie_weights", [True, False])
def test_tied_embeddings_read_what_they_made(tie_weights: bool) -> None:
    layers = keras.layers
    inputs = keras.Input((5,), dtype="int32")
    words = layers.ReversibleEmbedding(7, 8, tie_weights=tie_weights, name="words")
    x = words(inputs)
    x = layers.Add()([x, layers.Dense(8, name="residual")(x)])
    small = assert_masked_equals_pruned(
        keras.Model(inputs, words(x, reverse=True)), {"words"}, inputs=np.array([[1, 2, 3, 0, 6]])
    )
    assert tuple(small.get_layer("words").embeddings.shape) == (7, 4)


@pytest.mark.parametrize(
    ("activation", "frozen"),
    [
        (keras.activations.relu, False),
        (keras.activations.log_softmax, True),
        (keras.activations.exponential, False),
        (keras.ops.softmax, True),
        (keras.ops.silu, False),
        (lambda x: x, True),
    ],
)
def test_activation_functions(activation: Any, frozen: bool) -> None:
    layers = keras.layers
    model = chain(keras, (6,), layers.Dense(8, name="a"), layers.Dense(3))
    model.get_layer("a").activation = activation
    assert analyse(model)["a"].prunable is not frozen


@pytest.mark.parametrize("name", ["relu", "softmax", "log_softmax", "l2_normalize", "silu", "elu"])
def test_functions_of_tensorflow_as_activations(name: str) -> None:
    import tensorflow as tf

    layers = tf_keras.layers
    model = chain(
        tf_keras, (6,), layers.Dense(8, activation=getattr(tf.nn, name), name="a"), layers.Dense(3)
    )
    assert analyse(model)["a"].prunable is (name in ("relu", "silu", "elu"))


def test_low_rank_adapters_are_refused_with_advice() -> None:
    layers = keras.layers
    model = chain(keras, (6,), layers.Dense(8, name="a"), layers.Dense(3))
    model.get_layer("a").enable_lora(2)
    with pytest.raises(ModelError, match=r"'a' with LoRA.*Prune first"):
        analyse(model)


def test_a_table_that_is_read_before_it_is_looked_up_makes_channels_all_the_same() -> None:
    layers = keras.layers
    inputs = keras.Input((6,))
    words = layers.ReversibleEmbedding(7, 8, name="words")
    scores = words(layers.Dense(8, name="a")(inputs), reverse=True)
    x = words(keras.ops.argmax(scores, axis=-1))
    model = keras.Model(inputs, layers.Dense(3)(x))
    assert_masked_equals_pruned(model, {"a"})
    assert {member.path for member in analyse(model)["a"].producers} == {"a", "words"}


def test_macs_of_a_dense_layer_behind_channels() -> None:
    """Between the batch and its own inputs may stand an axis that shrinks."""
    inputs = keras.Input((6, 3))
    x = keras.layers.Dense(8, name="before")(inputs)
    x = keras.layers.Dense(5, name="across")(keras.layers.Permute((2, 1))(x))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Permute((2, 1))(x)))
    plan = PruningPlan.of(analyse(model), {"before": [1, 2, 7]})
    macs = {layer.path: layer.macs for layer in measure(model, plan).layers}
    assert macs["across"] == 3 * 6 * 5
    assert measure(plan.apply(model)).macs == measure(model, plan).macs
