"""A sparsity for every epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfprune.errors import ArgumentError
from tfprune.schedules.arguments import check_count, check_sparsity
from tfprune.schedules.base import PruningSchedule, Schedule
from tfprune.schedules.serialization import deserialize, serialize


@keras.saving.register_keras_serializable(package="tfprune")
class PerEpoch(Schedule):
    """Prunes at the first step of an epoch, and holds the masks until the next.

    Epochs count from 0 and the first batch is step 1, so epoch e takes the steps from
    ``e * steps_per_epoch + 1`` on.

    Args:
        sparsities: a fraction of zeros for each epoch, in any order of size; after the last one
            masks stay as they are. Or a schedule that is asked for epochs instead of steps, such
            as ``Polynomial(0.0, 0.8, 0, 10, frequency=1)``: its ``begin_step``, ``end_step`` and
            ``frequency`` then are epochs, and masks are updated in the epochs that it says.
        steps_per_epoch: training batches in one epoch, ``len(train)`` of a batched data set.

    Raises:
        ArgumentError: no or impossible sparsities, steps that are not a positive whole number, or a
            schedule that would update masks at its ends only.
    """

    def __init__(self, sparsities: Any, steps_per_epoch: int) -> None:
        self.steps_per_epoch = check_count(steps_per_epoch, "steps_per_epoch")
        if isinstance(sparsities, PruningSchedule):
            _check_frequency(sparsities)
            self.sparsities = sparsities
        else:
            self.sparsities = _checked(sparsities)

    def sparsity_at(self, step: Any) -> Any:
        epoch = self._epoch(step)
        if isinstance(self.sparsities, list):
            last = len(self.sparsities) - 1
            return tf.gather(
                tf.constant(self.sparsities, tf.float32), tf.clip_by_value(epoch, 0, last)
            )
        sparsity = self.sparsities(tf.maximum(epoch, 0))[1]
        return tf.broadcast_to(tf.cast(sparsity, tf.float32), tf.shape(step))

    def updates_at(self, step: Any) -> Any:
        epoch = self._epoch(step)
        first = tf.logical_and(step > 0, tf.equal(step - 1, epoch * self.steps_per_epoch))
        if isinstance(self.sparsities, list):
            return tf.logical_and(first, epoch < len(self.sparsities))
        return tf.logical_and(first, self.sparsities(tf.maximum(epoch, 0))[0])

    def _epoch(self, step: Any) -> Any:
        return tf.math.floordiv(step - 1, self.steps_per_epoch)

    def shown_steps(self) -> int:
        """All epochs of a list, or those that the schedule by epochs shows."""
        if isinstance(self.sparsities, list):
            return len(self.sparsities) * self.steps_per_epoch
        shown = self.sparsities.shown_steps if isinstance(self.sparsities, Schedule) else None
        epochs = shown() if shown else max(9, getattr(self.sparsities, "end_step", -1)) + 1
        return int(epochs * self.steps_per_epoch)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments; a schedule by epochs as a dictionary."""
        config = super().get_config()
        if isinstance(self.sparsities, list):
            return {**config, "sparsities": list(self.sparsities)}
        return {**config, "sparsities": serialize(self.sparsities)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PerEpoch:
        """The schedule that :meth:`get_config` describes."""
        sparsities = config.get("sparsities")
        if isinstance(sparsities, Mapping):
            config = {**config, "sparsities": deserialize(sparsities)}
        return cls(**config)

    def __repr__(self) -> str:
        return f"PerEpoch(sparsities={self.sparsities!r}, steps_per_epoch={self.steps_per_epoch})"


def _checked(sparsities: Any) -> list[float]:
    if isinstance(sparsities, np.ndarray):
        sparsities = sparsities.tolist()
    if not isinstance(sparsities, Sequence) or isinstance(sparsities, str) or not len(sparsities):
        raise ArgumentError(
            "Expected sparsities to be a list with a fraction of zeros for every epoch, or a "
            f"schedule by epochs. Received: {sparsities!r}."
        )
    return [check_sparsity(value, f"sparsities[{i}]") for i, value in enumerate(sparsities)]


def _check_frequency(schedule: Any) -> None:
    """Raises where the frequency was surely meant in steps."""
    begin, end = getattr(schedule, "begin_step", 0), getattr(schedule, "end_step", -1)
    frequency = getattr(schedule, "frequency", 1)
    if 1 < end - begin < frequency:
        raise ArgumentError(
            "Expected a schedule by epochs: begin_step, end_step and frequency count epochs here. "
            f"Received: a frequency of {frequency} in {end - begin} epochs, which would skip those "
            "between. Give it frequency=1."
        )
