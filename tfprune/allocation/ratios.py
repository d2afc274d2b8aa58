"""Pruning ratios: the fraction of channels that goes, in every group or by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tfprune.allocation.order import Order
from tfprune.allocation.steps import Chain, Indices, check_patterns, kept_by_steps, matches
from tfprune.errors import ArgumentError, BudgetError
from tfprune.graph import ChannelGraph


def check_ratio(value: object, name: str = "pruning_ratio") -> float:
    """``value`` as a ratio in [0, 1).

    Raises:
        ArgumentError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ArgumentError(
            f"Expected {name} to be the fraction of channels to remove, from 0 up to but not "
            f"including 1. Received: {value!r}."
        )
    return float(value)


def kept_count(width: int, ratio: float) -> int:
    """``max(1, floor(width (1 - ratio)))``, safe against rounding: 10 x (1 - 0.9) keeps 1."""
    return max(1, math.floor(width * (1 - ratio) + 1e-9))


def every_group(chain_list: Sequence[Chain], ratio: float) -> dict[str, Indices]:
    """Each group loses ``ratio`` of its channels, rounded up to an allowed width."""
    return kept_by_steps(
        chain_list,
        {
            i: chain.at_most(kept_count(chain.group.width, ratio))
            for i, chain in enumerate(chain_list)
        },
    )


def above(chain_list: Sequence[Chain], threshold: float) -> dict[str, Indices]:
    """Each group keeps the channels whose scores are above ``threshold``.

    Rounded up to an allowed width, with the best of the others.
    """
    return kept_by_steps(
        chain_list,
        {
            i: chain.at_most(int((chain.scores > threshold).sum()))
            for i, chain in enumerate(chain_list)
        },
    )


def by_pattern(
    graph: ChannelGraph, chain_list: Sequence[Chain], ratios: Mapping[str, float]
) -> dict[str, Indices]:
    """Ratios by name or pattern; the last pattern that matches a group counts, others keep all.

    Raises:
        ArgumentError: a pattern matches nothing, or only groups that cannot be pruned.
    """
    check_patterns(graph, list(ratios), "pruning_ratio")
    for pattern, ratio in ratios.items():
        check_ratio(ratio, f"pruning_ratio[{pattern!r}]")
        named = [group for group in graph.groups if matches(group, pattern)]
        if ratio and not any(group.prunable for group in named):
            raise ArgumentError(
                f"Expected pruning_ratio to name groups that can be pruned. Received: {pattern!r}, "
                f"but {named[0].name!r} cannot: {named[0].reason}."
            )
    taken = {}
    for i, chain in enumerate(chain_list):
        chosen = [ratio for pattern, ratio in ratios.items() if matches(chain.group, pattern)]
        if chosen:
            taken[i] = chain.at_most(kept_count(chain.group.width, chosen[-1]))
    return kept_by_steps(chain_list, taken)


def overall(chain_list: Sequence[Chain], order: Order, ratio: float) -> dict[str, Indices]:
    """The first steps of ``order`` that together remove ``ratio`` of all channels, not more.

    Raises:
        BudgetError: the constraints do not let that many go.
    """
    total = sum(chain.group.width for chain in chain_list)
    wanted = math.floor(total * ratio + 1e-9)
    available = total - sum(chain.widths[-1] for chain in chain_list)
    if wanted > available:
        raise BudgetError(
            f"Expected a pruning ratio within reach. Received: {ratio}, that is {wanted} of "
            f"{total} channels, but round_to, min_channels and max_pruning_ratio let only "
            f"{available} go (a ratio of {available / max(total, 1):.3f})."
        )
    taken: dict[int, int] = {}
    removed = 0
    for number in order:
        widths, step = chain_list[number].widths, taken.get(number, 0)
        if removed + widths[step] - widths[step + 1] > wanted:
            break
        removed += widths[step] - widths[step + 1]
        taken[number] = step + 1
    return kept_by_steps(chain_list, taken)
