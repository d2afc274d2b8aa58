r"""Layer densities from the convex problem of SynExp, in closed form for one budget.

Reference: Cai, Hua, Chen, Suh, De Sa and Zhang, "Structured Pruning is All You Need for Pruning
CNNs at Initialization" (arXiv:2203.02549). Of the paper only the abstract, the opening and reviews
were at hand, which state the problem: of all densities :math:`p_l` that keep within the budgets
take those of the largest :math:`\sum_l \log p_l`, for the expectation of SynFlow's score over
random weights and masks is a constant times :math:`\prod_l p_l`. The derivation and the solutions
here are ours:

.. math::
    \max \sum_l \log p_l \quad \text{s.t.} \quad \sum_l c_{kl} p_l \le B_k, \quad 0 < p_l \le u_l .

For one budget the optimality conditions say that every layer keeps ``min(capacity, w)`` units of
the cost with one water level ``w``: small layers stay dense, all others keep equally much.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tfprune.errors import ArgumentError, BudgetError

Vector = NDArray[np.float64]


def water_filling(costs: ArrayLike, budget: float, caps: ArrayLike = 1.0) -> Vector:
    """The densities under one budget, exactly; O(L log L).

    Args:
        costs: cost of each layer at density 1, positive, shape ``(layers,)``.
        budget: what all layers together may cost, positive, in the same unit.
        caps: largest density of each layer (1: pruning only; ``inf``: no bound), a scalar or shape
            ``(layers,)``.

    Returns:
        Densities, float64, shape ``(layers,)``; they use the budget up, unless all are at their
        caps.

    Raises:
        ArgumentError: a cost, cap or budget that is not positive.
    """
    cost, cap = _positive("costs", costs), _positive("caps", caps)
    cap = np.broadcast_to(cap, cost.shape)
    _positive("budget", budget)
    capacity = cost * cap
    if budget >= capacity.sum():
        return np.array(cap)
    left, level = float(budget), 0.0
    ascending = np.sort(capacity)
    for rank, size in enumerate(ascending):
        level = left / (len(ascending) - rank)
        if size > level:
            break
        left -= size
    return np.minimum(cap, level / cost)


def densities(
    costs: Sequence[ArrayLike], budgets: Sequence[float], caps: ArrayLike = 1.0
) -> Vector:
    """The densities under one budget or two.

    With two, the solution of one alone is the answer where it keeps within the other as well.
    Otherwise both bind, and the multipliers are found by nested bisection.

    Args:
        costs: one or two arrays of costs at density 1, positive, each of shape ``(layers,)``.
        budgets: as many numbers.
        caps: as for :func:`water_filling`.

    Returns:
        Densities, float64, shape ``(layers,)``.

    Raises:
        ArgumentError: a number that is not positive, or another number of budgets.
    """
    if len(costs) != len(budgets) or not 1 <= len(costs) <= 2:
        raise ArgumentError(
            f"Expected one or two kinds of cost with a budget each. Received: {len(costs)} kinds "
            f"and {len(budgets)} budgets."
        )
    table = [_positive("costs", row) for row in costs]
    for number in range(len(table)):
        alone = water_filling(table[number], budgets[number], caps)
        other = 1 - number
        if len(table) == 1 or table[other] @ alone <= budgets[other]:
            return alone
    return _both_bind(table[0], table[1], budgets, np.broadcast_to(_positive("caps", caps),
                      table[0].shape))  # fmt: skip


def _both_bind(first: Vector, second: Vector, budgets: Sequence[float], cap: Vector) -> Vector:
    """``p = min(u, 1 / (lambda a + nu b))`` with both budgets used up."""

    def at(outer: float) -> Vector:
        # The second budget is used up by the inner multiplier, whatever the outer one is: with
        # growing nu the cost falls.
        def inner(nu: float) -> Vector:
            with np.errstate(divide="ignore"):
                return np.minimum(cap, 1 / (outer * first + nu * second))

        if second @ inner(0.0) <= budgets[1]:
            return inner(0.0)
        return inner(_falling(lambda nu: float(second @ inner(nu)), budgets[1], len(cap)))

    outer = _falling(lambda value: float(first @ at(value)), budgets[0], len(cap))
    return at(outer)


def _falling(cost: object, budget: float, layers: int) -> float:
    """Where a falling function meets the budget: at most ``layers / budget``, by bisection."""
    low, high = 0.0, layers / budget
    for _ in range(200):  # halves the interval beyond float64's resolution
        middle = (low + high) / 2
        if cost(middle) > budget:  # type: ignore[operator]
            low = middle
        else:
            high = middle
    return high


def _positive(name: str, value: ArrayLike) -> Vector:
    array = np.asarray(value, np.float64)
    if array.size == 0 or np.isnan(array).any() or (array <= 0).any():
        raise ArgumentError(f"Expected {name} above zero. Received: {value!r}.")
    return array


def check_reachable(least: float, budget: float, what: str) -> None:
    """Raises :class:`BudgetError` if even the least costs more than the budget."""
    if least > budget:
        raise BudgetError(
            f"Expected a budget within reach. Received: {what}={budget:,.0f}, below the "
            f"{least:,.0f} that remain at the smallest widths. Ask for more, or loosen "
            "min_channels, max_pruning_ratio or ignore."
        )
