"""Activations, as the consumers read them: their mean magnitude, and the share that is not zero.

References: mean activation: Molchanov, Tyree, Karras, Aila and Kautz, "Pruning Convolutional Neural
Networks for Resource Efficient Inference", ICLR 2017, one of their baselines; average percentage of
zeros: Hu, Peng, Tai and Tang, "Network Trimming", 2016 (arXiv:1607.03250). Both are recalled, not
checked against the papers' texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.batches import iterate
from tfprune.criteria.scores import Normalize, Scores, Vector, normalized
from tfprune.graph import ChannelGraph
from tfprune.graph.evaluate import evaluate, flatten
from tfprune.graph.trace import Call

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class ActivationMean:
    r"""Mean magnitude of a channel where it is read: :math:`\operatorname{mean} |a_k|`.

    Args:
        data: training data; labels are not used.
        batches: how many batches to use; ``None`` for all.
        batch_size: for arrays.
        normalize: what each group's scores are divided by.
    """

    data: Any
    batches: int | None = 10
    batch_size: int = 64
    normalize: Normalize = "mean"

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group.

        Raises:
            DataError: no examples.
        """
        return _statistic(graph, self, np.abs, "mean activation")


@dataclass(frozen=True)
class APoZ:
    """Share of a channel's activations that are not zero (one minus the percentage of zeros).

    Only tells channels apart behind an activation with exact zeros, such as ReLU. Arguments as for
    :class:`ActivationMean`.
    """

    data: Any
    batches: int | None = 10
    batch_size: int = 64
    normalize: Normalize = "none"

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group.

        Raises:
            DataError: no examples.
        """
        return _statistic(graph, self, lambda a: a != 0, "share of non-zero activations (APoZ)")


def _statistic(
    graph: ChannelGraph, settings: ActivationMean | APoZ, function: Callable[[Any], Any], name: str
) -> Scores:
    """The mean of ``function`` over examples and positions, for each channel that is read."""
    readers = {m.path for group in graph.prunable for m in group.members if m.role == "consumes"}
    count = len(graph.solution.frozen)
    total, weight = np.zeros(count), np.zeros(count)

    def observe(call: Call, tensors: Sequence[Any]) -> None:
        if graph.record.paths.get(id(call.op)) not in readers:
            return
        for ref, tensor in zip(call.inputs, tensors, strict=True):
            for axis, labels in enumerate(graph.record.tensors.get(ref.key, ())):
                if labels is None:
                    continue
                values = np.asarray(function(np.asarray(tensor)), np.float64)
                others = tuple(a for a in range(values.ndim) if a != axis)
                channels = graph.channels(labels)
                np.add.at(total, channels, values.sum(others))
                np.add.at(weight, channels, values.size / max(values.shape[axis], 1))

    used = 0
    shape = getattr(graph.model, "input_shape", None)
    for x, _ in iterate(
        settings.data, batch_size=settings.batch_size, limit=settings.batches, input_shape=shape
    ):
        evaluate(graph, flatten(x), observe=observe)
        used += 1
    mean = np.divide(total, weight, out=np.zeros(count), where=weight > 0)
    values: dict[str, Vector] = {
        group.name: normalized(mean[group.channel_ids], settings.normalize)
        for group in graph.prunable
    }
    return Scores(values, f"{name} ({used} batches)")
