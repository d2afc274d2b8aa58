"""Scores: what each channel is worth, and how the members of a group are brought together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph, ChannelGroup, Member

Vector = NDArray[np.float64]

Reduce = Literal["mean", "sum", "max", "first"]
"""How the scores of a group's members become one score per channel."""

Normalize = Literal["mean", "max", "l2", "none"]
"""What each member's scores are divided by before that."""


@dataclass(frozen=True, eq=False)
class Scores:
    """One number per channel of every prunable group; larger means keep.

    Attributes:
        values: group name -> float64 array, shape ``(width,)``.
        criterion: how they were made, in words.
    """

    values: Mapping[str, Vector]
    criterion: str

    def __getitem__(self, name: str) -> Vector:
        return self.values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)


class Criterion(Protocol):
    """Anything that scores the channels of a graph."""

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores for every prunable group of ``graph``."""
        ...


def from_members(
    graph: ChannelGraph,
    criterion: str,
    select: Callable[[ChannelGroup], list[Member]],
    score: Callable[[Member], Vector],
    *,
    reduce: Reduce,
    normalize: Normalize,
    combine: Callable[[Vector], Vector] = lambda total: total,
) -> Scores:
    """Scores from the weights of each group's members.

    Args:
        graph: the analysed model.
        criterion: its name, for the record.
        select: the members of a group that count.
        score: for a member, one number per position along its axis, shape ``(size,)``. Positions
            of one channel are added up (a channel behind a flatten owns many).
        reduce, normalize: how members come together.
        combine: applied to a member's sum over positions, such as a square root.
    """
    values: dict[str, Vector] = {}
    for group in graph.prunable:
        rows = []
        for member in select(group):
            total = np.zeros(group.width)
            np.add.at(total, member.channels, score(member)[member.positions])
            rows.append(normalized(combine(total), normalize))
        values[group.name] = reduced(rows, reduce, group.width)
    return Scores(values, criterion)


def normalized(scores: Vector, how: Normalize) -> Vector:
    """``scores`` divided by their mean, maximum or Euclidean norm; all zeros stay zeros."""
    check_choice("normalize", how, ("mean", "max", "l2", "none"))
    if how == "none":
        return scores
    magnitude = np.abs(scores)
    scale = {
        "mean": magnitude.mean(),
        "max": magnitude.max(initial=0.0),
        "l2": float(np.linalg.norm(scores)),
    }[how]
    return scores / scale if scale > 0 else scores


def reduced(rows: list[Vector], how: Reduce, width: int) -> Vector:
    """One vector from those of all members; zeros where there are none."""
    check_choice("reduce", how, ("mean", "sum", "max", "first"))
    if not rows:
        return np.zeros(width)
    stacked = np.stack(rows)
    if how == "first":
        return rows[0]
    result: Vector = {"mean": stacked.mean(0), "sum": stacked.sum(0), "max": stacked.max(0)}[how]
    return result


def producers_of(group: ChannelGroup, consumers: bool = False) -> list[Member]:
    """The kernels that make a group's channels, and on request those that read them."""
    chosen = [member for member in group.producers if member.scored]
    if consumers:
        chosen += [member for member in group.consumers if member.scored]
    return chosen


def over_other_axes(value: NDArray[np.floating], axis: int) -> tuple[int, ...]:
    """All axes but one, to reduce over."""
    return tuple(a for a in range(value.ndim) if a != axis)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises :class:`ArgumentError` unless ``value`` is among ``choices``."""
    if value not in choices:
        raise ArgumentError(
            f"Expected {name} to be one of {', '.join(choices)}. Received: {value!r}."
        )
