"""The label algebra: integers that name channels, equalities between them, and freezes.

A label names one channel. Label 0 is the constant *frozen* label: a channel that may never be
removed and about which nothing else is known (it fills the untracked part of a concatenation).
Equalities are collected while the rules run and closed once, in one linear pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
"""Labels along one axis, one per position: shape ``(size of the axis,)``."""

AxisLabels = Labels | None
"""Labels of an axis, or ``None`` where the axis is not tracked (nothing on it can be removed)."""

TensorLabels = tuple[AxisLabels, ...]
"""One entry per axis of a tensor, the batch axis included."""

Keep = Callable[[Labels], NDArray[np.bool_]]
"""Answers, for labels along an axis, which positions stay."""


@dataclass(frozen=True)
class Freeze:
    """Why some labels may not be removed: the operation's path and a reason in words."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.path})" if self.path else self.reason


@dataclass(frozen=True)
class Solution:
    """The closed equalities.

    Attributes:
        channel_of: int array, shape ``(labels,)``: the channel (equivalence class) of every label.
            Channel 0 is that of label 0. Channels are numbered by their smallest label.
        frozen: bool array, shape ``(channels,)``.
        reasons: for each frozen channel, the freezes that hit one of its labels, first first.
    """

    channel_of: Labels
    frozen: NDArray[np.bool_]
    reasons: dict[int, tuple[Freeze, ...]]


class LabelStore:
    """Hands out labels and collects what is said about them."""

    def __init__(self) -> None:
        self._size = 1
        self._left: list[Labels] = []
        self._right: list[Labels] = []
        self._freezes: list[tuple[Labels, Freeze]] = []

    def fresh(self, count: int) -> Labels:
        """New labels, all different from every label handed out before."""
        labels = np.arange(self._size, self._size + count, dtype=np.int64)
        self._size += count
        return labels

    def unite(self, first: Labels, second: Labels, path: str = "") -> None:
        """States that the labels are equal, position by position; both have shape ``(n,)``."""
        if len(first) != len(second):
            raise ValueError(
                f"Expected two label arrays of one length at {path!r}. "
                f"Received: {len(first)} and {len(second)}."
            )
        if first is second:
            return
        # Label 0 stands for many unrelated channels: it freezes, and must not join its partners.
        constant = (first == 0) | (second == 0)
        if constant.any():
            met = np.where(first == 0, second, first)[constant]
            self.freeze(met, path, "tied to channels that cannot be removed")
            first, second = first[~constant], second[~constant]
        self._left.append(first)
        self._right.append(second)

    def freeze(self, labels: AxisLabels, path: str, reason: str) -> None:
        """States that none of the labels may be removed, and why."""
        if labels is not None and len(labels):
            self._freezes.append((labels, Freeze(path, reason)))

    def solve(self) -> Solution:
        """Closes the equalities: connected components, linear in labels and equalities."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        left = np.concatenate(self._left) if self._left else np.zeros(0, np.int64)
        right = np.concatenate(self._right) if self._right else np.zeros(0, np.int64)
        matrix = coo_array(
            (np.ones(len(left), np.int8), (left, right)), shape=(self._size, self._size)
        )
        count, component = connected_components(matrix, directed=False)
        # Numbered by smallest label, whatever order the library visits them in.
        _, first = np.unique(component, return_index=True)
        rank = np.empty(count, np.int64)
        rank[np.argsort(first, kind="stable")] = np.arange(count)
        channel_of = rank[component]

        frozen = np.zeros(count, bool)
        frozen[0] = True
        reasons: dict[int, tuple[Freeze, ...]] = {}
        for labels, freeze in self._freezes:
            channels = np.unique(channel_of[labels])
            frozen[channels] = True
            for channel in channels.tolist():
                known = reasons.get(channel, ())
                if freeze not in known and len(known) < 3:
                    reasons[channel] = (*known, freeze)
        return Solution(channel_of, frozen, reasons)


def concatenate(parts: Sequence[AxisLabels], sizes: Sequence[int]) -> AxisLabels:
    """Labels of concatenated axes; untracked parts become label 0, all untracked stays ``None``."""
    if all(part is None for part in parts):
        return None
    return np.concatenate(
        [
            np.zeros(size, np.int64) if part is None else part
            for part, size in zip(parts, sizes, strict=True)
        ]
    )
