"""Gradual magnitude pruning: the sparsity grows while the network trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from tfprune.layers import prune_low_magnitude
from tfprune.layers.prunable import prunable_weights
from tfprune.methods.method import MaskMethod


@dataclass(frozen=True)
class MagnitudePruning(MaskMethod):
    """Every layer loses its smallest weights, more of them as training goes on.

    This is :func:`tfprune.prune_low_magnitude` in the form of a method. The schedule says at which
    training steps the masks are made anew, and at which sparsity; masked weights can come back.

    Args:
        schedule: a pruning schedule, see ``tfprune.schedules``. It counts training steps; see to it
            that it ends before the training does.
        options: more arguments of ``prune_low_magnitude``, such as ``{"block_size": (1, 4)}``.

    References:
        Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878, as tfmot implements it.
    """

    schedule: Any
    options: dict[str, Any] = field(default_factory=dict)

    changes_masks: ClassVar[bool] = True

    def prepare(self, model: Any) -> Any:
        """A copy of the model with pruning wrappers."""
        prunable_weights(model)  # refuses tf_keras, unbuilt models and unknown layers
        return prune_low_magnitude(model, pruning_schedule=self.schedule, **self.options)
