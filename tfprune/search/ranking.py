"""One order of every group's channels, from a criterion."""

from __future__ import annotations

from typing import Any

from tfprune import criteria
from tfprune.allocation import Chain, Constraints, chains
from tfprune.cost import CostModel
from tfprune.graph import ChannelGraph


def ranked_chains(
    graph: ChannelGraph, criterion: Any, data: Any, constraints: Constraints
) -> tuple[list[Chain], str]:
    """The chains of a criterion's scores, and its name in words.

    Of a selector the scores count, which give one nested order; its own choice depends on the
    widths that are yet to be found. Give it to :func:`tfprune.plan` once they are.

    Raises:
        ArgumentError: an unknown criterion.
    """
    chosen = criteria.get(criterion, data)
    scores = chosen(graph)
    words = scores.criterion
    if isinstance(chosen, criteria.Selector):
        words += ", by its scores"
    return chains(graph, scores, constraints, CostModel(graph)), words
