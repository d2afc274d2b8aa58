"""Masked models: what the pruned model computes, without rebuilding it."""

import keras
import numpy as np
import pytest
import tf_keras

import tfprune
from tests import toys
from tfprune.graph.copying import copy_model
from tfprune.graph.masking import MaskedModel
from tfprune.testing import random_plan

# Float32 sums in another order: a few hundred additions of numbers near one.
TOLERANCE = 2e-5


def layer_normalised():
    inputs = keras.Input((6, 5), name="tokens")
    x = keras.layers.Dense(12, name="wide")(inputs)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Dense(7, activation="relu", name="narrow")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def of_keras_2():
    inputs = tf_keras.Input((8, 8, 3), name="image")
    x = tf_keras.layers.Conv2D(8, 3, name="conv")(inputs)
    x = tf_keras.layers.BatchNormalization(name="norm")(x)
    x = tf_keras.layers.Flatten(name="flat")(x)
    return tf_keras.Model(inputs, tf_keras.layers.Dense(3, name="head")(x))


def nested():
    inner = toys.chain()
    inputs = keras.Input((8, 8, 3), name="outer_image")
    return keras.Model(inputs, keras.layers.Dense(2, name="outer_head")(inner(inputs)))


CASES = {
    "residual": (toys.residual, (8, 8, 3)),
    "chain": (toys.chain, (8, 8, 3)),
    "layer normalisation": (layer_normalised, (6, 5)),
    "tf_keras": (of_keras_2, (8, 8, 3)),
    "nested": (nested, (8, 8, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_masked_is_pruned_again_and_again(case):
    make, shape = CASES[case]
    model = make()
    before = [np.asarray(weight).copy() for weight in model.weights]
    x = np.random.default_rng(1).standard_normal((3, *shape)).astype("float32")
    masked = MaskedModel(tfprune.analyse(model))
    for seed in (0, 1):
        plan = random_plan(model, ratio=0.5, seed=seed)
        masked.mask(plan.kept)
        expected = np.asarray(plan.apply(model)(x))
        np.testing.assert_allclose(masked.outputs([x])[0], expected, rtol=0, atol=TOLERANCE)
    masked.mask({})
    np.testing.assert_allclose(masked.outputs([x])[0], np.asarray(model(x)), atol=TOLERANCE)
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, np.asarray(new).copy())


def test_new_values():
    model = toys.chain()
    graph = tfprune.analyse(model)
    kept = {"conv0": (1, 2, 5), "conv1": tuple(range(0, 12, 2))}
    new = np.random.default_rng(0).standard_normal((3, 3, 3, 6)).astype("float32")
    plan = tfprune.PruningPlan.of(graph, kept, values={"conv1/kernel": new})
    masked = MaskedModel(graph)
    masked.mask(plan.kept, plan.values)
    x = toys.images()
    expected = np.asarray(plan.apply(model)(x))
    np.testing.assert_allclose(masked.outputs([x])[0], expected, rtol=0, atol=TOLERANCE)
    masked.mask(plan.kept)  # the new values are gone again
    expected = np.asarray(tfprune.PruningPlan.of(graph, kept).apply(model)(x))
    np.testing.assert_allclose(masked.outputs([x])[0], expected, rtol=0, atol=TOLERANCE)


def test_restore_brings_statistics_back():
    model = toys.chain()
    masked = MaskedModel(tfprune.analyse(model))
    masked.mask({"conv0": (0, 1)})
    tfprune.recalibrate_batch_norm(masked.model, toys.images())
    changed = np.asarray(masked.model.get_layer("norm1").moving_mean).copy()
    masked.restore()
    for old, new in zip(model.weights, masked.model.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(old).copy(), np.asarray(new).copy())
    assert not np.allclose(changed, np.asarray(model.get_layer("norm1").moving_mean).copy())


def test_a_copy_shares_nothing():
    model = nested()
    model.get_layer("chain").get_layer("conv0").trainable = False
    copy = copy_model(model)
    assert [w.path for w in copy.weights] == [w.path for w in model.weights]
    assert [w.trainable for w in copy.weights] == [w.trainable for w in model.weights]
    assert not {id(w) for w in copy.weights} & {id(w) for w in model.weights}
    x = toys.images()
    # The same sums in the same order.
    np.testing.assert_array_equal(np.asarray(copy(x)), np.asarray(model(x)))
