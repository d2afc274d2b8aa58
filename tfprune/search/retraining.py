"""The brief training of a sensitivity analysis."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tfprune.errors import ArgumentError


@dataclass(frozen=True)
class Retraining:
    """The brief training after a group is pruned; see :func:`tfprune.fine_tune`.

    Attributes:
        epochs: passes over the training examples.
        batches: read only so many batches of the training data, so that ``epochs * batches``
            steps are made; all of them if ``None``.
        learning_rate, schedule, optimizer, weight_decay, decay, loss: by name or number.
        batch_size: of the batches cut from arrays.
        seed: of the order of the examples and of dropout.
    """

    epochs: int = 1
    batches: int | None = None
    learning_rate: float = 1e-3
    schedule: str = "constant"
    optimizer: str = "sgd"
    weight_decay: float = 0.0
    decay: str = "l2"
    loss: str | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batches", "batch_size"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and not (name == "batches" and value is None):
                raise ArgumentError(f"Expected {name} of at least 1. Received: {value!r}.")
        for name, value, known in (
            ("schedule", self.schedule, ("constant", "cosine", "step")),
            ("optimizer", self.optimizer, ("sgd", "adam")),
            ("decay", self.decay, ("l2", "decoupled")),
        ):
            if value not in known:
                raise ArgumentError(
                    f"Expected {name} to be one of {', '.join(known)}. Received: {value!r}."
                )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ArgumentError(
                f"Expected a positive learning_rate. Received: {self.learning_rate!r}."
            )
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ArgumentError(f"Expected a weight_decay from 0. Received: {self.weight_decay!r}.")
