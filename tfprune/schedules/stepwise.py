"""Rounds of pruning and retraining."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfprune.errors import ArgumentError
from tfprune.schedules.arguments import check_count
from tfprune.schedules.base import mix
from tfprune.schedules.ramps import Ramp


@keras.saving.register_keras_serializable(package="tfprune")
class Stepwise(Ramp):
    """``s = initial + (final - initial) ceil(p rounds) / rounds``: prune, retrain, prune again.

    All rounds take the same number of steps (to one), and each prunes at its first step, so the
    first at ``begin_step + 1``, and holds that sparsity. Masks are updated at the first step of
    every round, besides every ``frequency`` steps and at ``end_step``; choose a frequency larger
    than ``end_step`` for none in between. Iterative pruning as in Han et al., arXiv:1506.02626.
    Round borders are computed in whole numbers, so no border is off by one step.

    Args:
        initial_sparsity: fraction of zeros up to ``begin_step``.
        final_sparsity: fraction of zeros in the last round and from then on.
        begin_step: step (training batch) before the first round; the first batch is step 1.
        end_step: last step of the last round.
        rounds: how many, at most one per step.
        frequency: steps from one update of the masks to the next within a round.

    Raises:
        ArgumentError: an argument has a value that is not allowed.
    """

    def __init__(
        self,
        initial_sparsity: float,
        final_sparsity: float,
        begin_step: int,
        end_step: int,
        rounds: int,
        frequency: int = 100,
    ) -> None:
        super().__init__(initial_sparsity, final_sparsity, begin_step, end_step, frequency)
        self.rounds = check_count(rounds, "rounds")
        if self.rounds > max(self.end_step - self.begin_step, 1):
            raise ArgumentError(
                "Expected at most one round per step. Received: rounds "
                f"{self.rounds} in {self.end_step - self.begin_step} steps (from begin_step "
                f"{self.begin_step} to end_step {self.end_step})."
            )

    def fraction(self, p: Any) -> Any:
        return tf.math.ceil(p * self.rounds) / self.rounds

    def sparsity_at(self, step: Any) -> Any:
        fraction = tf.cast(self._round(step), tf.float32) / self.rounds
        return self._ended(step, mix(self.initial_sparsity, self.final_sparsity, fraction))

    def updates_at(self, step: Any) -> Any:
        return tf.logical_or(
            super().updates_at(step), tf.not_equal(self._round(step), self._round(step - 1))
        )

    def _round(self, step: Any) -> Any:
        """The round that a step belongs to, from 1; 0 up to ``begin_step``."""
        length = self.end_step - self.begin_step
        elapsed = tf.clip_by_value(step - self.begin_step, 0, length)
        return -tf.math.floordiv(-elapsed * self.rounds, max(length, 1))
