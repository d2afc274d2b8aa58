r"""The norm of everything that goes with a channel.

Reference: Fang, Ma, Song, Mi and Wang, "DepGraph: Towards Any Structural Pruning", CVPR 2023
(arXiv:2301.12900), and their library Torch-Pruning. A channel is worth what all the weights that
have to be cut with it are worth: the slices that make it, its scales in batch normalisation, and
the slices that read it,

.. math:: I_k = \sum_{w \in \text{group}} \lVert w[k] \rVert_p^p,

with p = 2, relative to the group. The formula is confirmed by two papers that cite it. That the
code takes the mean over the members where the formula has the sum, and divides by the group's mean,
is read in Torch-Pruning; the paper's text was not at hand.

:class:`~tfprune.criteria.L1` and ``L2`` with ``consumers=True`` differ: they bring every kernel to
a mean of one before they add, so that all count alike. Here the members are added as they are, and
a large kernel weighs more than a small one.

Departures: the group's mean is over all of its channels, where the paper's formula takes the N
largest (with N the width, both are equal). Biases do not count, and neither do the shifts and
statistics of batch normalisation. The sparse training of the paper is no part of a criterion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tfprune.criteria.scores import (
    Normalize,
    Reduce,
    Scores,
    Vector,
    from_members,
    normalized,
    over_other_axes,
)
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph, ChannelGroup, Member


@dataclass(frozen=True)
class GroupNorm:
    r"""Sum of :math:`|w|^p` over a channel's slices of all members of its group.

    A member that carries only a part of the channels (behind a concatenation, or a slice of a
    tensor) adds to those alone; a channel with several positions (behind a flatten) adds them up.

    Args:
        p: the power; no root is taken, as in the paper and its code.
        reduce: how the members come together: their ``"mean"`` (the code) or ``"sum"`` (the
            paper), which rank the channels of a group alike, or ``"max"`` or ``"first"``.
        normalize: what each group's scores are divided by; decides everything when groups are
            ranked together. ``"mean"`` makes the sum and the mean equal.
    """

    p: float = 2
    reduce: Reduce = "mean"
    normalize: Normalize = "mean"

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group.

        Raises:
            ArgumentError: ``p`` is not a positive number.
        """
        if not (math.isfinite(self.p) and self.p > 0):
            raise ArgumentError(f"Expected p to be a positive number. Received: {self.p!r}.")

        def select(group: ChannelGroup) -> list[Member]:
            return [member for member in group.members if member.scored]

        def score(member: Member) -> Vector:
            weights = np.asarray(member.variable).astype(np.float64)
            return np.asarray(
                (np.abs(weights) ** self.p).sum(over_other_axes(weights, member.axis))
            )

        raw = from_members(
            graph, "group norm (DepGraph)", select, score, reduce=self.reduce, normalize="none"
        )
        values = {name: normalized(raw[name], self.normalize) for name in raw}
        return Scores(values, raw.criterion)
