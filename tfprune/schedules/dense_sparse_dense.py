"""Up and down again."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from tfprune.errors import ArgumentError
from tfprune.schedules.arguments import check_sparsity
from tfprune.schedules.base import Periodic, mix, progress


@keras.saving.register_keras_serializable(package="tfprune")
class DenseSparseDense(Periodic):
    """``s = initial + (peak - initial) (1 - cos(2 pi p)) / 2``: a cosine up, then down again.

    Pruned weights come back as zeros in the second half and are trained again. As in the schedule
    of that name of fasterai; formula checked against its code. The training method is that of Han
    et al., "DSD", arXiv:1607.04381, who prune and restore in one stroke each.

    Masks are updated every ``frequency`` steps, at the middle step
    ``begin_step + (end_step - begin_step) // 2``, and at ``end_step``. Where ``end_step -
    begin_step`` is even, the middle has exactly the peak; where it is odd, the top of the curve
    lies half a step after it.

    Args:
        initial_sparsity: fraction of zeros at both ends.
        peak_sparsity: fraction of zeros in the middle, not below the initial one.
        begin_step: first step (training batch) at which masks may be updated; the first batch is
            step 1.
        end_step: step at which the initial sparsity is back, at least two after ``begin_step``.
        frequency: steps from one update of the masks to the next.

    Raises:
        ArgumentError: an argument has a value that is not allowed.
    """

    def __init__(
        self,
        initial_sparsity: float,
        peak_sparsity: float,
        begin_step: int,
        end_step: int,
        frequency: int = 100,
    ) -> None:
        super().__init__(begin_step, end_step, frequency)
        self.initial_sparsity = check_sparsity(initial_sparsity, "initial_sparsity")
        self.peak_sparsity = check_sparsity(peak_sparsity, "peak_sparsity")
        if self.peak_sparsity < self.initial_sparsity:
            raise ArgumentError(
                "Expected peak_sparsity not to be below initial_sparsity. Received: "
                f"initial_sparsity {initial_sparsity!r}, peak_sparsity {peak_sparsity!r}."
            )
        if self.end_step - self.begin_step < 2:
            raise ArgumentError(
                "Expected end_step to be at least 2 after begin_step, with a step for the peak "
                f"between them. Received: begin_step {begin_step}, end_step {end_step}."
            )

    def sparsity_at(self, step: Any) -> Any:
        p = progress(step, self.begin_step, self.end_step)
        # (1 - cos(2 pi p)) / 2, without cancellation near 0.
        fraction = tf.square(tf.sin(p * math.pi))
        sparsity = mix(self.initial_sparsity, self.peak_sparsity, fraction)
        return tf.where(step >= self.end_step, self.initial_sparsity, sparsity)

    def updates_at(self, step: Any) -> Any:
        middle = self.begin_step + (self.end_step - self.begin_step) // 2
        return tf.logical_or(super().updates_at(step), tf.equal(step, middle))
