"""New values of a plan in the pruned model, and masked ≡ pruned with them."""

import keras
import numpy as np
import pytest
import tf_keras

import tfprune
from tests import toys
from tfprune.graph.plan import PruningPlan
from tfprune.testing import random_plan, randomize

# Relative. Some float32 layers: 1e-5 of the largest output is some hundred roundings.
ROUNDING = 1e-5


def _weight(model, name):
    """The live weight behind a full name, found without the graph."""
    path, _, weight = name.rpartition("/")
    layer = model.get_layer(path)
    if weight == "kernel" and not hasattr(layer, "kernel"):
        weight = "depthwise_kernel"  # as tf_keras calls it
    return getattr(layer, weight)


def _with_values(model, names, plan=None):
    """A plan with random values for the weights, in the shapes of the pruned model's."""
    plan = random_plan(model) if plan is None else plan
    small = plan.apply(model)
    random = np.random.default_rng(5)
    values = {
        name: random.uniform(0.2, 1.0, tuple(_weight(small, name).shape)).astype("float32")
        for name in names
    }
    return plan.with_values(tfprune.analyse(model), values)


def _check(model, names, plan=None, tolerance=ROUNDING):
    """The pruned model has the values, the oracle agrees, and would not have without them."""
    before = [np.asarray(value).copy() for value in model.weights]
    plain = random_plan(model) if plan is None else plan
    plan = _with_values(model, names, plain)
    small, without = plan.apply(model), plain.apply(model)
    for name in names:
        np.testing.assert_array_equal(np.asarray(_weight(small, name)), plan.values[name])
    others = {id(_weight(small, name)) for name in names}
    for new, old in zip(small.weights, without.weights, strict=True):
        if id(new) not in others:
            np.testing.assert_array_equal(np.asarray(new), np.asarray(old))
    found = tfprune.verify(model, plan, pruned=small, tolerance=tolerance)
    assert found and found.magnitude > 0, str(found)
    assert not tfprune.verify(model, plan, pruned=without, tolerance=tolerance)
    assert not tfprune.verify(model, plain, pruned=small, tolerance=tolerance)
    for old, now in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, np.asarray(now))
    return plan


@pytest.mark.parametrize(
    "names",
    [
        ["project/kernel"],
        ["expand/kernel", "head/kernel"],  # both read the residual sum; one behind a flatten
        ["depthwise/kernel", "depthwise/bias"],
        ["stem_norm/gamma", "stem_norm/moving_variance"],
        ["head/bias"],
        ["stem/kernel", "stem/bias", "stem_norm/beta", "expand/bias", "depthwise/kernel",
         "squeeze/kernel", "excite/kernel", "excite/bias", "project/bias", "head/kernel"],
    ],
)  # fmt: skip
def test_residual(names):
    _check(toys.residual(), names)


def _flat(framework):
    layers = framework.layers
    inputs = framework.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, padding="same", name="first")(inputs)
    y = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="depthwise")(x)
    y = layers.Conv2D(8, 1, name="back")(layers.BatchNormalization(name="norm")(y))
    x = layers.Flatten()(layers.ReLU()(layers.Add()([x, y])))
    return randomize(framework.Model(inputs, layers.Dense(4, name="head")(x)))


@pytest.mark.parametrize("framework", [keras, tf_keras])
def test_frameworks(framework):
    model = _flat(framework)
    plan = _check(
        model, ["depthwise/kernel", "norm/gamma", "back/kernel", "head/kernel", "first/bias"]
    )
    assert len(plan.values) == 5


