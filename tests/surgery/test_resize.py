"""The same architecture with other widths."""

import keras
import numpy as np
import pytest

import tfprune
from tests import toys
from tfprune.errors import ArgumentError, ModelError
from tfprune.surgery import resize
from tfprune.testing import random_plan


def test_wider_and_narrower():
    model = toys.residual()
    wider = resize(model, {"stem": 20, "expand": 12, "squeeze": 11})
    graph = tfprune.analyse(wider)
    assert {name: graph[name].width for name in ("stem", "expand", "squeeze")} == {
        "stem": 20, "expand": 12, "squeeze": 11,
    }  # fmt: skip
    assert wider.get_layer("head").kernel.shape == (8 * 8 * 20, 5)
    assert np.isfinite(np.asarray(wider(toys.images()))).all()
    assert tfprune.verify(wider, random_plan(wider))


def test_narrower_only_is_what_a_plan_builds():
    model = toys.chain()
    plan = tfprune.plan(model, 0.5, round_to=1)
    small = plan.apply(model)
    same = resize(model, {name: len(kept) for name, kept in plan.kept.items()})
    assert [tuple(w.shape) for w in same.weights] == [tuple(w.shape) for w in small.weights]


def test_weights_are_new_and_seeded():
    model = toys.chain()
    one, again, other = (resize(model, {"conv1": 18}, seed=seed) for seed in (1, 1, 2))
    kernel = [np.asarray(m.get_layer("conv1").kernel) for m in (one, again, other)]
    np.testing.assert_array_equal(kernel[0], kernel[1])
    assert not np.array_equal(kernel[0], kernel[2])
    # Glorot uniform of the new fan: every value within its limit, and the limit nearly reached.
    limit = np.sqrt(6 / (9 * 8 + 9 * 18))
    assert 0.95 * limit < np.abs(kernel[0]).max() <= limit


def test_depthwise_concatenation_and_attention_grow():
    inputs = keras.Input((6, 8), name="tokens")
    x = keras.layers.Dense(8, name="embed")(inputs)
    y = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = keras.layers.Concatenate(name="both")([x, y])
    x = keras.layers.Reshape((6, 1, 16), name="image")(x)
    x = keras.layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="depthwise")(x)
    x = keras.layers.Flatten(name="flat")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    graph = tfprune.analyse(model)
    widths = {group.name: group.width + 3 for group in graph.prunable}
    assert len(widths) >= 3
    grown = tfprune.analyse(resize(model, widths))
    assert [group.width - 3 for group in grown.prunable] == [g.width for g in graph.prunable]
    assert np.isfinite(np.asarray(grown.model(np.ones((2, 6, 8), "float32")))).all()


def test_constants_per_channel_cannot_be_invented():
    inputs = keras.Input((4, 4, 3), name="image")
    x = keras.layers.Conv2D(6, 3, name="conv")(inputs)
    x = keras.ops.multiply(x, np.arange(6, dtype="float32"))
    x = keras.layers.Flatten(name="flat")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    with pytest.raises(ModelError, match=r"(?s)can be made wider.*own: conv"):
        resize(model, {"conv": 9})


def test_refusals():
    model = toys.chain()
    with pytest.raises(ArgumentError, match="names of channel groups"):
        resize(model, {"nothing": 3})
    with pytest.raises(ArgumentError, match=r"width is free.*output"):
        resize(model, {"head": 7})
    for width in (0, 2.5, True):
        with pytest.raises(ArgumentError, match="width of at least 1"):
            resize(model, {"conv0": width})
