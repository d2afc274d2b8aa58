"""Scores from an order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tfprune.criteria.scores import Vector


def rising(order: NDArray[np.int64], lost: NDArray[np.float64]) -> Vector:
    """Scores that rise strictly along an order of removal: cumulative maxima, ties moved apart.

    Args:
        order: channels, the first to go first.
        lost: the objective once each of them is gone, in that order.
    """
    scores = np.zeros(len(order))
    last = 0.0
    for channel, value in zip(order.tolist(), np.maximum.accumulate(lost).tolist(), strict=True):
        last = max(value, float(np.nextafter(last, np.inf)))
        scores[channel] = last
    return scores
