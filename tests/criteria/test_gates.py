"""Gate gradients: against finite differences, and against Taylor's sums over weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tfprune
from tests import toys
from tfprune.batches import iterate
from tfprune.criteria.gates import moments, phi, readings_of
from tfprune.errors import ArgumentError, DataError, ModelError
from tfprune.graph.masking import MaskedModel
from tfprune.graph.trace import raw_variable
from tfprune.losses import resolve_loss
from tfprune.testing import randomize

layers = keras.layers
DATA = (toys.images(), toys.labels())


def concatenation():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    a = layers.Conv2D(6, 3, padding="same", activation="relu", name="a")(inputs)
    b = layers.Conv2D(4, 1, activation="tanh", name="b")(inputs)
    x = layers.Concatenate(name="both")([a, b, a])
    x = layers.Conv2D(8, 3, groups=2, name="grouped")(x)
    x = layers.SeparableConv2D(7, 3, activation="relu", name="separable")(x)
    x = layers.Flatten(name="flat")(x)
    return randomize(keras.Model(inputs, layers.Dense(5, name="head")(x)))


def nested():
    """A nested model that is called twice, and a layer that is."""
    keras.utils.set_random_seed(0)
    inner = keras.Sequential(
        [
            keras.Input((8, 8, 6)),
            layers.Conv2D(5, 3, padding="same", activation="relu", name="first"),
            layers.Conv2D(6, 1, name="second"),
        ],
        name="inner",
    )
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 1, activation="relu", name="stem")(inputs)
    x = layers.ReLU(name="again")(inner(inner(x)))
    shared = layers.Conv2D(6, 1, name="shared")
    x = layers.Add(name="sum")([shared(x), shared(shared(x))])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return randomize(keras.Model(inputs, layers.Dense(5, activation="softmax", name="head")(x)))


def attention():
    """Heads, key and value widths stand in no tensor between layers; widths of inputs do."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = layers.Reshape((8, 24), name="rows")(inputs)
    x = layers.Dense(10, activation="relu", name="embed")(x)
    y = layers.MultiHeadAttention(3, 4, name="attention")(x, x)
    x = layers.Add(name="sum")([x, y])
    x = layers.GRU(6, reset_after=False, name="recurrent")(x)
    return randomize(keras.Model(inputs, layers.Dense(5, name="head")(x)))


def wrapped():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 1, activation="relu", name="conv")(inputs)
    x = layers.TimeDistributed(layers.Conv1D(5, 3, name="inside"), name="wrapper")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return randomize(keras.Model(inputs, layers.Dense(5, name="head")(x)))


MODELS = {
    "plain": toys.chain,
    "residual and depthwise": toys.residual,
    "concatenation and flatten": concatenation,
    "nested": nested,
    "attention": attention,
    "wrapped": wrapped,
}


def over_weights(model, data, loss=None):
    """The sum of w dL/dw over the slices that read a channel, un-squared, for the mean loss."""
    graph = tfprune.analyse(model)
    members = {g.name: [m for m in g.members if m.masked] for g in graph.prunable}
    (x, y), *rest = list(iterate(data, batch_size=1000, labels=True))
    assert not rest
    objective = resolve_loss(model, loss, y)
    variables = {id(m.variable): m.variable for several in members.values() for m in several}
    raw = {
        key: raw_variable(v) if graph.framework == "keras" else v for key, v in variables.items()
    }
    with tf.GradientTape() as tape:
        tape.watch(list(raw.values()))
        value = tf.reduce_mean(objective(tf.constant(y), model(tf.constant(x), training=False)))
    gradients = tape.gradient(value, raw)
    found = {}
    for name, several in members.items():
        found[name] = np.zeros(graph[name].width)
        for member in several:
            key = id(member.variable)
            product = np.asarray(gradients[key], np.float64) * np.asarray(raw[key])
            others = tuple(a for a in range(product.ndim) if a != member.axis)
            np.add.at(found[name], member.channels, product.sum(others)[member.positions])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_mean_is_taylors_sum_before_squaring(name):
    model = MODELS[name]()
    found = phi(tfprune.analyse(model), DATA)
    expected = over_weights(model, DATA)
    assert found.keys() == expected.keys()
    for group, values in found.items():
        assert values.shape == (12, tfprune.analyse(model)[group].width)
        # Two float32 graphs of the same derivative; sums over examples and positions cancel.
        scale = np.abs(values).mean()
        np.testing.assert_allclose(values.mean(0), expected[group], rtol=1e-4, atol=1e-4 * scale)
        assert np.abs(expected[group]).max() > 0


