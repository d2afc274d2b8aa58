"""One training run: its epochs, its state, its files."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfprune.protocols import checkpoint
from tfprune.protocols.checkpoint import TrainingState, read_variables, write_variables
from tfprune.protocols.record import best_epoch


class Session:
    """Trains a compiled model epoch by epoch and keeps its state, in memory and on disk.

    Args:
        keras: the module that the model belongs to.
        model: compiled, its optimizer built.
        seed: of dropout and the like.
        path: of the checkpoint, or ``None``.
        settings: what must agree for a checkpoint to be of this run.
        state: as read from a checkpoint, or a fresh one.
        keep_best: remember the weights of the best epoch.
    """

    def __init__(
        self,
        keras: Any,
        model: Any,
        *,
        seed: int,
        path: Path | None,
        settings: dict[str, Any],
        state: TrainingState,
        keep_best: bool,
    ) -> None:
        self._keras = keras
        self.model = model
        self.state = state
        self._seed = seed
        self._path = path
        self._settings = settings
        self._keep_best = keep_best
        if state.weights:
            write_variables(model.weights, state.weights, "the model")
            write_variables(model.optimizer.variables, state.optimizer, "the optimizer")
        else:
            self._save()

    def run_epoch(
        self, dataset: Any, validation: Any, learning_rate: float, callbacks: Any
    ) -> Mapping[str, float]:
        """Trains one epoch, appends it to the state and saves the state.

        Returns:
            The epoch's values: losses, metrics and the learning rate.
        """
        epoch, started = self.state.epochs, time.perf_counter()
        reseed(self.model, self._seed, epoch)
        self.model.optimizer.learning_rate = learning_rate
        with warnings.catch_warnings():
            # Of a dataset whose length is not known, Keras says so when an epoch ends as it should.
            warnings.filterwarnings("ignore", message="Your input ran out of data")
            fitted = self.model.fit(
                dataset,
                initial_epoch=epoch,
                epochs=epoch + 1,
                validation_data=validation,
                callbacks=callbacks,
                shuffle=False,
                verbose=0,
            )
        values = {key: float(series[-1]) for key, series in fitted.history.items()}
        values["learning_rate"] = learning_rate
        for key, value in values.items():
            self.state.history.setdefault(key, []).append(value)
        self.state.epochs += 1
        self.state.stopped = bool(self.model.stop_training)
        self.state.seconds += time.perf_counter() - started
        if self._keep_best and best_epoch(self.state.history) == epoch:
            self.state.best = read_variables(self._keras, self.model.weights)
        self._save()
        return values

    def is_over(self, epochs: int, patience: int | None) -> bool:
        """Whether nothing is left: all epochs done, a callback's stop, or no more patience."""
        best = best_epoch(self.state.history)
        tired = patience is not None and best is not None and self.state.epochs > best + patience
        return self.state.epochs >= epochs or self.state.stopped or tired

    def restore_best(self) -> None:
        """Gives the model the weights of the best epoch."""
        if self.state.best:
            write_variables(self.model.weights, self.state.best, "the model")

    def _save(self) -> None:
        if self._path is None:
            return
        self.state.weights = read_variables(self._keras, self.model.weights)
        self.state.optimizer = read_variables(self._keras, self.model.optimizer.variables)
        checkpoint.save(self._path, self.state, self._settings)


def reseed(model: Any, seed: int, epoch: int) -> None:
    """Sets the random states of a Keras 3 model's layers (dropout, noise) from (seed, epoch)."""
    states = [v for v in model.variables if v.name.split(":")[0] == "seed_generator_state"]
    for number, state in enumerate(states):
        numbers = np.random.SeedSequence([seed, epoch, number]).generate_state(
            math.prod(state.shape)
        )
        # Half the range of uint32, which fits every dtype that the backends use for seeds.
        state.assign((numbers >> 1).reshape(tuple(state.shape)))
