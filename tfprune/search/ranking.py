"""One order of every group's channels, from a criterion."""

from __future__ import annotations

from typing import Any

from tfprune import criteria
from tfprune.allocation import Chain, Constraints, chains
from tfprune.cost import CostModel
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph


def ranked_chains(
    graph: ChannelGraph, criterion: Any, data: Any, constraints: Constraints
) -> tuple[list[Chain], str]:
    """The chains of a criterion's scores, and its name in words.

    Raises:
        ArgumentError: an unknown criterion, or a selector, whose choice is no nested order.
    """
    chosen = criteria.get(criterion, data)
    if isinstance(chosen, criteria.Selector):
        raise ArgumentError(
            "Expected a criterion that ranks channels once. Received: the selector "
            f"{type(chosen).__name__}, whose choice depends on the widths. Find the widths with "
            "another one, such as 'l1', and give the selector to tfprune.plan."
        )
    scores = chosen(graph)
    return chains(graph, scores, constraints, CostModel(graph)), scores.criterion
