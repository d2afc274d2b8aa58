"""Selectors: criteria that choose group after group, each choice seeing the earlier ones.

A criterion scores every channel once, and the allocation takes the best of each group. Some papers
do not work like that: which filters of a layer stay depends on those that went before (greedy L1,
ThiNet, LASSO channel pruning, NISP), and what stays may be rescaled or solved for anew. A selector
is a criterion as well: its scores tell the allocation how many channels each group keeps. Then
:meth:`Selector.select` chooses which, with that many fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tfprune.criteria.scores import Scores, Vector
from tfprune.graph import ChannelGraph

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Quota:
    """How many channels of one group stay, and which of them in any case.

    Attributes:
        width: the number of channels that stay, at least ``len(protected)`` and 1.
        protected: sorted indices of channels without which some axis would be empty.
    """

    width: int
    protected: Indices

    def best(self, scores: Vector) -> Indices:
        """Sorted indices of the ``width`` channels of highest score, the protected ones among them.

        Of two channels of equal score the one with the lower index stays.

        Args:
            scores: one number per channel of the group, shape ``(channels,)``.
        """
        ranking = np.array(scores, np.float64)
        ranking[self.protected] = np.inf
        return np.sort(np.argsort(-ranking, kind="stable")[: self.width])


@dataclass(frozen=True, eq=False)
class Selection:
    """What a selector chose.

    Attributes:
        kept: group name -> sorted indices of the channels that stay, for the groups asked for.
        values: new values for weights, as ``PruningPlan.values``: full name -> array in the shape
            of the kept part.
        notes: for the plan's record, in words.
    """

    kept: Mapping[str, Indices]
    values: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Selector(Protocol):
    """A criterion that also chooses, once the widths are known."""

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores for every prunable group, which the allocation turns into widths."""
        ...

    def select(self, graph: ChannelGraph, quotas: Mapping[str, Quota]) -> Selection:
        """The channels that stay.

        Args:
            graph: the analysed model; it stays as it is.
            quotas: group name -> how many stay, for every group that loses channels. The other
                groups keep everything.

        Returns:
            Exactly ``quotas[name].width`` channels for every group named.
        """
        ...
