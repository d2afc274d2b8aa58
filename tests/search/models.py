"""A small trained network and its data, and a metric that sees every change."""

from __future__ import annotations

import functools

import keras
import numpy as np

from tests.protocols.models import examples
from tfprune.protocols import fine_tune
from tfprune.search import Metric


def squares(labels, outputs):
    """Mean square of the logits, on top of their distance from the one-hot labels."""
    return np.square(outputs - np.eye(outputs.shape[-1])[labels]).mean()


def broken(labels, outputs):
    """A metric that fails."""
    raise ZeroDivisionError("broken")


#: Continuous, so that equal numbers mean equal outputs.
DISTANCE = Metric(squares, larger_is_better=False)


def network(framework=keras, widths=(6, 8, 10)):
    """Convolutions with batch normalisation for ``examples()``; group names are ``conv0`` on."""
    layers, initial = framework.layers, framework.initializers.GlorotUniform
    x = image = framework.Input((6, 6, 2))
    for number, width in enumerate(widths):
        x = layers.Conv2D(width, 3, padding="same", name=f"conv{number}",
                          kernel_initializer=initial(seed=number))(x)  # fmt: skip
        x = layers.BatchNormalization(name=f"norm{number}", momentum=0.5)(x)
        x = layers.ReLU(name=f"relu{number}")(x)
        if number == 1:
            x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.Flatten(name="flat")(x)
    return framework.Model(image, layers.Dense(3, name="head",
                           kernel_initializer=initial(seed=9))(x), name="network")  # fmt: skip


@functools.cache
def trained():
    """:func:`network` after a few epochs; read only."""
    model = network()
    fine_tune(model, examples(90), epochs=6, learning_rate=0.01, batch_size=30, verbose=0)
    return model


def validation(count=48):
    """Other examples than :func:`trained` has seen."""
    return examples(count, seed=1)


__all__ = ["DISTANCE", "broken", "examples", "network", "squares", "trained", "validation"]
