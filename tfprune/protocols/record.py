"""What a training run leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FineTuneRecord:
    """The result of :func:`tfprune.fine_tune`.

    Attributes:
        epochs: finished epochs, those before an interruption included.
        history: per epoch, the training loss and accuracy, those of the validation data
            ("val_..."), and the "learning_rate". With a teacher also the two parts of the training
            loss, "student_loss" and "distillation_loss", as means over the examples, unweighted.
        best_epoch: the epoch (from 0) that the *validation* data find best, by accuracy if it was
            measured, else by loss; the first of equals. ``None`` without validation data.
        seed: as given.
        seconds: wall-clock time of the finished epochs, those before an interruption included.
        resumed_from: how many epochs were taken from the checkpoint; 0 for a run from the start.
        stopped_early: whether it ended before the epochs that were asked for.
        restored_best: whether the model holds the weights of the best epoch, not of the last.
    """

    epochs: int
    history: Mapping[str, tuple[float, ...]]
    best_epoch: int | None
    seed: int
    seconds: float
    resumed_from: int
    stopped_early: bool
    restored_best: bool


@dataclass(frozen=True)
class ScratchRecord:
    """The result of training a structure from random weights.

    Attributes:
        model: trained; a copy of the model that was given, with weights of its own.
        record: of the training.
        epochs: those that the budget came to; the record has fewer if the training ended early.
        flops_ratio: FLOPs of the dense network / FLOPs of the pruned one, as
            :func:`tfprune.cost.liu_flops` counts, before any limit; 1.0 for Scratch-E, which
            does not ask.
    """

    model: Any
    record: FineTuneRecord
    epochs: int
    flops_ratio: float


def best_epoch(history: Mapping[str, list[float]] | Mapping[str, tuple[float, ...]]) -> int | None:
    """The first epoch of the highest validation accuracy, or else of the lowest loss."""
    if history.get("val_accuracy"):
        values = list(history["val_accuracy"])
        return values.index(max(values))
    if history.get("val_loss"):
        values = list(history["val_loss"])
        return values.index(min(values))
    return None
