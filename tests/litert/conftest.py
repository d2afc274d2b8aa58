"""Small models of both Keras versions, and running LiteRT files without the code under test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Run = Callable[..., dict[str, np.ndarray]]


def toy(keras: Any) -> Any:
    """Convolution, batch normalisation, a residual with a depthwise convolution, and a dense head.

    The batch normalisations get statistics and weights that are not the initial ones.
    """
    layers = keras.layers
    keras.utils.set_random_seed(7)
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    y = layers.BatchNormalization()(y)
    y = layers.Conv2D(16, 1, activation="relu6")(y)
    x = layers.Add()([x, y])
    x = layers.Conv2D(24, 3, strides=2, activation="relu")(x)
    model = keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))
    rng = np.random.default_rng(7)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            gamma, beta, mean, variance = (w.shape for w in layer.get_weights())
            layer.set_weights(
                [
                    rng.uniform(0.5, 1.5, gamma),
                    rng.normal(0, 0.2, beta),
                    rng.normal(0, 0.2, mean),
                    rng.uniform(0.5, 1.5, variance),
                ]
            )
    return model


@pytest.fixture(scope="session")
def keras3_toy() -> Any:
    import keras

    return toy(keras)


@pytest.fixture(scope="session")
def tf_keras_toy() -> Any:
    tf_keras = pytest.importorskip("tf_keras")
    return toy(tf_keras)


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Inputs for the toys."""
    return np.random.default_rng(1).normal(size=(48, 12, 12, 3)).astype("float32")


@pytest.fixture
def run_litert() -> Run:
    """Runs a LiteRT file on one batch through its signature."""

    def run(path: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        from ai_edge_litert.interpreter import Interpreter

        runner = Interpreter(model_path=str(path), num_threads=1).get_signature_runner(
            "serving_default"
        )
        return dict(runner(**inputs))

    return run


@pytest.fixture(scope="session")
def digits() -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """A trained classifier of 8x8 digits, its training images, test images and test labels."""
    import keras
    from sklearn.datasets import load_digits

    keras.utils.set_random_seed(0)
    data = load_digits()
    images = (data.images[..., None] / 16).astype("float32")
    layers = keras.layers
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for width in (16, 32):
        model.add(layers.Conv2D(width, 3, padding="same", use_bias=False))
        model.add(layers.BatchNormalization(momentum=0.8))
        model.add(layers.ReLU())
    for layer in (layers.GlobalAveragePooling2D(), layers.Dense(10)):
        model.add(layer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    model.fit(images[:1400], data.target[:1400], epochs=5, batch_size=64, verbose=0)
    return model, images[:1400], images[1400:], data.target[1400:]
