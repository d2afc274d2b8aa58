r"""Network Slimming: an L1 penalty on the scales of batch normalisation, and one threshold for all.

Reference: Z. Liu, J. Li, Z. Shen, G. Huang, S. Yan and C. Zhang, "Learning Efficient Convolutional
Networks through Network Slimming", ICCV 2017, arXiv:1708.06519. The rules are read in the authors'
codes (Lua and PyTorch); the paper's text was not at hand. Sheet A4.

Training minimises

.. math:: \sum l(f(x, W), y) + \lambda \sum_{\gamma} |\gamma|

over all scales :math:`\gamma` of batch normalisations. Its sub-gradient
:math:`\lambda\,\mathrm{sign}(\gamma)`, with sign(0) = 0, is added to the gradient before the
optimizer sees it, and so passes through momentum. Afterwards all channels of the network are ranked
together by :math:`|\gamma|`, and the lowest go.

*What equals what.* The smaller network computes what the trained one does with the lost channels
left out where they are read. That is what gamma = beta = 0 makes of it, where the activation of 0
is 0. The trained network itself differs by what these channels contributed: there is no bound;
``StructuredResult.difference`` is measured. Fine-tune afterwards, as the paper does.

Departures.

- Channels that are coupled (a residual stream behind several batch normalisations) are one channel,
  worth the *largest* of its scales: it goes if none of them needs it. The authors' networks have
  none such, as they select in front of batch normalisations that read a stream; so does
  ``selection=True``.
- ``pruning_ratio`` removes exactly ``floor(N p)`` of the N channels that can go, as the authors'
  Lua code; their PyTorch code removes one more, ``floor(N p) + 1``. A layer keeps
  ``min_channels``; theirs may lose all and fail.
- Channels without any batch normalisation are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from tfprune.criteria.scores import Scores, Vector, from_members
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph, ChannelGroup, Member
from tfprune.graph.plan import PruningPlan
from tfprune.layers.channel_selection import with_selections, without_selections
from tfprune.layers.updates import Gradients, MethodUpdate
from tfprune.methods.structured import StructuredMethod


@dataclass(frozen=True)
class NetworkSlimming(StructuredMethod):
    """Trains with an L1 penalty on the scales of batch normalisation, and removes small ones.

    Args:
        penalty: lambda. The authors have 1e-4 for VGG, 1e-5 for ResNet-164 and DenseNet-40, with
            160 epochs of SGD at a batch size of 64.
        initial_scale: what all scales are set to before training; the paper's trainings from
            scratch start at 0.5. ``None`` leaves them, as befits a network that is trained already.
        selection: put a channel selection in front of every batch normalisation that reads a shared
            stream, as the paper does for pre-activation networks and DenseNets: each reader then
            drops channels of the stream by itself, see :func:`tfprune.layers.with_selections`.
        macs, pruning_ratio, round_to, min_channels, ignore: see :class:`StructuredMethod`. Without
            ``macs`` and ``pruning_ratio`` scales of at most 0.01 go.

    Raises:
        ArgumentError: a value out of range.
    """

    penalty: float = 1e-4
    initial_scale: float | None = None
    selection: bool = False

    threshold: ClassVar[float] = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not np.isfinite(self.penalty) or self.penalty <= 0:
            raise ArgumentError(f"Expected a positive penalty. Received: {self.penalty!r}.")
        if self.initial_scale is not None and not self.initial_scale > 0:
            raise ArgumentError(
                f"Expected a positive initial_scale, or None. Received: {self.initial_scale!r}."
            )

    def update(self) -> MethodUpdate:
        """The penalty's part of a training step."""
        return ScalePenalty(self.penalty)

    def acts_on(self, group: ChannelGroup) -> bool:
        """Whether there is a batch normalisation with scales behind the group."""
        return bool(scales_of(group))

    def prepare(self, model: Any) -> Any:
        """A copy of the model, scales set to ``initial_scale``, with selections if asked for."""
        prepared = super().prepare(with_selections(model) if self.selection else model)
        if self.initial_scale is not None:
            for variable in prepared.update.held.scales:
                variable.assign(ops.full(variable.shape, self.initial_scale, variable.dtype))
        return prepared

    def carried_out(self, model: Any, plan: PruningPlan) -> Any:
        """The smaller model; selections have become ``keras.ops.take`` with constant indices."""
        smaller = super().carried_out(model, plan)
        return without_selections(smaller) if self.selection else smaller

    def scores(self, graph: ChannelGraph) -> Scores:
        """The largest scale of every channel."""
        return largest_scale(graph)


@keras.saving.register_keras_serializable(package="tfprune")
class ScalePenalty(MethodUpdate):
    """Adds the sub-gradient of ``penalty * sum |gamma|`` to the gradients.

    Args:
        penalty: lambda.
    """

    def __init__(self, penalty: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.penalty = penalty

    def get_config(self) -> dict[str, Any]:
        """The penalty."""
        return {"penalty": self.penalty}

    def bind(self, graph: ChannelGraph) -> None:
        """Finds the scales of channels that can go."""
        scales = {
            id(member.variable): member.variable
            for group in graph.prunable
            for member in scales_of(group)
        }
        self.hold(scales=[v for v in scales.values() if v.trainable])

    def gradients(self, gradients: Gradients, learning_rate: Any) -> Gradients:
        """With lambda sign(gamma) added."""
        added = {
            id(gamma): gradients[id(gamma)] + self.penalty * ops.sign(gamma)
            for gamma in self.held.scales
            if id(gamma) in gradients
        }
        return {**gradients, **added}

    def figures(self) -> Mapping[str, float]:
        """The penalty's value, and the mean scale."""
        values = [np.abs(np.asarray(gamma)) for gamma in self.held.scales]
        total = float(sum(value.sum() for value in values))
        return {
            "scale_penalty": self.penalty * total,
            "mean_scale": total / max(1, sum(value.size for value in values)),
        }


def scales_of(group: ChannelGroup) -> list[Member]:
    """The scales of batch normalisations that follow a group."""
    return [m for m in group.followers if m.weight == "gamma" and m.scored]


def largest_scale(graph: ChannelGraph) -> Scores:
    """For every channel the largest absolute scale on it; 0 where there is none."""

    def score(member: Member) -> Vector:
        return np.abs(np.asarray(member.variable).astype(np.float64))

    return from_members(
        graph, "scale of batch normalisation", scales_of, score, reduce="max", normalize="none"
    )
