"""Recurrent layers, of Keras 3 and tf_keras."""

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
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LSTM", {}),
        ("LSTM", {"use_bias": False, "go_backwards": True}),
        ("GRU", {}),
        ("GRU", {"reset_after": False}),
        ("SimpleRNN", {}),
    ],
)
def test_units_are_pruned(framework: Any, name: str, options: dict[str, Any]) -> None:
    layers = framework.layers
    layer = getattr(layers, name)
    small = assert_masked_equals_pruned(
        chain(
            framework,
            (5, 6),
            layers.Dense(8, name="a"),
            layer(6, return_sequences=True, name="one", **options),
            layer(4, name="two", **options),
            layers.Dense(3),
        ),
        {"a", "one", "two"},
    )
    gates = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}[name]
    assert small.get_layer("one").units == 3
    assert tuple(small.get_layer("two").cell.recurrent_kernel.shape) == (2, gates * 2)


@pytest.mark.parametrize("merge_mode", ["concat", "sum", "mul", "ave"])
def test_directions_lose_the_same_units(merge_mode: str) -> None:
    layers = keras.layers
    assert_masked_equals_pruned(
        chain(
            keras,
            (4, 6),
            layers.Dense(8, name="a"),
            layers.Bidirectional(
                layers.LSTM(6, return_sequences=True), merge_mode=merge_mode, name="one"
            ),
            layers.Bidirectional(layers.GRU(4), merge_mode=merge_mode, name="two"),
            layers.Dense(3),
        ),
        {"a", "one/forward", "two/forward"},
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_directions_apart_with_states_and_a_backward_layer_of_its_own(framework: Any) -> None:
    layers = framework.layers
    inputs = framework.Input((4, 6))
    x = layers.Dense(8, name="a")(inputs)
    forward, backward, *states = layers.Bidirectional(
        layers.LSTM(4, return_state=True),
        backward_layer=layers.LSTM(4, return_state=True, go_backwards=True),
        merge_mode=None,
        name="bi",
    )(x)
    y = layers.Concatenate()([forward, backward, *states])
    model = framework.Model(inputs, layers.Dense(3)(y))
    assert_masked_equals_pruned(model, {"a", "bi/forward"})


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_states_are_handed_on(framework: Any) -> None:
    layers = framework.layers
    inputs = framework.Input((4, 6))
    x = layers.Dense(8, name="a")(inputs)
    encoded, hidden, carry = layers.LSTM(6, return_state=True, name="encoder")(x)
    y = layers.LSTM(6, return_sequences=True, name="decoder")(x, initial_state=[hidden, carry])
    y = layers.Add()([y, layers.RepeatVector(4)(encoded)])
    model = framework.Model(inputs, layers.Dense(3)(y))
    assert_masked_equals_pruned(model, {"a", "encoder"})


def test_initial_states_from_outside_freeze_the_units() -> None:
    layers = keras.layers
    inputs, hidden = keras.Input((4, 6)), keras.Input((5,))
    y = layers.GRU(5, name="gru")(layers.Dense(8, name="a")(inputs), initial_state=hidden)
    model = keras.Model([inputs, hidden], layers.Dense(3)(y))
    assert_masked_equals_pruned(model, {"a"})


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_cells_and_stacks_of_cells(framework: Any) -> None:
    layers = framework.layers
    inputs = framework.Input((4, 6))
    x = layers.Dense(8, name="a")(inputs)
    y, *_ = layers.RNN(
        [layers.LSTMCell(6), layers.GRUCell(4), layers.SimpleRNNCell(5)],
        return_sequences=True,
        return_state=True,
        name="stack",
    )(x)
    y = layers.RNN(layers.GRUCell(4), name="one")(y)
    small = assert_masked_equals_pruned(
        framework.Model(inputs, layers.Dense(3)(y)),
        {"a", "stack/cell_0", "stack/cell_1", "stack/cell_2", "one"},
    )
    assert [cell.units for cell in small.get_layer("stack").cell.cells] == [3, 2, 2]


def test_a_cell_in_two_directions() -> None:
    layers = keras.layers
    assert_masked_equals_pruned(
        chain(
            keras,
            (4, 6),
            layers.Dense(8, name="a"),
            layers.Bidirectional(layers.RNN(layers.LSTMCell(6)), name="bi"),
            layers.Dense(3),
        ),
        {"a", "bi/forward"},
    )


def test_padding_is_masked() -> None:
    layers = keras.layers
    model = chain(
        keras,
        (5,),
        layers.Embedding(4, 8, mask_zero=True, name="words"),
        layers.Bidirectional(layers.LSTM(6, return_sequences=True), name="bi"),
        layers.LSTM(6, name="lstm"),
        layers.Dense(3),
    )
    assert_masked_equals_pruned(
        model, {"words", "bi/forward", "lstm"}, inputs=np.array([[1, 2, 3, 0, 0], [3, 1, 0, 0, 0]])
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutional_lstm(rank: int) -> None:
    layers = keras.layers
    layer = getattr(layers, f"ConvLSTM{rank}D")
    options = {"padding": "same"} if rank < 3 else {}
    shape = (3, *[4] * rank, 2)
    small = assert_masked_equals_pruned(
        chain(
            keras,
            shape,
            layers.Dense(6, name="a"),
            layer(4, 2, return_sequences=True, name="one", **options),
            layers.BatchNormalization(),
            layer(4, 2, name="two", **options),
            layers.Flatten(),
            layers.Dense(3),
        ),
        {"a", "one", "two"},
    )
    assert small.get_layer("one").cell.filters == 2


def test_states_of_a_stateful_layer_shrink() -> None:
    layers = keras.layers
    inputs = keras.Input(batch_shape=(2, 4, 6))
    x = layers.LSTM(6, stateful=True, name="lstm")(layers.Dense(8, name="a")(inputs))
    small = assert_masked_equals_pruned(keras.Model(inputs, layers.Dense(3)(x)), {"a", "lstm"})
    assert tuple(small.get_layer("lstm").states[0].shape) == (2, 3)


def test_an_activation_across_units_freezes_them() -> None:
    layers = keras.layers
    model = chain(keras, (4, 6), layers.LSTM(6, activation="softmax", name="lstm"), layers.Dense(3))
    assert_masked_equals_pruned(model, set())
    assert "softmax" in analyse(model)["lstm"].reason


def test_macs_count_every_step() -> None:
    layers = keras.layers
    graph = analyse(chain(keras, (5, 6), layers.LSTM(4, name="lstm"), layers.Dense(3)))
    macs = sum(
        (term.coefficient or 0) * np.prod([len(labels) for labels in term.factors])
        for term in graph.record.macs
        if term.path == "lstm"
    )
    assert macs == 5 * (6 * 16 + 4 * 16)
