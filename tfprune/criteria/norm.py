"""Norms of the filters: L1 and L2.

A filter is the part of a producer's kernel that makes one channel. References: L1: Li, Kadav,
Durdanovic, Samet and Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017 (arXiv:1608.08710),
section 3.1, whose independent scoring this is; they report no noticeable difference for L2
(section 4.5). Checked against the paper's text.

Departures: a group with several producers (a residual stream) takes all of them into account,
where the paper lets the projection decide. Norms of different layers are not comparable, so each
producer's norms are divided by their mean (``normalize="mean"``); within a plain layer this leaves
the paper's order as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tfprune.criteria.scores import (
    Normalize,
    Reduce,
    Scores,
    Vector,
    from_members,
    over_other_axes,
    producers_of,
)
from tfprune.graph import ChannelGraph, Member


@dataclass(frozen=True)
class L1:
    r"""Sum of absolute weights: :math:`s_j = \sum |W_{..j}|`.

    Args:
        reduce: how the producers of a group come together: ``"mean"``, ``"sum"``, ``"max"``, or
            ``"first"`` (the first in the model's order decides alone).
        normalize: what each producer's norms are divided by: their ``"mean"``, ``"max"``, ``"l2"``
            norm, or ``"none"``.
        consumers: whether the slices of the kernels that read a channel count as well.
    """

    reduce: Reduce = "mean"
    normalize: Normalize = "mean"
    consumers: bool = False

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group."""

        def score(member: Member) -> Vector:
            weights = np.asarray(member.variable).astype(np.float64)
            return np.asarray(np.abs(weights).sum(over_other_axes(weights, member.axis)))

        return from_members(
            graph,
            "L1 norm",
            lambda group: producers_of(group, self.consumers),
            score,
            reduce=self.reduce,
            normalize=self.normalize,
        )


@dataclass(frozen=True)
class L2:
    r"""Euclidean norm of the weights: :math:`s_j = \sqrt{\sum W_{..j}^2}`. Arguments as for L1."""

    reduce: Reduce = "mean"
    normalize: Normalize = "mean"
    consumers: bool = False

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group."""

        def score(member: Member) -> Vector:
            weights = np.asarray(member.variable).astype(np.float64)
            return np.asarray((weights**2).sum(over_other_axes(weights, member.axis)))

        return from_members(
            graph,
            "L2 norm",
            lambda group: producers_of(group, self.consumers),
            score,
            reduce=self.reduce,
            normalize=self.normalize,
            combine=np.sqrt,
        )
