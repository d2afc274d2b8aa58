"""Small models with everything that can stand in a graph, each with inputs for it."""

from __future__ import annotations

import keras
import numpy as np

from tfprune import zoo

layers, ops = keras.layers, keras.ops


def normal(*shape, seed=0):
    """Standard-normal numbers, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def tokens():
    """Two sequences, padded with 0."""
    return np.array([[1, 2, 0, 0, 0], [3, 4, 5, 0, 0]])


def small(dropout=0.0):
    """Two dense layers; the network of the tests that train."""
    keras.utils.set_random_seed(0)
    middle = [layers.Dropout(dropout, seed=1)] if dropout else []
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16, activation="tanh", name="hidden"),
            *middle,
            layers.Dense(4, name="head"),
        ],
        name="small",
    )


def residual():
    """Residual, concatenation, slices and reshapes as keras.ops operations."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", name="first")(inputs)
    y = layers.Conv2D(4, 3, padding="same", name="second")(x)
    x = ops.concatenate([x + y, ops.relu(y)[..., 1:3]], axis=-1)
    x = ops.mean(ops.reshape(x, (-1, 64, 6)), axis=1)
    return keras.Model(inputs, layers.Dense(2, name="head")(x) * 2.0, name="residual"), normal(
        2, 8, 8, 3
    )


def shared():
    """One layer, two inputs in a list."""
    layer, a, b = layers.Dense(4, name="shared"), keras.Input((4,)), keras.Input((4,))
    x = layers.Add()([layer(a), layer(b)])
    return keras.Model([a, b], layers.Dense(2)(x)), [normal(2, 4), normal(2, 4, seed=1)]


def nested():
    """Nested in nested, called twice."""
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="a")], name="inner")
    middle_in = keras.Input((4,))
    middle_out = layers.Dense(4, name="b")(inner(middle_in)) + middle_in
    middle = keras.Model(middle_in, middle_out, name="middle")
    inputs = keras.Input((4,))
    outputs = layers.Dense(2, name="head")(middle(middle(inputs)))
    return keras.Model(inputs, outputs), normal(2, 4)


def dictionaries():
    """Dictionaries in and out."""
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    x = layers.Concatenate()([layers.Dense(3)(a), b])
    outputs = {"y": layers.Dense(2)(x), "z": layers.Dense(1)(x)}
    return keras.Model({"a": a, "b": b}, outputs), {"a": normal(2, 4), "b": normal(2, 3)}


def time_masks():
    """Embedding in a nested model, whose masks of time steps go on to recurrent layers."""
    inputs = keras.Input((5,), dtype="int32")
    table = layers.Embedding(9, 4, mask_zero=True, name="table")
    embed = keras.Sequential([keras.Input((5,), dtype="int32"), table], name="embed")
    x = layers.LSTM(3, return_sequences=True)(embed(inputs))
    x = layers.TimeDistributed(layers.Dense(4))(x)
    return keras.Model(inputs, layers.Bidirectional(layers.GRU(3))(x)), tokens()


def states():
    """A stateful layer that returns its states, which another begins with."""
    inputs = keras.Input((5,), batch_size=2, dtype="int32")
    x = layers.Embedding(9, 4)(inputs)
    x, hidden, cell = layers.LSTM(3, return_state=True, return_sequences=True, stateful=True)(x)
    x = layers.LSTM(3)(x, initial_state=[hidden, cell])
    return keras.Model(inputs, layers.Dense(2)(x)), tokens()


def attention():
    """Tensors and options by name."""
    query, value = keras.Input((4, 6)), keras.Input((5, 6))
    allowed = keras.Input((4, 5), dtype="bool")
    x = layers.MultiHeadAttention(2, 3, name="first")(
        query=query, value=value, use_causal_mask=True
    )
    x, scores = layers.MultiHeadAttention(2, 3, name="second")(
        x, value=value, attention_mask=allowed, return_attention_scores=True
    )
    x = layers.Attention()([x, value])
    return keras.Model([query, value, allowed], [layers.Dense(2)(x), scores]), [
        normal(2, 4, 6),
        normal(2, 5, 6),
        np.arange(40).reshape(2, 4, 5) % 3 > 0,
    ]


def frozen():
    """A frozen layer, and a frozen nested model called with training=False."""
    inputs = keras.Input((4,))
    body = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3), layers.BatchNormalization()], name="body"
    )
    body.trainable = False
    x = layers.Dense(4, trainable=False)(inputs)
    return keras.Model(inputs, layers.Dense(2)(body(x, training=False))), normal(2, 4)


@keras.saving.register_keras_serializable(package="tests")
def squared(x):
    """For a Lambda."""
    return x * x


def functions():
    """A Lambda of a function that Keras can save, and a layer with a seed."""
    inputs = keras.Input((4,))
    x = layers.Lambda(squared, output_shape=(4,))(layers.Dropout(0.5, seed=3)(inputs))
    return keras.Model(inputs, layers.Dense(2)(x)), normal(2, 4)


def sequential():
    """Sequential in sequential."""
    body = keras.Sequential([layers.Conv2D(4, 3), layers.BatchNormalization()], name="body")
    return keras.Sequential([keras.Input((8, 8, 3)), body, layers.Flatten(), layers.Dense(2)]), (
        normal(2, 8, 8, 3)
    )


def of_the_zoo():
    """A CIFAR network."""
    model = zoo.resnet_cifar(8)
    return model, normal(2, *model.input_shape[1:])


NETWORKS = {
    build.__name__: build
    for build in (
        residual, shared, nested, dictionaries, time_masks, states, attention, frozen, functions,
        sequential, of_the_zoo,
    )
}  # fmt: skip
