"""Verifying and applying leave no trace in the source; precision policies; layers that repeat."""

import keras
import numpy as np
import pytest
import tf_keras

import tfprune
from tfprune.testing import check_surgery, random_plan, randomize


def _net(framework, *extra):
    layers = framework.layers
    inputs = framework.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same")(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.LayerNormalization()(layers.Conv2D(12, 3)(x))
    for layer in extra:
        x = layer(x)
    return randomize(framework.Model(inputs, layers.Dense(3)(layers.Flatten()(x))))


def _set_policy(framework, policy):
    if framework is keras:
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
    else:
        before = tf_keras.mixed_precision.global_policy()
        tf_keras.mixed_precision.set_global_policy(policy)
    return before


@pytest.mark.parametrize("framework", [keras, tf_keras])
@pytest.mark.parametrize(
    ("policy", "tolerance"),
    # A few layers, each rounded once: some units in the last place of the compute type (2**-11,
    # 2**-8, 2**-53), after cancellation in the sums.
    [("mixed_float16", 5e-3), ("mixed_bfloat16", 4e-2), ("float64", 1e-12)],
)
def test_precision(framework, policy, tolerance):
    before = _set_policy(framework, policy)
    try:
        model = _net(framework)
    finally:
        _set_policy(framework, before)
    plan = check_surgery(model, tolerance=tolerance)
    small = plan.apply(model)
    for old, new in zip(model.layers[1:], small.layers[1:], strict=True):
        assert (new.compute_dtype, new.variable_dtype) == (old.compute_dtype, old.variable_dtype)
    if framework is keras:
        # By the model's own policy compile() decides whether to scale the loss.
        assert small.dtype_policy == model.dtype_policy
        small.compile("sgd", "mse")
        scales = isinstance(small.optimizer, keras.optimizers.LossScaleOptimizer)
        assert scales == (policy == "mixed_float16")


@pytest.mark.parametrize("framework", [keras, tf_keras])
def test_interrupted(framework):
    class Explosive(framework.layers.Layer):
        armed = False

        def call(self, x):
            if Explosive.armed:
                raise KeyboardInterrupt
            return x * 1.0

    tfprune.rule(Explosive, tfprune.graph.elementwise)
    model = _net(framework, Explosive())
    model.compile("adam", "mse")
    model.fit(np.ones((2, 8, 8, 3)), np.ones((2, 3)), verbose=0)
    plan = random_plan(model)
    small = plan.apply(model)

    def state():
        values = [*model.variables, *model.optimizer.variables]
        nodes = [len(layer._inbound_nodes) for layer in model.layers]
        return [np.asarray(value).copy() for value in values], nodes

    values, nodes = state()
    Explosive.armed = True
    try:
        with pytest.raises(KeyboardInterrupt):
            tfprune.verify(model, plan, pruned=small)
    finally:
        Explosive.armed = False
    after, nodes_after = state()
    for old, new in zip(values, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert nodes == nodes_after
    # The masked weights are gone: the model computes what it did.
    assert tfprune.verify(model, plan)


def test_regularised_outputs():
    layers = keras.layers
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, activity_regularizer="l2", kernel_regularizer="l2")(inputs)
    x = layers.Flatten()(layers.ActivityRegularization(l1=0.1)(x))
    model = keras.Model(inputs, layers.Dense(3, activity_regularizer="l1")(x))
    small = check_surgery(model).apply(model)
    x = np.ones((2, 8, 8, 3), "float32")
    model(x), small(x)
    assert len(small.losses) == len(model.losses) == 4


def test_names_that_repeat_in_nested_models():
    def inner():
        inputs = keras.Input((8, 8, 4))
        x = keras.layers.Conv2D(6, 3, padding="same", name="first")(inputs)
        return keras.Model(inputs, keras.layers.Conv2D(4, 3, padding="same", name="conv")(x))

    first, second = inner(), inner()
    inputs = keras.Input((8, 8, 4))
    x = keras.layers.Conv2D(7, 1, name="conv")(second(first(inputs)))
    outputs = keras.layers.Dense(2, name="first")(keras.layers.Flatten()(x))
    model = randomize(keras.Model(inputs, outputs, name=first.name))
    assert [group.name for group in tfprune.analyse(model)] == [
        f"{first.name}/first", f"{first.name}/conv", f"{second.name}/first",
        f"{second.name}/conv", "conv", "first",
    ]  # fmt: skip
    # Some float32 layers: 1e-5 of the largest output is some hundred roundings.
    check_surgery(model, tolerance=1e-5)


def test_slashes_in_names():
    """tf_keras allows them."""
    layers = tf_keras.layers
    inputs = tf_keras.Input((8, 8, 3))
    x = layers.Conv2D(7, 3, name="b/conv")(layers.Conv2D(6, 3, name="a/conv")(inputs))
    model = randomize(tf_keras.Model(inputs, layers.Dense(2, name="a/b/c")(layers.Flatten()(x))))
    plan = check_surgery(model, tolerance=1e-5)  # see above
    assert set(plan.kept) == {"a/conv", "b/conv"}


def test_two_models_over_the_same_layers():
    layers = keras.layers
    base = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(6, 3, name="one"), layers.Conv2D(5, 3, name="two")]
    )
    part = keras.Model(base.inputs, base.get_layer("one").output)
    inputs = keras.Input((8, 8, 3))
    heads = [layers.Dense(2)(layers.Flatten()(model(inputs))) for model in (part, base)]
    model = randomize(keras.Model(inputs, heads))
    plan = check_surgery(model, tolerance=1e-5)  # see above
    small = plan.apply(model)
    assert len(small.weights) == len(model.weights)
