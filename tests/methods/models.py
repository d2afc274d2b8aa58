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
