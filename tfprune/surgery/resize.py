"""A network of the same architecture with other widths, wider ones among them, and new weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tfprune.errors import ArgumentError, ModelError
from tfprune.graph import ChannelGraph, analyse
from tfprune.graph.fresh import reinitialise
from tfprune.graph.labels import Keep, Labels
from tfprune.surgery.rebuild import Rebuilder


def resize(model: Any, widths: Mapping[str, int], *, seed: int = 0) -> Any:
    """The same architecture with other numbers of channels, initialised afresh.

    Pruning keeps weights and can only shrink; this makes a network to train from scratch, such as
    the one that PreConfig describes (:func:`tfprune.allocation.preconfig`).

    Args:
        model: a functional, sequential or nested model of Keras 3 or tf_keras. It stays as it is.
        widths: group name -> number of channels; other groups keep theirs.
        seed: of the new weights, from 0.

    Returns:
        A new, uncompiled model with the same names.

    Raises:
        ArgumentError: an unknown group, one whose width is not free, a width that is no positive
            integer, or a negative seed.
        ModelError: a layer cannot be made with other widths: it holds arrays of its own with an
            entry per channel (constants in the graph, adapted preprocessing, grouped
            normalisation), which cannot be invented.
    """
    graph = analyse(model)
    for name, width in widths.items():
        _check(graph, name, width)
    wider = {n for n, width in widths.items() if width > graph[n].width}
    try:
        result = Rebuilder(graph, _counted(graph, widths)).architecture()
        analyse(result)  # refuses what was built but does not fit together
    except Exception as error:
        if not wider:
            raise
        raise ModelError(
            f"Expected layers that can be made wider. Received: a model in which that fails with "
            f"{type(error).__name__}: {error}. Of the groups asked to grow, leave out those whose "
            f"channels have arrays of their own: {', '.join(sorted(wider))}."
        ) from error
    return reinitialise(result, seed=seed)


def _check(graph: ChannelGraph, name: str, width: object) -> None:
    if name not in graph.by_name:
        raise ArgumentError(
            f"Expected names of channel groups. Received: {name!r}, which the model has not. "
            "print(tfprune.analyse(model)) lists them."
        )
    if not graph[name].prunable:
        raise ArgumentError(
            f"Expected groups whose width is free. Received: {name!r}: {graph[name].reason}."
        )
    if isinstance(width, bool) or not isinstance(width, int | np.integer) or width < 1:
        raise ArgumentError(f"Expected a width of at least 1 for {name!r}. Received: {width!r}.")


def _counted(graph: ChannelGraph, widths: Mapping[str, int]) -> Keep:
    """How often each label stands in the new network: 0, 1, or more where a group grows.

    What is built from counts of kept labels (filters, units, shapes, splits) comes out right.
    """
    times = np.ones(len(graph.solution.frozen), np.int64)
    for name, width in widths.items():
        ids = graph[name].channel_ids
        times[ids] = np.bincount(np.arange(width) % len(ids), minlength=len(ids))
    channel_of = graph.solution.channel_of

    def keep(labels: Labels) -> Any:
        counts = times[channel_of[labels]]
        # A mask wherever that is enough: rules index with it.
        return counts if (counts > 1).any() else counts.astype(bool)

    return keep
