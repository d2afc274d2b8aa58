r"""Infinite feature selection: which features are worth most, by all paths through a graph of them.

Reference: Roffo, Melzi and Cristani, "Infinite Feature Selection", ICCV 2015. Recalled and read in
ports of NISP, not in the paper. Features are nodes; an edge is heavy where one of the two varies
much and where they are not correlated,

.. math:: A_{ij} = \alpha \max(\sigma_i, \sigma_j) + (1 - \alpha)(1 - |\rho_{ij}|),

with :math:`\sigma` the standard deviations, divided by the largest, and :math:`\rho` Spearman's
rank correlation. The score of a feature is the weight of all paths that start there,

.. math:: s = \sum_{l \ge 1} (r A)^l \, 1 = \left( (I - r A)^{-1} - I \right) 1, \qquad
    r = 0.9 / \varrho(A),

with :math:`\varrho` the spectral radius, so that the sum converges. :math:`\alpha = 0.5` and the
factor 0.9 are those of a public port of NISP; the papers' own values were not at hand.

The standard deviations must be scaled to [0, 1]. Shifting the smallest to 0 first, as some code
does, would blow up differences between spreads that are nearly equal; that is left out here.

Features that never change have no correlation; their score is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.criteria.scores import Vector
from tfprune.errors import ArgumentError, DataError

# Below, all eigenvalues at once are quicker than an iteration for the largest.
_SMALL = 500


def infinite_feature_selection(
    features: NDArray[np.floating[Any]], alpha: float = 0.5, factor: float = 0.9
) -> Vector:
    """Scores of features; larger is better.

    Args:
        features: shape ``(examples, features)``; at least two examples.
        alpha: weight of the spread against the lack of correlation, from 0 to 1.
        factor: how close to the limit of convergence long paths count, between 0 and 1.

    Returns:
        float64, shape ``(features,)``. Time grows with the cube of the number of features, memory
        with its square.

    Raises:
        ArgumentError: ``alpha`` or ``factor`` out of range.
        DataError: fewer than two examples, or values that are not finite.
    """
    check_alpha(alpha)
    if not 0 < factor < 1:
        raise ArgumentError(
            f"Expected a factor between 0 and 1: paths of all lengths are summed up. Received: "
            f"{factor!r}. Use 0.9."
        )
    values = np.asarray(features, np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise DataError(
            "Expected a table of examples by features, with two examples or more: spread and "
            f"correlation are those of several. Received: shape {values.shape}. Give more data."
        )
    if not np.isfinite(values).all():
        raise DataError(
            "Expected finite features. Received: NaN or infinity. Look at the data, and at the "
            "model's outputs for them."
        )
    result = np.zeros(values.shape[1])
    varying = np.flatnonzero(np.ptp(values, axis=0) > 0)
    if not len(varying):
        return result
    edges = adjacency(values[:, varying], alpha)
    radius = _spectral_radius(edges)
    if not radius > 0:  # nothing tells the features apart
        result[varying] = 1.0
        return result
    ones = np.ones(len(varying))
    system = np.eye(len(varying)) - factor / radius * edges
    result[varying] = np.linalg.solve(system, ones) - 1
    return result


def adjacency(values: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """The matrix A for features that all vary, shape ``(features, features)``."""
    from scipy.stats import rankdata

    spread = values.std(0)
    spread /= spread.max()
    ranks = rankdata(values, axis=0)  # equal values share their mean rank
    ranks -= ranks.mean(0)
    ranks /= np.linalg.norm(ranks, axis=0)
    independence = np.clip(1 - np.abs(ranks.T @ ranks), 0, 1)
    np.fill_diagonal(independence, 0)
    return np.asarray(alpha * np.maximum.outer(spread, spread) + (1 - alpha) * independence)


def check_alpha(alpha: float) -> None:
    """Raises :class:`ArgumentError` unless ``alpha`` is between 0 and 1."""
    if not 0 <= alpha <= 1:
        raise ArgumentError(
            "Expected alpha from 0 (correlation alone) to 1 (spread alone). Received: "
            f"{alpha!r}. Use 0.5."
        )


def _spectral_radius(matrix: NDArray[np.float64]) -> float:
    """The largest eigenvalue of a symmetric matrix without negative entries."""
    if len(matrix) <= _SMALL:
        return float(np.linalg.eigvalsh(matrix)[-1])
    from scipy.sparse.linalg import eigsh

    start = np.ones(len(matrix))  # the largest eigenvector has no negative entry
    return float(eigsh(matrix, k=1, which="LA", v0=start, return_eigenvectors=False)[0])
