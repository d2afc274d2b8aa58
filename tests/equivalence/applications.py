"""The models of keras.applications with weights and inputs on which equality can be judged.

Shared by the tests of this folder and by the benchmarks.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np

MODELS = sorted(
    name
    for name, value in vars(keras.applications).items()
    if inspect.isfunction(value) and name[0].isupper()
)


def build(name: str, size: int = 96, grain: int = 1) -> Any:
    """A model with random weights and statistics, and logits as outputs.

    Args:
        name: of the function in ``keras.applications``.
        size: height and width of the images.
        grain: of the images whose statistics it gets, see :func:`images_for`.
    """
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classifier_activation=None
    )
    return condition(model, images_for(model, name, 4, grain=grain))


def condition(model: Any, images: Any) -> Any:
    """Random weights and statistics under which activations stay within a few orders of one.

    Statistics are those of the images, each off by a random factor: with arbitrary ones
    activations grow to 1e8 in the deep networks, gates saturate, and rounding is all that is left.

    Args:
        model: changed in place, and returned.
        images: a batch of inputs.
    """
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if len(variable.shape) == 1 and not variable.path.endswith(("mean", "variance")):
            # Biases and offsets start at zero, scales at one or (LayerScale) nearly zero.
            scale = variable.path.endswith("gamma")
            low, high = (0.5, 1.5) if scale else (-0.3, 0.3)
            variable.assign(rng.uniform(low, high, variable.shape))
    layers = list(model._flatten_layers(include_self=False, recursive=True))
    norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]
    if not any(type(layer).__name__.endswith("Normalization") for layer in layers):
        # Glorot's initial values lose half of the variance at every ReLU; with nothing to restore
        # it, the outputs of VGG would be those of its biases, whatever the image.
        for variable in model.weights:
            if len(variable.shape) > 1:
                variable.assign(variable * np.sqrt(2))
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    if norms:
        model(images, training=True)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
        for variable in (layer.moving_mean, layer.moving_variance):
            variable.assign(variable * rng.uniform(0.8, 1.25, variable.shape))
    return model


def images_for(model: Any, name: str, count: int, *, seed: int = 1, grain: int = 1) -> Any:
    """Random images in the range that the model expects; some rescale inside.

    Args:
        model: tells the size.
        name: of the model, tells the range.
        count: how many.
        seed: of the random numbers.
        grain: pixels a side of squares of one colour. Networks end in an average over the image,
            after which images of independent pixels are all alike; coarse ones are not.
    """
    height, width, channels = model.input_shape[1:]
    coarse = (count, -(-height // grain), -(-width // grain), channels)
    images = np.random.default_rng(seed).uniform(-1, 1, coarse)
    images = images.repeat(grain, axis=1).repeat(grain, axis=2)[:, :height, :width]
    if name.startswith(("EfficientNet", "ConvNeXt", "MobileNetV3")):
        images = 127.5 * (images + 1)
    return images.astype("float32")
