"""Trains by some methods, one after the other, and writes the weights; killed by its test.

Usage: python killed.py FOLDER METHOD... Prints a line before every step.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import tfprune
from tests.methods.models import residual, stir, stripes
from tests.methods.training_time import METHODS


class Tell(keras.callbacks.Callback):
    def __init__(self, name):
        super().__init__()
        self._name = name

    def on_train_batch_begin(self, batch, logs=None):
        print(f"{self._name} {int(np.asarray(self.model.optimizer.iterations))}", flush=True)


def train(folder, names):
    """Goes on where the checkpoints in the folder end."""
    for name in names:
        method = METHODS[name]()
        model = method.prepare(stir(residual()))
        tfprune.fine_tune(
            model, stripes(64), epochs=4, batch_size=16, learning_rate=0.05, weight_decay=1e-3,
            seed=1, verbose=0, checkpoint=folder / f"{name}.npz",
            callbacks=[*method.callbacks(), Tell(name)],
        )  # fmt: skip
        optimizer = [np.asarray(v) for v in model.optimizer.variables]
        weights = [np.asarray(v) for v in model.variables]
        np.savez(folder / f"{name}-weights.npz", *weights, *optimizer)


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2:])
