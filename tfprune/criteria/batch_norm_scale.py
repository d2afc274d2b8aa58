"""The scale of batch normalisation.

Reference: Liu, Li, Shen, Huang, Yan and Zhang, "Learning Efficient Convolutional Networks through
Network Slimming", ICCV 2017 (arXiv:1708.06519): channels with a small scale matter little, above
all when training pushed the scales to zero. The rule is read in the authors' code; the paper's text
was not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tfprune.criteria.norm import L1
from tfprune.criteria.scores import Normalize, Reduce, Scores, Vector, from_members
from tfprune.graph import ChannelGraph, ChannelGroup, Member


@dataclass(frozen=True)
class BatchNormScale:
    r"""Absolute scale of the batch normalisations that follow: :math:`s_j = |\gamma_j|`.

    A group without any (or whose batch normalisations have ``scale=False``) is scored by the L1
    norm of its filters, as nothing else is known of it; its scores are normalised alike.

    Args:
        reduce: how several batch normalisations behind one group come together.
        normalize: what each one's scales are divided by; ``"none"`` compares scales across layers
            as Network Slimming does (and leaves groups without batch normalisation incomparable).
    """

    reduce: Reduce = "mean"
    normalize: Normalize = "mean"

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group."""

        def select(group: ChannelGroup) -> list[Member]:
            return [m for m in group.followers if m.weight == "gamma" and m.scored]

        def score(member: Member) -> Vector:
            return np.abs(np.asarray(member.variable).astype(np.float64))

        scores = from_members(
            graph,
            "batch normalisation scale",
            select,
            score,
            reduce=self.reduce,
            normalize=self.normalize,
        )
        fallback = L1(reduce=self.reduce, normalize=self.normalize)(graph)
        values = {
            group.name: scores[group.name] if select(group) else fallback[group.name]
            for group in graph.prunable
        }
        return Scores(values, scores.criterion)
