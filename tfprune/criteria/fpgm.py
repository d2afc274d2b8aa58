"""Distance to the geometric median.

Reference: He, Liu, Wang, Hu and Yang, "Filter Pruning via Geometric Median for Deep Convolutional
Neural Networks Acceleration", CVPR 2019. Formula and the restriction to existing filters are read
in the authors' code; the paper's text was not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tfprune.criteria.scores import (
    Normalize,
    Reduce,
    Scores,
    Vector,
    normalized,
    producers_of,
    reduced,
)
from tfprune.graph import ChannelGraph, Member


@dataclass(frozen=True)
class FPGM:
    r"""Sum of distances to the other filters: :math:`g_i = \sum_j \lVert F_i - F_j \rVert_2`.

    A filter with a small sum lies where the others can replace it. All distances come from one
    Gram matrix, :math:`d_{ij}^2 = G_{ii} + G_{jj} - 2 G_{ij}`.

    Args:
        reduce, normalize: as for :class:`~tfprune.criteria.L1`.
    """

    reduce: Reduce = "mean"
    normalize: Normalize = "mean"

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group."""
        values = {
            group.name: reduced(
                [
                    normalized(_distances(member, group.width), self.normalize)
                    for member in producers_of(group)
                ],
                self.reduce,
                group.width,
            )
            for group in graph.prunable
        }
        return Scores(values, "distance to the geometric median (FPGM)")


def _distances(member: Member, width: int) -> Vector:
    """For each channel of the group, the sum of distances to the member's other channels."""
    weights = np.moveaxis(np.asarray(member.variable).astype(np.float64), member.axis, 0)
    rows = weights.reshape(len(weights), -1)[member.positions]
    order = np.argsort(member.channels, kind="stable")
    channels, counts = np.unique(member.channels, return_counts=True)
    if len(channels) == 0:
        return np.zeros(width)
    # A channel with several positions (tied groups) is their rows side by side.
    if (counts == counts[0]).all():
        filters = rows[order].reshape(len(channels), -1)
    else:
        filters = np.stack([rows[member.channels == c].sum(0) for c in channels])
    gram = filters @ filters.T
    square = np.diag(gram)
    distances = np.sqrt(np.maximum(square[:, None] + square[None, :] - 2 * gram, 0))
    np.fill_diagonal(distances, 0)
    result = np.zeros(width)
    result[channels] = distances.sum(1)
    return result