def test_masked_by_hand():
    """The oracle's masked model against one made by hand, with a flatten between channels."""
    inputs = keras.Input((2, 3, 2))
    x = keras.layers.Conv2D(4, 1, name="conv")(inputs)
    x = keras.layers.Dense(3, name="head")(keras.layers.Flatten()(x))
    model = randomize(keras.Model(inputs, x))
    kept = [0, 2]
    random = np.random.default_rng(0)
    kernel = random.standard_normal((2 * 3 * 2, 3)).astype("float32")
    bias = random.standard_normal(2).astype("float32")
    plan = PruningPlan.of(
        tfprune.analyse(model), {"conv": kept}, values={"head/kernel": kernel, "conv/bias": bias}
    )
    masked = keras.models.clone_model(model)
    masked.set_weights(model.get_weights())
    whole = np.zeros((2, 3, 4, 3), "float32")
    whole[:, :, kept] = kernel.reshape(2, 3, 2, 3)
    masked.get_layer("head").kernel.assign(whole.reshape(-1, 3))
    old_kernel, whole_bias = masked.get_layer("conv").get_weights()
    whole_bias[kept] = bias
    masked.get_layer("conv").set_weights([old_kernel, whole_bias])
    x = random.standard_normal((5, 2, 3, 2)).astype("float32")
    # A product of twelve terms in another order: a few roundings of values around ten.
    np.testing.assert_allclose(plan.apply(model)(x), masked(x), rtol=1e-5, atol=1e-5)
    assert tfprune.verify(model, plan, pruned=masked, tolerance=ROUNDING)


def test_the_oracle_sees_one_wrong_filter():
    model = toys.residual()
    plan = _with_values(model, ["project/kernel"])
    small = plan.apply(model)
    kernel = np.asarray(small.get_layer("project").kernel).copy()
    kernel[..., 0] += 0.5
    small.get_layer("project").kernel.assign(kernel)
    assert not tfprune.verify(model, plan, pruned=small, tolerance=ROUNDING)


def test_nothing_pruned():
    """A plan may only give values."""
    model = toys.chain()
    _check(model, ["conv1/kernel"], PruningPlan.of(tfprune.analyse(model), {}))


def test_normalisation_across_channels():
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(8, 1, name="conv")(inputs)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Dense(2, name="head")(keras.layers.Flatten()(x))
    model = randomize(keras.Model(inputs, x))
    plan = _check(model, ["conv/kernel", "norm/gamma", "norm/beta", "head/kernel"])
    assert tfprune.verify(model, plan).inexact == ("conv",)


