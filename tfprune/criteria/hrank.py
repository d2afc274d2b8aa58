"""The average rank of a channel's feature map.

Reference: Lin, Ji, Wang, Zhang, Zhang, Tian and Shao, "HRank: Filter Pruning using High-Rank
Feature Map", CVPR 2020: a map of low rank holds little information. That the rank is taken behind
the activation, with the default tolerance of single precision, and averaged over five batches of
128 training images, is read in the authors' code. That some 500 images are enough, as the average
hardly depends on which they are, is recalled of the paper, whose text was not at hand. The paper
goes layer by layer and trains in between; a criterion ranks once.

Ranks are at most the shorter side of a map, so that late layers with maps of 2 x 2 are hardly told
apart, and ties are frequent (the allocation breaks them by position). Where the maps are observed,
and what is done for residual, concatenated and flattened channels, is told in
:mod:`tfprune.criteria.feature_maps`. Departures, as the paper has two-dimensional maps only: a
sequence is a map of one column and a dense unit one of 1 x 1, whose rank is 0 or 1, so that the
score is the share of examples in which they are not all zero (for a dense unit, APoZ); a volume
counts with the mean over its slices, and a channel with several positions with the mean over them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.criteria.feature_maps import Maps, Place, from_places, places_of, read_maps
from tfprune.criteria.scores import Normalize, Scores, Vector
from tfprune.graph import ChannelGraph


@dataclass(frozen=True)
class HRank:
    """Rank of a channel's feature map, averaged over examples.

    Args:
        data: training data; labels are not used.
        batches: how many batches to use; ``None`` for all.
        batch_size: for arrays.
        normalize: what the ranks at each place where a group is read are divided by. Ranks of maps
            of different sizes are not comparable; ``"none"`` gives the plain ranks.
    """

    data: Any
    batches: int | None = 5
    batch_size: int = 128
    normalize: Normalize = "mean"

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group.

        Raises:
            DataError: no examples, or feature maps that are not finite.
        """
        total: defaultdict[Place, Vector] = defaultdict(lambda: np.zeros(1))
        seen: defaultdict[Place, int] = defaultdict(int)

        def see(place: Place, maps: Maps) -> None:
            total[place] = total[place] + ranks(maps).sum(0)
            seen[place] += len(maps)

        used = read_maps(
            graph,
            places_of(graph),
            self.data,
            batches=self.batches,
            batch_size=self.batch_size,
            see=see,
        )
        averages: dict[Place, Vector] = {}
        for place, value in total.items():
            per_channel = np.bincount(place.owners, value) / np.bincount(place.owners)
            averages[place] = per_channel / seen[place]
        return Scores(
            from_places(graph, averages, self.normalize),
            f"average rank of feature maps (HRank, {used} batches)",
        )


def ranks(maps: Maps) -> Vector:
    """The rank of every map, shape (examples, channels), from (examples, channels, other axes).

    Singular values below ``max(h, w)`` times the largest times the precision of the maps' own dtype
    count as zero, as in ``numpy.linalg.matrix_rank``.
    """
    matrices = maps if maps.ndim > 3 else maps.reshape(*maps.shape[:2], -1, 1)
    found = np.asarray(np.linalg.matrix_rank(matrices), np.float64)
    return np.asarray(found.reshape(*maps.shape[:2], -1).mean(2))
