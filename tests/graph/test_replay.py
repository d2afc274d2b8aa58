"""Models made again from their calls."""

from __future__ import annotations

import keras
import numpy as np

from tests.toys import residual
from tfprune.graph.replay import replay
from tfprune.graph.trace import trace
from tfprune.surgery import apply
from tfprune.testing import random_plan

layers = keras.layers


def _anew(op):
    return type(op).from_config(op.get_config())


def test_the_same_graph_and_names() -> None:
    model = residual()
    made = {}
    copy = replay(
        trace(model),
        make=lambda op: made.setdefault(id(op), _anew(op)),
        make_input=lambda ref, layer: _anew(layer),
    )
    assert [layer.name for layer in copy.layers] == [layer.name for layer in model.layers]
    copy.set_weights(model.get_weights())
    x = np.random.default_rng(0).standard_normal((3, 8, 8, 3)).astype("float32")
    np.testing.assert_array_equal(np.asarray(copy(x)), np.asarray(model(x)))


def test_a_sequential_model_whose_masks_of_time_steps_are_calls() -> None:
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(20, 8, mask_zero=True),
            layers.LSTM(6),
            layers.Dense(3),
        ]
    )
    small = apply(model, random_plan(model, seed=0))
    assert [type(layer) for layer in small.layers] == [type(layer) for layer in model.layers]
    assert small.count_params() < model.count_params()
