"""Least squares from Gram matrices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tfprune.errors import ArgumentError, DataError

Matrix = NDArray[np.float64]


def solve(gram: Matrix, right: Matrix, ridge: float) -> Matrix:
    """``(gram + eps I)^-1 right`` with ``eps = ridge * trace(gram) / n``.

    Unknowns with a zero on the diagonal (dead channels: a column of zeros) get 0 and leave ``n``
    and the trace as if they were not there.

    Args:
        gram: shape (n, n), positive semi-definite.
        right: shape (n,) or (n, m).
        ridge: relative to the mean of the diagonal.

    Raises:
        DataError: the matrix is singular, which a ridge above zero prevents.
    """
    from scipy.linalg import cho_factor, cho_solve

    result = np.zeros_like(right)
    alive = np.flatnonzero(np.diag(gram) > 0)
    if not len(alive):
        return result
    part = gram[np.ix_(alive, alive)]
    eps = ridge * np.trace(part) / len(alive)
    part[np.diag_indices(len(alive))] += eps
    try:
        result[alive] = cho_solve(cho_factor(part, overwrite_a=True), right[alive])
    except np.linalg.LinAlgError as error:
        raise DataError(
            f"Expected a Gram matrix that can be inverted. Received: a singular one of "
            f"{len(alive)} unknowns, with ridge={ridge:g}. Use a larger ridge (1e-6), or more "
            "images or positions."
        ) from error
    return result


def check_ridge(ridge: float) -> None:
    """Raises :class:`ArgumentError` unless ``ridge`` is a finite number of at least 0."""
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 <= ridge < np.inf:
        raise ArgumentError(f"Expected ridge to be at least 0, such as 1e-6. Received: {ridge!r}.")
