"""MobileNet-like networks with zeros, for either Keras: little here, larger in benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

WIDTH = 12  # not that of any image inside: XNNPACK confuses height and channels
SIZE = 16
Part = Callable[[Any, Any], Any]
KERAS_PAD = ((0, 1), (0, 1))


def stem(keras: Any, x: Any, width: int, padding: Any = ((1, 1), (1, 1))) -> Any:
    x = keras.layers.ZeroPadding2D(padding, name="stem_pad")(x)
    return keras.layers.ReLU(6.0)(keras.layers.Conv2D(width, 3, strides=2, name="stem")(x))


def block(keras: Any, x: Any, padding: Any = None, size: int = 3) -> Any:
    """A depthwise convolution (with stride 2 where it is padded by hand) and a 1x1 one."""
    layers, width = keras.layers, x.shape[-1]
    if padding is None:
        x = layers.DepthwiseConv2D(size, padding="same")(x)
    else:
        x = layers.DepthwiseConv2D(size, strides=2)(layers.ZeroPadding2D(padding)(x))
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    return layers.ReLU(6.0)(layers.BatchNormalization()(layers.Conv2D(width, 1)(x)))


def pooled(keras: Any, x: Any) -> Any:
    return keras.layers.Dense(3, name="head")(keras.layers.GlobalAveragePooling2D()(x))


def network(
    keras: Any,
    *,
    begin: Callable[[Any, Any, int], Any] = stem,
    middle: Part = lambda keras, x: x,
    end: Part = pooled,
    channels: int = 3,
    zeros: float = 0.9,
    size: int = SIZE,
    width: int = WIDTH,
) -> Any:
    """Stem, block, ``middle``, block, ``end``; ``zeros`` of each 1x1 kernel are zero.

    Images have ``size`` pixels a side, and layers ``width`` channels.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input((size, size, channels), name="image")
    x = block(keras, begin(keras, inputs, width))
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