def test_which_readers_are_reached_from_outside():
    assert not readings_of(tfprune.analyse(toys.residual()))[1]
    assert not readings_of(tfprune.analyse(concatenation()))[1]
    inside = readings_of(tfprune.analyse(attention()))[1]
    assert {name.partition(":")[2] for name in inside} == {"heads", "key width", "value width", ""}
    assert "embed" not in inside and "recurrent" in inside
    assert set(readings_of(tfprune.analyse(wrapped()))[1]) == {"conv"}


@pytest.mark.parametrize("name", ["residual and depthwise", "attention"])
def test_against_finite_differences(name):
    """A gate a little above and below one, example by example, at the weights that read."""
    model = MODELS[name]()
    graph = tfprune.analyse(model)
    x, y = DATA[0][:4], DATA[1][:4]
    found = phi(graph, (x, y))
    masked = MaskedModel(graph)

    def losses():
        logits = np.asarray(masked.outputs([x])[0], np.float64)
        shifted = logits - logits.max(1, keepdims=True)
        return np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(y)), y]

    sites = {s.full_name: s.variable for s in masked.graph.record.sites.values()}
    step = 1e-2
    for group in graph.prunable[:4]:
        sides = []
        for sign in (1, -1):
            for member in group.members:
                if member.masked:
                    value = np.asarray(member.variable).copy()
                    index = [slice(None)] * value.ndim
                    index[member.axis] = member.positions[member.channels == 0]
                    value[tuple(index)] *= 1 + sign * step
                    sites[member.full_name].assign(value)
            sides.append(losses())
            masked.restore()
        numeric = (sides[0] - sides[1]) / (2 * step)
        # Central differences of float32 outputs: rounding of 1e-7 over the step, and its square.
        size = np.abs(found[group.name]).max()
        np.testing.assert_allclose(found[group.name][:, 0], numeric, rtol=1e-2, atol=1e-3 * size)


def test_moments_do_not_depend_on_the_batches():
    graph = tfprune.analyse(toys.chain(widths=(6, 8)))
    values = phi(graph, DATA, batch_size=12)
    found = moments(graph, DATA, batch_size=5)
    diagonal = moments(graph, DATA, batch_size=12, second="diagonal")
    assert found.examples == diagonal.examples == 12
    for name, rows in values.items():
        scale = np.abs(rows).max()
        fisher = rows.T @ rows / 12
        # float32 gradients, in batches of other sizes.
        np.testing.assert_allclose(found.mean[name], rows.mean(0), atol=1e-5 * scale)
        np.testing.assert_allclose(found.second[name], fisher, atol=1e-5 * scale**2)
        np.testing.assert_allclose(diagonal.second[name], np.diag(fisher), atol=1e-5 * scale**2)
    limited = moments(graph, DATA, batch_size=5, batches=2)
    assert limited.examples == 10


def test_tf_keras():
    tf_keras.utils.set_random_seed(0)
    inputs = tf_keras.Input((8, 8, 3))
    x = tf_keras.layers.Conv2D(6, 3, padding="same", name="stem")(inputs)
    y = tf_keras.layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    y = tf_keras.layers.Conv2D(6, 1, activation="relu", name="project")(y)
    x = tf_keras.layers.Flatten(name="flat")(tf_keras.layers.Add(name="sum")([x, y]))
    head = tf_keras.layers.Dense(5, activation="softmax", name="head")
    model = tf_keras.Model(inputs, head(x))
    found = phi(tfprune.analyse(model), DATA, batch_size=7)
    for name, expected in over_weights(model, DATA).items():
        scale = np.abs(found[name]).mean()
        # Two float32 graphs of the same derivative.
        np.testing.assert_allclose(found[name].mean(0), expected, rtol=1e-4, atol=1e-4 * scale)


