"""Budgets: the steps of an order that bring the cost down to what was asked for, and no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tfprune.allocation.order import Order
from tfprune.allocation.steps import Chain, Indices, kept_by_steps
from tfprune.cost.model import CostModel, Mask
from tfprune.errors import ArgumentError, BudgetError


@dataclass(frozen=True)
class Budget:
    """Upper limits: a float is a fraction of the dense model's cost, an int a number.

    Attributes:
        macs: multiply-accumulates of one example.
        params: values in all weights.
        size_bytes: bytes of all weights in their own types.
    """

    macs: float | int | None = None
    params: float | int | None = None
    size_bytes: float | int | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            ok = not isinstance(value, bool) and isinstance(value, int | float)
            if not ok or value <= 0 or (isinstance(value, float) and value > 1 and value % 1):
                raise ArgumentError(
                    f"Expected {name} to be a fraction of the dense model's (0.5) or a positive "
                    f"whole number (50_000_000). Received: {value!r}."
                )

    def given(self) -> dict[str, float | int]:
        """The limits that are set."""
        values = {"macs": self.macs, "params": self.params, "size_bytes": self.size_bytes}
        return {name: value for name, value in values.items() if value is not None}

    def __bool__(self) -> bool:
        return bool(self.given())


def cost_functions(costs: CostModel) -> dict[str, Callable[[Mask], int]]:
    """Cost by the name of the budget that limits it."""
    return {"macs": costs.macs, "params": costs.parameters, "size_bytes": costs.size_bytes}


def limits_of(budget: Budget, costs: CostModel) -> dict[str, int]:
    """The limits as whole numbers: MACs, parameters, bytes."""
    limits: dict[str, int] = {}
    for name, value in budget.given().items():
        dense = cost_functions(costs)[name](costs.full_mask())
        fraction = isinstance(value, float) and value <= 1
        limits[name] = int(value * dense + 1e-9) if fraction else int(value)
    return limits


def check_met(budget: Budget, kept: Mapping[str, Indices], costs: CostModel) -> None:
    """Raises :class:`BudgetError` if the kept channels cost more than a limit."""
    mask = costs.graph.keep_mask(kept)
    for name, limit in limits_of(budget, costs).items():
        cost = cost_functions(costs)[name](mask)
        if cost > limit:
            raise BudgetError(
                f"Expected a choice within {name}={limit:,}. Received: {cost:,}. The channels "
                "chosen cost more than others of the same groups would, as some layer reads only "
                "part of a group. Ask for a lower budget, or use a criterion that scores each "
                "channel by itself."
            )


def meet(
    budget: Budget, chain_list: Sequence[Chain], order: Order, costs: CostModel
) -> dict[str, Indices]:
    """Kept indices by group name: no step of ``order`` too many for every limit to be met.

    The shortest prefix of the order that meets the limits, less the steps that can be given back.

    Raises:
        BudgetError: a limit is below what the constraints allow; the message names the range.
    """
    functions = cost_functions(costs)
    limits = limits_of(budget, costs)

    def mask(taken: Counter[int]) -> Mask:
        return costs.graph.keep_mask(kept_by_steps(chain_list, taken))

    def fits(taken: Counter[int]) -> bool:
        current = mask(taken)
        return all(functions[name](current) <= limit for name, limit in limits.items())

    if not fits(Counter(order)):
        raise _unreachable(limits, functions, mask(Counter(order)), costs.full_mask())
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(Counter(order[:middle])) else (middle + 1, high)
    taken = Counter(order[:low])
    # The last step may have been a large one: earlier ones that fit beside it are given back,
    # latest first. What did not fit once does not fit later, as costs only rise.
    full: set[int] = set()
    for number in reversed(order[:low]):
        if number not in full and not fits(taken - Counter([number])):
            full.add(number)
        elif number not in full:
            taken -= Counter([number])
    return kept_by_steps(chain_list, taken)


def _unreachable(
    limits: Mapping[str, int],
    functions: Mapping[str, Callable[[Mask], int]],
    least: Mask,
    dense: Mask,
) -> BudgetError:
    lines = []
    for name, limit in limits.items():
        low, high = functions[name](least), functions[name](dense)
        if low > limit:
            lines.append(
                f"{name}={limit:,} is below the {low:,} that remain when everything that may go "
                f"is gone; reachable are {low:,} to {high:,} ({low / high:.3f} to 1)"
            )
    return BudgetError(
        f"Expected a budget within reach. Received: {'; '.join(lines)}. Ask for more, or loosen "
        "round_to, min_channels, max_pruning_ratio or ignore."
    )
