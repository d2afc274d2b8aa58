"""Networks and data that the tests of methods share."""

from __future__ import annotations

import keras
import numpy as np


def mlp(widths=(6, 5, 4), features=7, classes=3, bias=True, seed=0, head=None, hidden="relu"):
    """Dense layers, by default with ReLU and a linear head."""
    keras.utils.set_random_seed(seed)
    dense = keras.layers.Dense
    layers = [dense(w, hidden, use_bias=bias, name=f"fc{i}") for i, w in enumerate(widths, 1)]
    layers.append(dense(classes, head, use_bias=bias, name="head"))
    return keras.Sequential([keras.Input((features,)), *layers], name="mlp")


def lenet_300_100():
    """The network of 784-300-100-10 units."""
    dense = keras.layers.Dense
    return keras.Sequential(
        [
            keras.Input((784,)),
            dense(300, "relu", name="fc1"),
            dense(100, "relu", name="fc2"),
            dense(10, name="fc3"),
        ]
    )


def lenet_5():
    """Caffe's LeNet-5: 20 and 50 filters of 5x5, 500 and 10 units."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(20, 5, name="conv1"),
            layers.MaxPooling2D(),
            layers.Conv2D(50, 5, name="conv2"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(500, "relu", name="fc1"),
            layers.Dense(10, name="fc2"),
        ]
    )


def rows(count=24, features=7, classes=3, seed=0):
    """Standard-normal rows and class numbers."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((count, features)).astype("float32")
    return x, random.integers(0, classes, count)


def snapshot(model):
    """Copies of all variables, statistics and seeds included."""
    return [np.asarray(variable).copy() for variable in model.variables]


def same(before, model):
    """Whether the variables are bit for bit those of the snapshot."""
    return all(
        np.array_equal(a, np.asarray(b)) for a, b in zip(before, model.variables, strict=True)
    )


def residual(seed=0, momentum=0.9):
    """A stem, a block with an addition, a wider convolution, and a head; batch-normalised.

    Channel groups: the stream (8: stem, second), first (6), last (10).
    """
    keras.utils.set_random_seed(seed)
    layers = keras.layers

    def unit(tensor, filters, name, relu=True):
        tensor = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=name)(tensor)
        tensor = layers.BatchNormalization(momentum=momentum, name=f"{name}_bn")(tensor)
        return layers.ReLU(name=f"{name}_relu")(tensor) if relu else tensor

    inputs = keras.Input((8, 8, 1), name="images")
    stream = unit(inputs, 8, "stem")
    branch = unit(unit(stream, 6, "first"), 8, "second", relu=False)
    stream = layers.ReLU(name="joined_relu")(layers.Add(name="joined")([stream, branch]))
    features = layers.GlobalAveragePooling2D(name="pool")(unit(stream, 10, "last"))
    return keras.Model(inputs, layers.Dense(3, name="head")(features), name="residual")


def stripes(count=48, seed=0):
    """Images of 8x8 pixels of three kinds (rows, columns, checks) in noise, and their kinds."""
    random = np.random.default_rng(seed)
    rows_, columns = np.indices((8, 8))
    kinds = np.stack([rows_ % 2, columns % 2, (rows_ + columns) % 2])[..., None] - 0.5
    y = random.integers(0, 3, count)
    x = kinds[y] + random.normal(0, 0.5, (count, 8, 8, 1))
    return x.astype("float32"), y


def stir(model, seed=0):
    """Random scales, shifts and statistics of batch normalisation, as training leaves them."""
    random = np.random.default_rng(seed)
    for variable in model.weights:
        if variable.name in ("gamma", "moving_variance"):
            variable.assign(random.uniform(0.3, 1.5, variable.shape))
        elif variable.name in ("beta", "moving_mean"):
            variable.assign(random.normal(0, 0.3, variable.shape))
    return model