def gate(keras: Any, x: Any, inner: Any = lambda keras, s: s) -> Any:
    """Squeeze and excitation."""
    layers, width = keras.layers, x.shape[-1]
    s = inner(keras, layers.GlobalAveragePooling2D(keepdims=True)(x))
    s = layers.Conv2D(width // 3, 1, activation="relu")(s)
    return layers.Multiply()([x, layers.Conv2D(width, 1, activation="sigmoid")(s)])


def dense_gate(keras: Any, x: Any) -> Any:
    """Squeeze and excitation by dense layers."""
    layers, width = keras.layers, x.shape[-1]
    s = layers.Dense(width // 3, activation="relu")(layers.GlobalAveragePooling2D()(x))
    s = layers.Reshape((1, 1, width))(layers.Dense(width, activation="sigmoid")(s))
    return layers.Multiply()([x, s])


def convolved(keras: Any, x: Any) -> Any:
    return keras.layers.Conv2D(3, 1)(keras.layers.GlobalAveragePooling2D(keepdims=True)(x))


def flattened(keras: Any, x: Any, pool: str = "GlobalAveragePooling2D", **options: Any) -> Any:
    layers = keras.layers
    return layers.Dense(3)(layers.Flatten()(getattr(layers, pool)(**options)(x)))


def constants(keras: Any, x: Any) -> Any:
    """One number per channel."""
    return np.linspace(0.5, 1.5, x.shape[-1], dtype="float32")


def normalised(keras: Any, x: Any) -> Any:
    """A batch normalisation that no convolution precedes, and that does something."""
    layers = keras.layers
    gamma = keras.initializers.RandomUniform(0.5, 1.5, seed=0)
    return layers.BatchNormalization(gamma_initializer=gamma, beta_initializer="ones")(x)


def part(name: str, *arguments: Any, **options: Any) -> Part:
    return lambda keras, x: getattr(keras.layers, name)(*arguments, **options)(x)


def convolution(*arguments: Any, **options: Any) -> Part:
    """A full convolution that keeps the number of channels."""
    return lambda keras, x: keras.layers.Conv2D(x.shape[-1], *arguments, **options)(x)


def act(name: str) -> dict[str, Any]:
    return {"middle": part("Activation", name)}


def unpadded_stem(padding: str) -> Callable[[Any, Any, int], Any]:
    return lambda k, x, width: k.layers.ReLU(6.0)(
        k.layers.Conv2D(width, 3, strides=2, padding=padding)(x)
    )


NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "70 %": {"zeros": 0.7},
    "68 %": {"zeros": 0.68},
    "65 %": {"zeros": 0.65},
    "60 %": {"zeros": 0.6},
    "50 %": {"zeros": 0.5},
    "Keras's stem": {"begin": lambda k, x, width: stem(k, x, width, KERAS_PAD)},
    "stem with padding 'same'": {"begin": unpadded_stem("same")},
    "stem without padding": {"begin": unpadded_stem("valid")},
    "grey image": {"channels": 1},
    "symmetric stride": {"middle": lambda k, x: block(k, x, 1)},
    "5x5": {"middle": lambda k, x: block(k, x, 2, 5)},
    "Keras's stride": {"middle": lambda k, x: block(k, x, KERAS_PAD)},
    "7x7": {"middle": lambda k, x: block(k, x, 3, 7)},
    "depthwise without padding": {"middle": part("DepthwiseConv2D", 3)},
    "depth multiplier": {"middle": part("DepthwiseConv2D", 3, padding="same", depth_multiplier=2)},
    "dilation": {"middle": part("DepthwiseConv2D", 3, padding="same", dilation_rate=2)},
    "residual": {"middle": lambda k, x: k.layers.Add()([x, block(k, x)])},
    "gate": {"middle": gate},
    "gate with tanh": {"middle": lambda k, x: gate(k, x, part("Activation", "tanh"))},
    "gate of dense layers": {"middle": dense_gate},
    "swish": act("swish"),
    "hard swish": act("hard_silu"),
    "hard sigmoid": act("hard_sigmoid"),
    "softplus": act("softplus"),
    "PReLU": {"middle": part("PReLU", shared_axes=[1, 2], alpha_initializer="random_normal")},
    "bilinear": {"middle": part("UpSampling2D", interpolation="bilinear")},
    "max pooling": {"middle": part("MaxPooling2D", 2)},
    "concatenation": {"middle": lambda k, x: k.layers.Concatenate()([block(k, x), block(k, x)])},
    "dense connection": {"middle": lambda k, x: k.layers.Concatenate()([x, block(k, x)])},
    "3x3": {"middle": convolution(3, padding="same")},
    "strided 1x1": {"middle": convolution(1, strides=2)},
    "groups": {"middle": convolution(1, groups=2)},
    "dense layer along channels": {"middle": lambda k, x: k.layers.Dense(x.shape[-1])(x)},
    "lone normalisation": {"middle": lambda k, x: normalised(k, k.layers.Add()([x, block(k, x)]))},
    "number added": {"middle": lambda k, x: x + 0.5},
    "numbers added": {"middle": lambda k, x: x + constants(k, x)},
    "factors": {"middle": lambda k, x: x * constants(k, x)},
    "subtraction": {"middle": lambda k, x: k.layers.Subtract()([x, block(k, x)])},
    "x + x": {"middle": lambda k, x: k.layers.Add()([x, x])},
    "convolution behind the pool": {"end": convolved},
    "flattened pool": {"end": lambda k, x: flattened(k, x, keepdims=True)},
    "pool as output": {"end": part("GlobalAveragePooling2D", keepdims=True)},
    "mean over height": {"end": lambda k, x: k.layers.Dense(3)(k.ops.mean(x, axis=1))},
    "max at the end": {"end": part("GlobalMaxPooling2D")},
    "average pooling at the end": {
        "end": lambda k, x: flattened(k, x, "AveragePooling2D", pool_size=x.shape[1])
    },
    "feature output": {"end": lambda k, x: [pooled(k, x), x]},
    "side branch": {"end": lambda k, x: [pooled(k, x), k.layers.Conv2D(2, 1)(x)]},
}
"""Options of :func:`network` by name: what XNNPACK's sparse path has and lacks, one at a time."""
