"""The names of ``tensorflow_model_optimization.sparsity.keras``, for Keras 3 models.

Code written for tfmot's guides runs with ``import tfprune as tfmot``: the schedules and abstract
classes here are tfmot's own, the functions and callbacks are tfprune's, which take Keras 3 models
and hand those of tf_keras to tfmot.
"""

from __future__ import annotations

from tfprune.layers import (
    PrunableLayer,
    PruneForLatencyOnXNNPack,
    PruningPolicy,
    PruningSummaries,
    UpdatePruningStep,
    prune_low_magnitude,
    prune_scope,
    strip_pruning,
)
from tfprune.schedules import ConstantSparsity, PolynomialDecay, PruningSchedule

__all__ = [
    "ConstantSparsity",
    "PolynomialDecay",
    "PrunableLayer",
    "PruneForLatencyOnXNNPack",
    "PruningPolicy",
    "PruningSchedule",
    "PruningSummaries",
    "UpdatePruningStep",
    "prune_low_magnitude",
    "prune_scope",
    "strip_pruning",
]
