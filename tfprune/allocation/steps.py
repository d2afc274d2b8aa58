"""Removal steps: in which order channels may go.

For every group the widths it may take form a chain; a step goes from one to the next and removes
the channels with the lowest scores. Allocations only differ in the order of the steps of all groups
together. Any prefix of that order is a valid plan, and costs fall from prefix to prefix, so that a
budget is met by bisection.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tfprune.allocation.rounding import allowed_widths, multiple
from tfprune.cost import CostModel
from tfprune.criteria.scores import Scores
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph, ChannelGroup

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Constraints:
    """What every allocation respects.

    Attributes:
        round_to: kept widths are multiples of this (an int or a preset's name); groups narrower
            than one multiple are not rounded. A channel with several inner positions, such as a
            head, counts with all of them.
        min_channels: fewest channels that a group keeps.
        max_pruning_ratio: largest fraction of a group's channels that may go.
        ignore: names or patterns (``*``, ``?``) of groups, or of layers whose output channels
            stay as they are. Their inputs may still shrink.
    """

    round_to: int | str = 8
    min_channels: int = 1
    max_pruning_ratio: float = 1.0
    ignore: Sequence[str] = ()

    def __post_init__(self) -> None:
        multiple(self.round_to)
        if not isinstance(self.min_channels, int) or self.min_channels < 1:
            raise ArgumentError(
                f"Expected min_channels to be a positive integer. Received: {self.min_channels!r}."
            )
        if not 0 < self.max_pruning_ratio <= 1:
            raise ArgumentError(
                "Expected max_pruning_ratio to be above 0 and at most 1. "
                f"Received: {self.max_pruning_ratio!r}."
            )
        if isinstance(self.ignore, str):
            raise ArgumentError(
                f"Expected ignore to be a list of names or patterns. Received the string "
                f"{self.ignore!r}: write ignore=[{self.ignore!r}]."
            )


@dataclass(frozen=True)
class Chain:
    """One group's widths from wide to narrow, and which channels each of them keeps.

    Attributes:
        group: the group.
        widths: allowed widths, falling; the first is the group's own.
        order: channel indices from the one to keep longest to the first to go, shape ``(width,)``.
        scores: float64 array, shape ``(width,)``: the scores in that order.
    """

    group: ChannelGroup
    widths: tuple[int, ...]
    order: Indices
    scores: NDArray[np.float64]

    def kept(self, width: int) -> Indices:
        """Sorted indices of the channels that ``width`` keeps."""
        return np.sort(self.order[:width])

    def at_most(self, width: int) -> int:
        """The number of steps to the smallest allowed width that is at least ``width``."""
        return max(i for i, allowed in enumerate(self.widths) if allowed >= min(width,
                   self.widths[0]) or i == 0)  # fmt: skip


def matches(group: ChannelGroup, pattern: str) -> bool:
    """Whether a pattern names the group or one of the layers that produce its channels."""
    names = [group.name, *(member.path for member in group.producers)]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def check_patterns(graph: ChannelGraph, patterns: Sequence[str], what: str) -> None:
    """Raises :class:`ArgumentError` for a pattern that names nothing in the model."""
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentError(
                f"Expected {what} to hold names or patterns. Received: {pattern!r}. "
                "For a layer, write its name: layer.name."
            )
        if not any(matches(group, pattern) for group in graph.groups):
            raise ArgumentError(
                f"Expected {what} to name groups or layers of the model. Received: {pattern!r}, "
                "which matches none. print(tfprune.analyse(model)) lists the names."
            )


def chains(
    graph: ChannelGraph, scores: Scores, constraints: Constraints, costs: CostModel
) -> list[Chain]:
    """The chain of every group that may lose channels, in the order of the graph.

    Ties are broken by index: of two channels of equal score the one with the lower index stays.
    """
    check_patterns(graph, constraints.ignore, "ignore")
    step = multiple(constraints.round_to)
    _check_scores(graph, scores)
    protected = protected_channels(graph, scores, costs)
    result = []
    for group in graph.prunable:
        if any(matches(group, pattern) for pattern in constraints.ignore):
            continue
        values = scores[group.name]
        ranking = np.where(protected[group.channel_ids], np.inf, values)
        order = np.argsort(-ranking, kind="stable")
        least = max(
            constraints.min_channels,
            int(protected[group.channel_ids].sum()),
            math.ceil(group.width * (1 - constraints.max_pruning_ratio) - 1e-9),
            1,
        )
        # Whole heads go: together with their inner positions they have to make a multiple.
        coarse = step // math.gcd(step, group.inner)
        widths = tuple(allowed_widths(group.width, min(least, group.width), coarse))
        result.append(Chain(group, widths, order, values[order]))
    return result


def _check_scores(graph: ChannelGraph, scores: Scores) -> None:
    """Raises :class:`ArgumentError` unless every prunable group has a finite score per channel."""
    for group in graph.prunable:
        if group.name not in scores.values:
            raise ArgumentError(
                f"Expected scores for every prunable group. Received: none for {group.name!r}."
            )
        values = np.asarray(scores[group.name])
        if values.shape != (group.width,) or not np.isfinite(values).all():
            raise ArgumentError(
                f"Expected {group.width} finite scores for group {group.name!r}. Received: shape "
                f"{values.shape}, {int((~np.isfinite(values)).sum())} of them not finite."
            )


def protected_channels(graph: ChannelGraph, scores: Scores, costs: CostModel) -> NDArray[np.bool_]:
    """Channels that must stay so that no axis of any tensor or weight becomes empty.

    A slice or a branch may see only some channels of a group; the best of those is protected. bool
    array, shape ``(channels,)``.
    """
    protected = np.zeros(len(graph.solution.frozen), bool)
    worth = np.zeros(len(protected))
    free = np.zeros(len(protected), bool)
    for group in graph.prunable:
        values = scores[group.name]
        worth[group.channel_ids] = values / (np.abs(values).mean() or 1.0)
        free[group.channel_ids] = True
    for axis in sorted(costs.axes(), key=len):
        if not free[axis].all():
            continue
        channels = np.unique(axis)
        owners, hits = np.unique(graph.group_of[channels], return_counts=True)
        whole = any(graph.groups[o].width == n for o, n in zip(owners, hits, strict=True))
        if not whole and not protected[channels].any():
            protected[channels[np.argmax(worth[channels])]] = True
    return protected


def kept_by_steps(chain_list: Sequence[Chain], taken: Mapping[int, int]) -> dict[str, Indices]:
    """Kept indices by group name after ``taken[i]`` steps of chain ``i`` (default none)."""
    return {
        chain.group.name: chain.kept(chain.widths[taken.get(i, 0)])
        for i, chain in enumerate(chain_list)
    }
