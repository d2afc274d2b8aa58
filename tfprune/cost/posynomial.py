"""A cost as a smooth function of how much of each group stays: a posynomial.

Every cost is a sum of products of axis lengths, and an axis is as long as the channels of its
groups that stay, so that with real factors :math:`f_g` in place of counts

    cost(f) = sum_t c_t prod_{a in t} (n_a0 + sum_g n_ag f_g).

All coefficients are non-negative: in log f the logarithm of the cost is convex, which makes
problems with budgets geometric programs (Boyd, Kim, Vandenberghe and Hassibi, "A tutorial on
geometric programming", 2007).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Posynomial:
    """Terms over shared axes.

    Attributes:
        coefficients: shape ``(terms,)``, not negative.
        factors: int array, shape ``(terms, depth)``: the axes that each term multiplies; axis 0
            is the constant one.
        fixed: shape ``(axes,)``: positions of each axis that always stay.
        free: shape ``(axes, groups)``: positions of each axis that each group has.
    """

    coefficients: Vector
    factors: NDArray[np.int64]
    fixed: Vector
    free: Vector

    def lengths(self, factors: Vector) -> Vector:
        """The length of every axis, for the kept fraction of every group, shape ``(groups,)``."""
        return np.asarray(self.fixed + self.free @ factors)

    def __call__(self, factors: Vector) -> float:
        """The cost."""
        lengths = self.lengths(factors)
        return float((self.coefficients * lengths[self.factors].prod(axis=1)).sum())

    def gradient(self, factors: Vector) -> Vector:
        """Its derivatives by the groups' fractions, shape ``(groups,)``."""
        lengths = self.lengths(factors)
        values = lengths[self.factors]
        by_axis = np.zeros(len(lengths))
        for column in range(values.shape[1]):
            others = self.coefficients * np.delete(values, column, axis=1).prod(axis=1)
            np.add.at(by_axis, self.factors[:, column], others)
        by_axis[0] = 0.0  # the constant does not change
        return np.asarray(by_axis @ self.free)
