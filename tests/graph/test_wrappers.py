"""Layers that wrap layers, functions or models; nested and shared models."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tf_keras

from tfprune.graph import analyse

from .oracle import assert_masked_equals_pruned, chain

FRAMEWORKS = [keras, tf_keras]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_time_distributed_layers_and_models(framework: Any) -> None:
    layers = framework.layers
    inner = framework.Sequential(
        [
            framework.Input((6, 6, 2)),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(8, name="dense"),
        ],
        name="frame",
    )
    small = assert_masked_equals_pruned(
        chain(
            framework,
            (3, 6, 6, 2),
            layers.TimeDistributed(inner, name="frames"),
            layers.TimeDistributed(layers.Dense(6), name="steps"),
            layers.LSTM(4, name="lstm"),
            layers.Dense(3),
        ),
        {"frames/layer/conv", "frames/layer/dense", "steps/layer", "lstm"},
    )
    assert small.get_layer("steps").layer.units == 3


def test_macs_inside_count_every_step() -> None:
    layers = keras.layers
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(5, name="dense")])
    graph = analyse(chain(keras, (7, 4), layers.TimeDistributed(inner), layers.Dense(2)))
    [term] = [term for term in graph.record.macs if term.path.endswith("/dense")]
    assert (term.coefficient or 0) * np.prod([len(f) for f in term.factors]) == 7 * 4 * 5


def test_layer_normalisation_inside_time_distributed_says_why_it_stays() -> None:
    layers = keras.layers
    model = chain(
        keras, (3, 4), layers.Dense(6, name="a"),
        layers.TimeDistributed(layers.LayerNormalization()), layers.Dense(2),
    )  # fmt: skip
    assert_masked_equals_pruned(model, set())
    assert "inside TimeDistributed" in analyse(model)["a"].reason


def test_spectral_normalisation() -> None:
    # That of tf_keras cannot be built beside Keras 3: it takes its InputSpec from tf.keras.
    layers = keras.layers
    model = chain(
        keras,
        (6, 6, 2),
        layers.SpectralNormalization(layers.Conv2D(8, 3), name="one"),
        layers.SpectralNormalization(layers.Conv2DTranspose(6, 3), name="two"),
        layers.Flatten(),
        layers.Dense(3),
    )
    small = assert_masked_equals_pruned(model, {"one/layer", "two/layer"})
    assert tuple(small.get_layer("one").vector_u.shape) == (1, 4)
    # The last axis of a transposed convolution's kernel is its input.
    assert tuple(small.get_layer("two").vector_u.shape) == (1, 4)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_lambda_stays_and_its_neighbours_go(framework: Any) -> None:
    layers = framework.layers
    model = chain(
        framework,
        (6,),
        layers.Dense(8, name="a"),
        layers.Dense(8, name="b"),
        layers.Lambda(lambda x, factor: x * factor, arguments={"factor": 2.0}, name="twice"),
        layers.Dense(8, name="c"),
        layers.Dense(3),
    )
    assert_masked_equals_pruned(model, {"a", "c"})
    assert "tfprune.rule" in analyse(model)["b"].reason


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_nested_model_called_twice(framework: Any) -> None:
    layers = framework.layers
    inner = chain(framework, (6,), layers.Dense(8, name="a"), layers.Dense(6, name="b"))
    inputs = framework.Input((5,))
    x = layers.Dense(6, name="first")(inputs)
    x = inner(inner(x))
    model = framework.Model(inputs, layers.Dense(3)(x))
    # Its input and its output are the same channels, as the second call reads the first one's.
    small = assert_masked_equals_pruned(model, {"first", f"{inner.name}/a"})
    assert tuple(small.layers[1].kernel.shape) == (5, 3)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_layer_called_twice_on_one_tensor(framework: Any) -> None:
    layers = framework.layers
    inputs = framework.Input((6,))
    x = layers.Dense(8, name="a")(inputs)
    shared = layers.Dense(8, name="shared")
    x = layers.Add()([shared(x), shared(x)])
    model = framework.Model(inputs, layers.Dense(3)(x))
    assert_masked_equals_pruned(model, {"a", "shared"})


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_shared_layer_unites_its_inputs(framework: Any) -> None:
    layers = framework.layers
    inputs = framework.Input((6,))
    first, second = layers.Dense(8, name="a")(inputs), layers.Dense(8, name="b")(inputs)
    shared = layers.Dense(4, name="shared")
    x = layers.Concatenate()([shared(first), shared(second)])
    model = framework.Model(inputs, layers.Dense(3)(x))
    assert_masked_equals_pruned(model, {"b", "shared"})  # a goes with b


def test_a_layer_shared_with_a_model_output_stays() -> None:
    layers = keras.layers
    inputs = keras.Input((6,))
    shared = layers.Dense(6, name="shared")
    x = shared(inputs)
    assert_masked_equals_pruned(keras.Model(inputs, [shared(x), layers.Dense(3)(x)]), set())


def test_the_same_layer_alone_and_time_distributed() -> None:
    layers = keras.layers
    inputs = keras.Input((3, 6))
    shared = layers.Dense(4, name="shared")
    x = layers.TimeDistributed(shared, name="steps")(inputs)
    y = layers.RepeatVector(3)(shared(layers.Lambda(lambda t: t[:, 0])(inputs)))
    model = keras.Model(inputs, layers.Dense(3)(layers.Add()([x, y])))
    small = assert_masked_equals_pruned(model, {"shared"})
    assert small.get_layer("steps").layer is small.get_layer("shared")