def test_several_outputs_and_other_losses():
    """The loss sees the outputs in the model's structure; one value per position is averaged."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, activation="relu", name="conv")(inputs)
    mask = layers.Conv2D(1, 1, name="mask")(x)
    score = layers.Dense(1, activation="sigmoid", name="score")(
        layers.GlobalAveragePooling2D(name="pool")(x)
    )
    model = randomize(keras.Model(inputs, {"mask": mask, "score": score}))
    graph = tfprune.analyse(model)

    def both(labels, outputs):
        return tf.reduce_mean(outputs["mask"][..., 0] ** 2, [1, 2]) + outputs["score"][:, 0]

    y = np.zeros(12, "float32")
    sides = [
        phi(graph, (DATA[0], y), lambda _, o: tf.reduce_mean(o["mask"][..., 0] ** 2, [1, 2])),
        phi(graph, (DATA[0], y), lambda _, o: o["score"]),
    ]
    total = phi(graph, (DATA[0], y), both)["conv"]
    # float32.
    np.testing.assert_allclose(total, sides[0]["conv"] + sides[1]["conv"], rtol=1e-4, atol=1e-7)

    single = randomize(keras.Model(inputs, score))
    labels = toys.labels(classes=2)
    inferred = phi(tfprune.analyse(single), (DATA[0], labels))["conv"]
    column = phi(tfprune.analyse(single), (DATA[0], labels[:, None]))["conv"]
    np.testing.assert_array_equal(inferred, column)
    assert len(np.unique(inferred[:, 0])) > 1


def test_one_hot_and_integer_labels_agree():
    graph = tfprune.analyse(toys.chain())
    one_hot = np.eye(5, dtype="int64")[DATA[1]]
    first, second = phi(graph, DATA), phi(graph, (DATA[0], one_hot))
    for name, values in first.items():
        # Two float32 formulas of the same cross-entropy.
        scale = np.abs(values).max()
        np.testing.assert_allclose(second[name], values, rtol=1e-4, atol=1e-5 * scale)


def test_bad_input():
    graph = tfprune.analyse(toys.chain())
    with pytest.raises(DataError, match="Labels"):
        phi(graph, DATA[0])
    with pytest.raises(DataError, match="empty"):
        phi(graph, (DATA[0][:0], DATA[1][:0]))
    with pytest.raises(DataError, match=r"Expected finite gradients.*conv0"):
        phi(graph, (np.full_like(DATA[0], np.nan), DATA[1]))
    with pytest.raises(ArgumentError, match=r"one value per example.*shape \(\) for 12"):
        phi(graph, DATA, lambda y, outputs: tf.reduce_mean(outputs))
    with pytest.raises(ArgumentError, match="Expected second"):
        moments(graph, DATA, second="off")


def test_examples_on_one_axis_with_positions():
    inputs = keras.Input((8, 8, 3))
    x = keras.ops.reshape(layers.Conv2D(6, 1, name="conv")(inputs), (-1, 6))
    x = layers.Dense(5, name="head")(layers.Dense(4, name="hidden")(x))
    x = keras.ops.mean(keras.ops.reshape(x, (-1, 64, 5)), 1)
    graph = tfprune.analyse(keras.Model(inputs, x))
    assert [group.name for group in graph.prunable] == ["hidden"]
    with pytest.raises(ModelError, match=r"first axis is the examples'.*'head'"):
        phi(graph, DATA, "sparse_categorical_crossentropy")


def test_another_backend(monkeypatch):
    graph = tfprune.analyse(toys.chain())
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ArgumentError, match=r"Expected a model on TensorFlow.*'jax'"):
        phi(graph, DATA)


def test_the_model_is_only_read():
    model = wrapped()
    before = [np.array(w) for w in model.get_weights()]
    phi(tfprune.analyse(model), DATA)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
