r"""Soft filter pruning: the filters of lowest norm are zeroed after every epoch, and may come back.

Reference: Y. He, G. Kang, X. Dong, Y. Fu and Y. Yang, "Soft Filter Pruning for Accelerating Deep
Convolutional Neural Networks", IJCAI 2018, pp. 2234-2240, arXiv:1808.06866. The procedure is read
in the authors' code; the paper's text was not at hand. Sheets A9.1 and B8.1.

All weights train, without any mask on gradients. Before the first epoch, and at the end of every
epoch, the ``int(m P)`` filters of smallest :math:`\lVert F_j \rVert_2` of each layer with m filters
are set to zero; P is the same for all layers. The optimizer keeps its momentum, so that a zeroed
filter moves again at once, and the set is chosen anew every time. After the last epoch the zeroed
filters are removed.

*What equals what, and batch normalisation's beta.* Only kernels are zeroed. Behind a zero filter
batch normalisation puts :math:`\beta - \gamma \mu / \sqrt{\sigma^2 + \epsilon}`, and the activation
of that: a constant, which others read. Removing the channel would drop the constant with it. The
finished model has it added to what reads it instead (``absorb``): exactly for dense layers and
convolutions without padding; with zero padding, the border sees zeros in the one and the constant
in the other. ``StructuredResult.difference`` measures what is left.

*Coming back.* A zero filter in front of batch normalisation puts out beta at every position. Where
that is at most 0 and a ReLU follows, no gradient passes, and the filter stays zero for good. In a
network from scratch all betas are 0 at first: what is zeroed before its first epoch never comes
back (``tests/methods/test_sfp.py``). For such a training set ``at_start=False``.

Departures.

- Channels that are coupled are one channel: its producers' norms are averaged, each divided by its
  mean over the group, and all of them are zeroed.
- Validation during ``fit`` sees the zeroed network, as the authors validate after masking.
- The authors pick the epoch by the test set; here it is the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import numpy as np

from tfprune.criteria.norm import L2
from tfprune.criteria.scores import Scores
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph, analyse
from tfprune.graph.plan import PruningPlan
from tfprune.layers.distribution import strategy_scope
from tfprune.layers.updates import MethodUpdate
from tfprune.methods.structured import StructuredMethod
from tfprune.surgery import absorbed


@dataclass(frozen=True)
class SoftFilterPruning(StructuredMethod):
    """Zeroes the filters of lowest norm after every epoch, and removes them after the last.

    Args:
        macs: MACs that are left; every group then loses the same fraction of its channels.
        pruning_ratio: P, of every group; 0.3 in the authors' ImageNet trainings, 0.1 to 0.4 on
            CIFAR-10.
        at_start: also zero before the first epoch, as the authors' code does.
        absorb: add the constants that removed channels were to what reads them, see
            :func:`tfprune.surgery.absorbed`.
        round_to, min_channels, ignore: see :class:`StructuredMethod`.

    Raises:
        ArgumentError: neither ``macs`` nor ``pruning_ratio``, or a value out of range.
    """

    at_start: bool = True
    absorb: bool = True

    order: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.macs is None and self.pruning_ratio is None:
            raise ArgumentError(
                "Expected macs or pruning_ratio: how much to zero after every epoch. Received: "
                "neither."
            )

    def update(self) -> MethodUpdate:
        """Nothing happens within an epoch."""
        return MethodUpdate()

    def callbacks(self) -> list[Any]:
        """What zeroes filters, before what writes the logs."""
        return [ZeroFilters(self, self.at_start), *super().callbacks()]

    def ratio(self, graph: ChannelGraph) -> float | Mapping[str, float] | None:
        """The fraction of every group that goes: ``int(m P)`` of m channels."""
        if self.pruning_ratio is None:
            return None
        return {
            group.name: int(group.width * self.pruning_ratio + 1e-9) / group.width
            for group in graph.prunable
        }

    def scores(self, graph: ChannelGraph) -> Scores:
        """The L2 norm of the filters."""
        return L2()(graph)

    def values(self, graph: ChannelGraph, plan: PruningPlan) -> Mapping[str, Any]:
        """Biases and statistics that take up what the zeroed filters left as constants."""
        return absorbed(graph, plan.kept).values if self.absorb else {}


class ZeroFilters(keras.callbacks.Callback):  # type: ignore[misc]
    """Zeroes the filters that would go if training ended now.

    It does so when training begins, before every validation and at the end of every epoch.

    Args:
        method: decides which.
        at_start: also before the first epoch.
    """

    def __init__(self, method: StructuredMethod, at_start: bool = True) -> None:
        super().__init__()
        self._method = method
        self._at_start = at_start
        self._graph: ChannelGraph | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Zeroes before the first epoch."""
        self._graph = analyse(self.model)
        if self._at_start:
            self._zero()

    def on_test_begin(self, logs: Any = None) -> None:
        """Zeroes before the validation of an epoch."""
        self._zero()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Zeroes where there was no validation."""
        self._zero()

    def _zero(self) -> None:
        if self._graph is not None:
            with strategy_scope(self.model):
                zero_filters(self._graph, self._method.choice(self._graph))


def zero_filters(graph: ChannelGraph, plan: PruningPlan) -> None:
    """Sets the kernels that make the channels which a plan removes to zero, in place."""
    for name, kept in plan.kept.items():
        group = graph[name]
        gone = np.ones(group.width, bool)
        gone[list(kept)] = False
        for member in group.producers:
            if member.scored:
                value = np.asarray(member.variable).copy()
                np.moveaxis(value, member.axis, 0)[member.positions[gone[member.channels]]] = 0
                member.variable.assign(value)
