r"""Channel independence: what of a layer's feature maps no other channel can replace.

Reference: Sui, Yin, Xie, Phan, Zonouz and Yuan, "CHIP: CHannel Independence-based Pruning for
Compact Neural Networks", NeurIPS 2021 (arXiv:2110.13981). The maps of one image, one row each, are
a matrix A; the score of channel i is how much the nuclear norm falls when its row is zeroed,

.. math:: \mathrm{CI}_i = \lVert A \rVert_* - \lVert A_{-i} \rVert_*,

averaged over images. The formula, the maps behind the activation and the average over five batches
of 128 images are read in the authors' code, which rounds the maps to four decimals first; that is
left out here. The paper's text was not at hand. The authors' code takes a singular value
decomposition per channel, layer and image.

Here one eigendecomposition per image and place is enough. With :math:`G = A A^\top`, zeroing a row
leaves the principal sub-matrix :math:`G_{-i}`, and with :math:`R(t) = (G + t)^{-1}` the identity
:math:`\det (G_{-i} + t) = R(t)_{ii} \det (G + t)` and
:math:`\sqrt x = \frac 1 \pi \int_0^\infty t^{-1/2} \frac{x}{x + t} \, dt` give

.. math:: \mathrm{CI}_i = \frac 1 \pi \int_0^\infty t^{-1/2}
    \left( 1 - t \, \frac{(R(t)^2)_{ii}}{R(t)_{ii}} \right) dt,

for all channels at once. On a logarithmic axis the trapezoidal rule converges exponentially.

Where the maps are observed, and what is done for residual, concatenated and flattened channels, is
told in :mod:`tfprune.criteria.feature_maps`. Departures from the paper: channels without a map
(dense units) have one number per image, and a matrix of one column says nothing of independence;
their columns are all images together, and the norm is divided by the square root of their number.
The several positions of one channel (tied groups) are its rows side by side.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.criteria.feature_maps import Maps, Place, from_places, places_of, read_maps
from tfprune.criteria.scores import Normalize, Scores, Vector
from tfprune.graph import ChannelGraph

# Nodes t = exp(s): the tails that are cut off weigh exp(-28) of the norm, and the step's error is
# exp(-2 pi^2 / step), as the nearest poles, at t < 0, are pi away from the path.
_STEP = 0.75
_NODES = np.exp(np.arange(-56, 56 + _STEP, _STEP))


@dataclass(frozen=True)
class CHIP:
    """Fall of the nuclear norm of the feature maps without a channel, averaged over images.

    Memory stays bounded whatever the amount of data: images are taken one by one.

    Args:
        data: training data; labels are not used.
        batches: how many batches to use; ``None`` for all.
        batch_size: for arrays.
        normalize: what the scores at each place where a group is read are divided by. Nuclear norms
            of different layers are not comparable, and the paper compares within a layer alone;
            ``"none"`` gives the plain differences.
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
        columns: dict[Place, Maps] = {}
        seen: defaultdict[Place, int] = defaultdict(int)

        def see(place: Place, maps: Maps) -> None:
            matrices = side_by_side(maps, place)
            seen[place] += len(matrices)
            if place.spatial:
                for matrix in matrices:
                    total[place] = total[place] + independence(matrix)
                return
            parts = [columns[place]] if place in columns else []
            columns[place] = _compact(np.concatenate([*parts, *matrices], axis=1))

        used = read_maps(
            graph,
            places_of(graph),
            self.data,
            batches=self.batches,
            batch_size=self.batch_size,
            see=see,
        )
        averages = {place: value / seen[place] for place, value in total.items()}
        for place, matrix in columns.items():
            averages[place] = independence(matrix) / np.sqrt(seen[place])
        return Scores(
            from_places(graph, averages, self.normalize),
            f"channel independence (CHIP, {used} batches)",
        )


def independence(matrix: Maps) -> Vector:
    """For every row, how much the nuclear norm falls when the row is zeroed.

    Singular values below some 1e-7 of the largest count as zero: the Gram matrix squares them, and
    the rounding of float32 maps is no smaller.

    Args:
        matrix: shape (channels, columns).

    Returns:
        Shape (channels,); 0 for a row of zeros, the row's norm for one orthogonal to all others.
    """
    rows, size = matrix.shape
    matrix = np.asarray(matrix, np.float64)
    scale = np.linalg.norm(matrix)
    if not scale > 0:
        return np.zeros(rows)
    matrix = matrix / scale
    wide = rows <= size
    eigenvalues, vectors = np.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    # Ascending, so the last is the largest.
    large = eigenvalues > len(eigenvalues) * np.finfo(np.float64).eps * eigenvalues[-1]
    values = eigenvalues[large, None]
    # Squared left singular vectors: a row's share in every direction, and in the null space.
    left = vectors[:, large] if wide else matrix @ vectors[:, large] / np.sqrt(values.T)
    share = left**2
    null = 1 - share.sum(1, keepdims=True)
    null[null < 8 * rows * np.finfo(np.float64).eps] = 0  # the rounding of the sum
    resolvent = 1 / (values + _NODES)
    once = share @ resolvent + null / _NODES
    # R_ii - t (R^2)_ii, summed without cancellation.
    rest = share @ (values * resolvent**2)
    integral = (rest / once) @ np.sqrt(_NODES) * _STEP / np.pi
    return np.asarray(np.where(matrix.any(1), scale * integral, 0))


def side_by_side(maps: Maps, place: Place) -> Maps:
    """Shape (examples, channels, columns): a row per channel of the place, its positions in turn.

    Channels with fewer positions than others are filled up with zeros, which change no norm.
    """
    flat = maps.reshape(*maps.shape[:2], -1)
    counts = np.bincount(place.owners)
    order = np.argsort(place.owners, kind="stable")
    turn = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.zeros((len(maps), len(counts), counts.max(), flat.shape[2]), maps.dtype)
    rows[:, place.owners[order], turn] = flat[:, order]
    return rows.reshape(len(maps), len(counts), -1)


def _compact(columns: Maps) -> Maps:
    """At most twice as many columns as rows, with the same products between rows."""
    if columns.shape[1] <= 2 * len(columns):
        return columns
    return np.asarray(np.linalg.qr(columns.T.astype(np.float64), mode="r")).T
