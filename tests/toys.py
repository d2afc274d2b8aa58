"""Small models that several tests share."""

import keras
import numpy as np

from tfprune.testing import randomize


def chain(widths=(8, 12, 16), classes=5, size=8, seed=0):
    """Plain convolutions with batch normalisation, global pooling and a dense head."""
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((size, size, 3), name="image")
    for number, width in enumerate(widths):
        x = keras.layers.Conv2D(width, 3, padding="same", name=f"conv{number}")(x)
        x = keras.layers.BatchNormalization(name=f"norm{number}")(x)
        x = keras.layers.ReLU(name=f"relu{number}")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return randomize(keras.Model(inputs, keras.layers.Dense(classes, name="head")(x), name="chain"))


def residual(seed=0):
    """A residual block with a depthwise convolution and a gate."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(16, 3, padding="same", name="stem")(inputs)
    x = layers.BatchNormalization(name="stem_norm")(x)
    x = layers.ReLU()(x)
    y = layers.Conv2D(24, 1, name="expand")(x)
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(y)
    y = layers.ReLU()(y)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(y)
    gate = layers.Conv2D(8, 1, activation="relu", name="squeeze")(gate)
    gate = layers.Conv2D(24, 1, activation="sigmoid", name="excite")(gate)
    y = layers.Multiply(name="gated")([y, gate])
    y = layers.Conv2D(16, 1, name="project")(y)
    x = layers.Add(name="sum")([x, y])
    x = layers.Flatten(name="flat")(x)
    return randomize(keras.Model(inputs, layers.Dense(5, name="head")(x), name="residual"))


def images(count=12, size=8, channels=3, seed=0):
    """Standard-normal images, float32."""
    shape = (count, size, size, channels)
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def labels(count=12, classes=5, seed=0):
    """Class numbers."""
    return np.random.default_rng(seed).integers(0, classes, count)
