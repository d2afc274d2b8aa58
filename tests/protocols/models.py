"""Small networks for the tests of the protocols."""

from __future__ import annotations

from typing import Any

import numpy as np


def classifier(keras: Any, *, dropout: float = 0.0, softmax: bool = False, seed: int = 0) -> Any:
    """A convolution, batch normalisation and a dense layer, for 6x6 images and three classes."""
    initial = keras.initializers.GlorotUniform
    x = image = keras.Input((6, 6, 2))
    x = keras.layers.Conv2D(4, 3, kernel_initializer=initial(seed=seed))(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.ReLU()(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dropout(dropout)(x)
    activation = "softmax" if softmax else None
    x = keras.layers.Dense(3, activation=activation, kernel_initializer=initial(seed=seed + 1))(x)
    return keras.Model(image, x)


def examples(count: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of noise with a brighter half that tells the class."""
    generator = np.random.default_rng(seed)
    y = np.arange(count, dtype=np.int32) % 3
    x = generator.normal(size=(count, 6, 6, 2)).astype(np.float32)
    for number, label in enumerate(y):
        x[number, 2 * label : 2 * label + 2] += 2
    return x, y