@pytest.mark.parametrize("framework", [keras, tf_keras])
def test_attention_scales_queries(framework):
    """Rebuilt queries are scaled for the smaller width; given ones are what they are."""
    inputs = framework.Input((5, 6))
    x = framework.layers.MultiHeadAttention(2, 8, name="attention")(inputs, inputs)
    x = framework.layers.Flatten()(x)
    model = randomize(framework.Model(inputs, framework.layers.Dense(2, name="head")(x)))
    graph = tfprune.analyse(model)
    random = np.random.default_rng(0)
    values = {
        "attention/query/kernel": random.standard_normal((6, 2, 3)).astype("float32"),
        "attention/query/bias": random.standard_normal((2, 3)).astype("float32"),
    }
    plain = PruningPlan.of(graph, {"attention:key width": [0, 3, 6]})
    plan = plain.with_values(graph, values)
    small = plan.apply(model)
    query = small.get_layer("attention").get_weights()[:2]
    for value, weight in zip(values.values(), query, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert tfprune.verify(model, plan, pruned=small, tolerance=ROUNDING)
    assert not tfprune.verify(model, plan, pruned=plain.apply(model), tolerance=ROUNDING)


def test_nested_and_shared():
    inner_inputs = keras.Input((6, 6, 8))
    inner = keras.Model(
        inner_inputs, keras.layers.Conv2D(8, 3, padding="same", name="conv")(inner_inputs),
        name="inner",
    )  # fmt: skip
    inputs = keras.Input((6, 6, 3))
    x = inner(inner(keras.layers.Conv2D(8, 1, name="stem")(inputs)))
    x = keras.layers.Dense(3, name="head")(keras.layers.GlobalAveragePooling2D()(x))
    model = randomize(keras.Model(inputs, x))
    graph = tfprune.analyse(model)
    (group,) = graph.prunable
    kernel = np.random.default_rng(1).standard_normal((3, 3, 5, 5)).astype("float32")
    plan = PruningPlan.of(graph, {group.name: range(3, 8)}, values={"inner/conv/kernel": kernel})
    small = plan.apply(model)
    np.testing.assert_array_equal(small.get_layer("inner").get_layer("conv").kernel, kernel)
    assert tfprune.verify(model, plan, pruned=small, tolerance=ROUNDING)


def test_types_of_the_model():
    """Values of another precision take the type of the weight."""
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(8, 3, name="conv", dtype="float64")(inputs)
    x = keras.layers.Conv2D(6, 3, name="half", dtype="bfloat16")(x)
    x = keras.layers.GlobalAveragePooling2D(dtype="float32")(x)
    model = randomize(keras.Model(inputs, keras.layers.Dense(2, name="head")(x)))
    value = np.random.default_rng(0).standard_normal((3, 3, 2, 3))
    plan = PruningPlan.of(
        tfprune.analyse(model), {"conv": [0, 7], "half": [1, 2, 4]},
        values={"half/kernel": value, "conv/bias": np.array([1, 2], "float16")},
    )  # fmt: skip
    small = plan.apply(model)
    assert [str(small.get_layer(name).kernel.dtype) for name in ("conv", "half")] == [
        "float64", "bfloat16",
    ]  # fmt: skip
    kernel = keras.ops.convert_to_numpy(keras.ops.cast(small.get_layer("half").kernel, "float32"))
    # bfloat16 has eight bits: half a unit in the last place is 2**-9 of the value
    np.testing.assert_allclose(kernel, value, rtol=2**-8)
    # two layers, each rounded once to eight bits, with cancellation in the sums
    assert tfprune.verify(model, plan, pruned=small, tolerance=4e-2)


def test_siblings_get_the_same_values(tmp_path):
    plan = _with_values(toys.residual(), ["project/kernel", "head/bias"])
    plan.save(tmp_path / "plan.json")
    sibling = toys.residual(seed=7)
    plan = PruningPlan.load(tmp_path / "plan.json")
    small = plan.apply(sibling)
    for name, value in plan.values.items():
        np.testing.assert_array_equal(np.asarray(_weight(small, name)), value)
    assert tfprune.verify(sibling, plan, pruned=small, tolerance=ROUNDING)


def test_values_that_no_longer_fit(tmp_path):
    """A plan put together by hand is checked when it is used."""
    model = toys.chain()
    plan = PruningPlan.of(
        tfprune.analyse(model), {"conv0": [1, 4]}, values={"conv0/bias": [1.0, 2.0]}
    )
    other = PruningPlan({"conv0": (1, 4, 5)}, plan.widths, plan.structure, {}, plan.values)
    for use in (other.apply, lambda model: tfprune.verify(model, other)):
        with pytest.raises(tfprune.TfpruneError, match=r"shape \(3,\) for 'conv0/bias'"):
            use(model)


@pytest.mark.parametrize("framework", [keras, tf_keras])
def test_source_and_plan_are_left_alone(framework):
    model = _flat(framework)
    before = [np.asarray(value).copy() for value in model.weights]
    plan = _with_values(model, ["back/kernel", "back/bias"])
    values = {name: value.copy() for name, value in plan.values.items()}
    small = plan.apply(model)
    assert tfprune.verify(model, plan, pruned=small)
    # Training the pruned model moves neither the plan nor the source.
    small.compile("sgd", "mse")
    small.fit(toys.images(4, 6), np.ones((4, 4), "float32"), epochs=1, verbose=0)
    assert not np.array_equal(np.asarray(_weight(small, "back/kernel")), values["back/kernel"])
    for name, value in values.items():
        np.testing.assert_array_equal(plan.values[name], value)
    for old, now in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, np.asarray(now))
