"""Little MobileNet-like networks with zeros, for either Keras."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

WIDTH = 12  # not that of any image inside: XNNPACK confuses height and channels
Part = Callable[[Any, Any], Any]


def stem(keras: Any, x: Any, padding: Any = ((1, 1), (1, 1))) -> Any:
    x = keras.layers.ZeroPadding2D(padding, name="stem_pad")(x)
    return keras.layers.ReLU(6.0)(keras.layers.Conv2D(WIDTH, 3, strides=2, name="stem")(x))


def block(keras: Any, x: Any, padding: Any = None, size: int = 3) -> Any:
    """A depthwise convolution (with stride 2 where it is padded by hand) and a 1x1 one."""
    layers = keras.layers
    if padding is None:
        x = layers.DepthwiseConv2D(size, padding="same")(x)
    else:
        x = layers.DepthwiseConv2D(size, strides=2)(layers.ZeroPadding2D(padding)(x))
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    return layers.ReLU(6.0)(layers.BatchNormalization()(layers.Conv2D(WIDTH, 1)(x)))


def pooled(keras: Any, x: Any) -> Any:
    return keras.layers.Dense(3, name="head")(keras.layers.GlobalAveragePooling2D()(x))


def network(
    keras: Any,
    *,
    begin: Part = stem,
    middle: Part = lambda keras, x: x,
    end: Part = pooled,
    channels: int = 3,
    zeros: float = 0.9,
) -> Any:
    """Stem, block, ``middle``, block, ``end``; ``zeros`` of each 1x1 kernel are zero."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 16, channels), name="image")
    x = block(keras, begin(keras, inputs))
    x = block(keras, middle(keras, x))
    return with_zeros(keras.Model(inputs, end(keras, x), name="net"), zeros)


def with_zeros(model: Any, zeros: float) -> Any:
    """Sets a fraction of every 1x1 kernel to zero, nested models included.

    The others are drawn so that signals keep their size, and biases are not zero: a network that
    is dead would agree with any other.
    """
    rng = np.random.default_rng(0)
    for layer in model._flatten_layers(include_self=False):
        kernel = getattr(layer, "kernel", None)
        if kernel is None:
            continue
        values = rng.normal(size=kernel.shape)
        if len(kernel.shape) == 4 and tuple(kernel.shape[:2]) == (1, 1):
            flat = values.reshape(-1)
            flat[rng.permutation(flat.size)[: round(zeros * flat.size)]] = 0
        depthwise = "depthwise" in type(layer).__name__.lower()
        inputs = np.prod(kernel.shape[:2] if depthwise else kernel.shape[:-1])
        share = max(np.mean(values != 0), 1e-6)
        kernel.assign(values * np.sqrt(2 / (inputs * share)))
        if layer.bias is not None:
            layer.bias.assign(rng.normal(size=layer.bias.shape))
    return model
