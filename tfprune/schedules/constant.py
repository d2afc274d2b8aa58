"""One sparsity throughout."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfprune.schedules.arguments import check_sparsity
from tfprune.schedules.base import Periodic


@keras.saving.register_keras_serializable(package="tfprune")
class Constant(Periodic):
    """The same sparsity at every step; tfmot's ``ConstantSparsity``.

    Args:
        target_sparsity: fraction of zeros.
        begin_step: first step (training batch) at which masks may be updated. The first batch is
            step 1: with 0 the first update comes at step ``frequency``, with 1 at once.
        end_step: last step at which masks are updated (there in any case); -1 for no end.
        frequency: steps from one update of the masks to the next.

    Raises:
        ArgumentError: an argument has a value that is not allowed.
    """

    endless = True

    def __init__(
        self, target_sparsity: float, begin_step: int, end_step: int = -1, frequency: int = 100
    ) -> None:
        super().__init__(begin_step, end_step, frequency)
        self.target_sparsity = check_sparsity(target_sparsity, "target_sparsity")

    def sparsity_at(self, step: Any) -> Any:
        return tf.fill(tf.shape(step), tf.constant(self.target_sparsity, tf.float32))
