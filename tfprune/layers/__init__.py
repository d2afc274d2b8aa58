"""Keras 3 layers for pruning while training: tfmot's sparsity API for Keras 3.

With ``tfprune.schedules`` the only place that imports tfmot. Importing this package registers the
wrapper with Keras, so that ``keras.models.load_model`` knows it.
"""

from __future__ import annotations

from tfprune.layers.callbacks import PruningSummaries, UpdatePruningStep
from tfprune.layers.channel_selection import with_selections, without_selections
from tfprune.layers.holding import masks_of, set_masks, with_masks
from tfprune.layers.magnitude import PruneLowMagnitude
from tfprune.layers.masks import Masks
from tfprune.layers.policy import PruneForLatencyOnXNNPack
from tfprune.layers.prunable import prunable_weights
from tfprune.layers.whole_groups import with_whole_groups, without_whole_groups
from tfprune.layers.wrapping import prune_low_magnitude, prune_scope, strip_pruning
from tfprune.schedules.tfmot import load

PrunableLayer = load().sparsity.keras.PrunableLayer
PruningPolicy = load().sparsity.keras.PruningPolicy

__all__ = [
    "Masks",
    "PrunableLayer",
    "PruneForLatencyOnXNNPack",
    "PruneLowMagnitude",
    "PruningPolicy",
    "PruningSummaries",
    "UpdatePruningStep",
    "masks_of",
    "prunable_weights",
    "prune_low_magnitude",
    "prune_scope",
    "set_masks",
    "strip_pruning",
    "with_masks",
    "with_selections",
    "with_whole_groups",
    "without_selections",
    "without_whole_groups",
]
