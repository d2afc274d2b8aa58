"""Masks that come from elsewhere."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfprune.schedules.arguments import check_sparsity
from tfprune.schedules.base import Schedule


@keras.saving.register_keras_serializable(package="tfprune")
class Fixed(Schedule):
    """Never asks for an update of the masks: those that are set stay as they are.

    Args:
        sparsity: what the schedule reports; the masks decide what is zero.

    Raises:
        ArgumentError: ``sparsity`` is not in [0, 1).
    """

    def __init__(self, sparsity: float = 0.0) -> None:
        self.sparsity = check_sparsity(sparsity, "sparsity")

    def sparsity_at(self, step: Any) -> Any:
        return tf.fill(tf.shape(step), tf.constant(self.sparsity, tf.float32))

    def updates_at(self, step: Any) -> Any:
        return tf.fill(tf.shape(step), False)
