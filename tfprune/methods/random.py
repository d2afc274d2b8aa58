"""Random pruning: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.arguments import check_whole
from tfprune.layers.masks import Masks
from tfprune.layers.prunable import prunable_weights
from tfprune.methods.method import OneShotMethod
from tfprune.methods.ranking import (
    check_sparsity,
    kept_count,
    largest,
    require_no_empty,
)


@dataclass(frozen=True)
class RandomPruning(OneShotMethod):
    """Weights drawn at random stay, ``round(N (1 - sparsity))`` of them exactly.

    The masks depend on the seed and on the order and shapes of the weights, not on names or values.

    Args:
        sparsity: fraction of zeros, in [0, 1).
        seed: from 0.
        per_layer: draw this fraction in every weight; otherwise over all weights jointly.
        allow_empty_layers: a weight may lose all its elements.

    Raises:
        ArgumentError: a value out of range; a sparsity at which a layer would be left empty.
    """

    sparsity: float
    seed: int = 0
    per_layer: bool = True
    allow_empty_layers: bool = False

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_whole("seed", self.seed, 0)

    def masks(self, model: Any) -> Masks:
        """Which weights stay. ``model`` stays as it is."""
        scores = {
            path: np.random.default_rng([self.seed, number]).random(tuple(variable.shape))
            for number, (path, variable) in enumerate(prunable_weights(model).items())
        }
        if self.per_layer:
            kept = {
                path: largest({path: score}, round(score.size * (1 - self.sparsity)))[path]
                for path, score in scores.items()
            }
        else:
            total = sum(score.size for score in scores.values())
            kept = largest(scores, kept_count(total, self.sparsity))
        return require_no_empty(Masks(kept), self.allow_empty_layers)
