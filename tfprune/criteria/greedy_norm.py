r"""L1 norm with the greedy scoring: channels that went upstream no longer count.

Reference: Li, Kadav, Durdanovic, Samet and Graf, "Pruning Filters for Efficient ConvNets", ICLR
2017 (arXiv:1608.08710), section 3.3: from the input to the output, a filter's norm is summed over
the input channels that are still there,

.. math:: s_j = \sum_{c \in \text{kept}} \sum_{u,v} |W_{u,v,c,j}|,

whereas the independent scoring (:class:`~tfprune.criteria.L1`) sums over all of them. Both give the
same widths; the paper finds the greedy one better at high ratios. Checked against the paper's text.

Departures, as for :class:`~tfprune.criteria.L1`: a group with several producers (a residual stream)
takes all of them into account, each divided by its mean. A producer that stands below channels
which are not chosen yet (the stream's second convolution, when the stream is chosen first) counts
them all: groups are chosen in the order of the model, by the first of their producers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tfprune.criteria.norm import L1
from tfprune.criteria.scores import (
    Normalize,
    Reduce,
    Scores,
    Vector,
    from_members,
    producers_of,
)
from tfprune.criteria.selection import Indices, Quota, Selection
from tfprune.graph import ChannelGraph, Member


@dataclass(frozen=True)
class GreedyL1:
    """Sum of absolute weights over the input channels that survived so far.

    Args:
        reduce: how the producers of a group come together: ``"mean"``, ``"sum"``, ``"max"``, or
            ``"first"``.
        normalize: what each producer's norms are divided by.
    """

    reduce: Reduce = "mean"
    normalize: Normalize = "mean"

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group with nothing pruned yet: those of L1."""
        scores = L1(self.reduce, self.normalize)(graph)
        return Scores(scores.values, "greedy L1 norm")

    def select(self, graph: ChannelGraph, quotas: Mapping[str, Quota]) -> Selection:
        """The channels of largest norm, group after group in the order of the model."""
        kept: dict[str, Indices] = {}
        for group in graph.prunable:
            if group.name in quotas:
                scores = self._scores(graph, group.name, kept)
                kept[group.name] = quotas[group.name].best(scores)
        return Selection(kept)

    def _scores(self, graph: ChannelGraph, name: str, kept: Mapping[str, Indices]) -> Vector:
        keep = graph.keep(kept)
        sites = {id(site.variable): site for site in graph.record.sites.values()}

        def score(member: Member) -> Vector:
            weights = np.abs(np.asarray(member.variable).astype(np.float64))
            for axis, labels in enumerate(sites[id(member.variable)].labels):
                if labels is None or axis == member.axis:
                    continue
                shape = [1] * weights.ndim
                shape[axis] = -1
                weights = weights * keep(labels).reshape(shape)
            return np.asarray(
                weights.sum(tuple(a for a in range(weights.ndim) if a != member.axis))
            )

        scores = from_members(
            graph, "greedy L1 norm",
            lambda group: producers_of(group) if group.name == name else [],
            score, reduce=self.reduce, normalize=self.normalize,
        )  # fmt: skip
        return scores[name]
