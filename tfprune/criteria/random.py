"""Random scores: the baseline that every criterion has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tfprune.criteria.scores import Scores
from tfprune.graph import ChannelGraph


@dataclass(frozen=True)
class Random:
    """Uniform numbers in [0, 1), the same for one seed and architecture, whatever the names.

    Args:
        seed: any integer.
    """

    seed: int = 0

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group."""
        values = {
            group.name: np.random.default_rng([abs(self.seed), position]).random(group.width)
            for position, group in enumerate(graph.prunable)
        }
        return Scores(values, f"random (seed {self.seed})")
