"""The pass through the network: reader after reader, channels are chosen and weights solved for.

Readers are visited in the order of the model. At each,

1. the groups that it reads and that nothing has been chosen for yet are chosen, with a look at all
   of their readers in the present network;
2. the removed channels are masked;
3. the reader's kernel is solved for, with all that is upstream in its final state.

In a plain network this is the papers' order, layer after layer. A residual stream is chosen at its
first reader, and each later reader is solved for when its turn comes, so that it makes up for what
happened to the layers in between. A kernel that reads several groups (behind a concatenation) is
solved for once, when all of them are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tfprune.criteria.reconstruction.moments import Moments
from tfprune.criteria.reconstruction.readers import Indices, Matrix, Reader, readers_in, readers_of
from tfprune.criteria.selection import Selection
from tfprune.graph import ChannelGraph, ChannelGroup
from tfprune.graph.context import Site
from tfprune.graph.labels import Keep
from tfprune.graph.masking import MaskedModel

Array = NDArray[Any]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class State:
    """What has been decided so far.

    Attributes:
        graph: the source.
        masked: a copy of the source in the present state.
        mask: which channels stay, bool, shape (channels of the graph,).
    """

    graph: ChannelGraph
    masked: MaskedModel
    mask: Mask

    def inputs(self, reader: Reader) -> Mask:
        """Which positions along the reader's input axis stay, shape (inputs,)."""
        return self._kept(reader, reader.input_axis)

    def outputs(self, reader: Reader) -> Mask:
        """Which filters stay, shape (filters,)."""
        return self._kept(reader, reader.input_axis + 1)

    def channels(self, group: ChannelGroup) -> Indices:
        """Sorted indices of the channels of a group that stay."""
        return np.flatnonzero(self.mask[group.channel_ids])

    def matrix(self, reader: Reader) -> Matrix:
        """The source's weights, zero where they read channels that went."""
        kept = np.repeat(self.inputs(reader), reader.taps)
        return reader.matrix(reader.kernel) * kept[:, None]

    def _kept(self, reader: Reader, axis: int) -> Mask:
        labels = reader.site.labels[axis]
        size = int(reader.site.variable.shape[axis])
        return np.ones(size, bool) if labels is None else self.mask[self.graph.channels(labels)]


class Steps(Protocol):
    """What a method does at a reader."""

    @property
    def solves(self) -> bool:
        """Whether kernels are solved for at all."""
        ...

    def moments(self, state: State, readers: Sequence[Reader]) -> dict[str, Moments]:
        """Moments of readers in the present network, by their path."""
        ...

    def choose(
        self,
        state: State,
        group: ChannelGroup,
        readers: Sequence[Reader],
        moments: Mapping[str, Moments],
    ) -> Indices:
        """Sorted indices of the channels of ``group`` that stay; nothing of it is masked yet."""
        ...

    def solve(
        self, state: State, reader: Reader, moments: Moments, losing: Sequence[ChannelGroup]
    ) -> Matrix | None:
        """The reader's new weights, as :meth:`Reader.matrix`; what went is of no account.

        ``losing`` are the groups it reads that lose channels. ``None``: the weights stay.
        """
        ...

    def depends_on_sums(self, state: State, reader: Reader) -> bool:
        """Whether moments of the reader change with tensors that are not upstream of it."""
        ...


def run(
    graph: ChannelGraph,
    losing: Sequence[str],
    steps: Steps,
    kept: Mapping[str, Indices] | None = None,
    values: Mapping[str, Array] | None = None,
) -> Selection:
    """Visits the readers of all groups that lose channels.

    Args:
        graph: the source; it stays as it is.
        losing: names of the groups.
        steps: what the method does.
        kept: groups for which the choice is made.
        values: weights that are given, in the shape of what ``kept`` leaves.

    Returns:
        The channels that stay, and new values for the kernels.
    """
    readers = readers_of(graph)
    kept = dict(kept or {})
    given = dict(values or {})
    kernels: dict[str, tuple[Reader, Matrix]] = {}
    masked = MaskedModel(graph)

    def present() -> dict[str, Array]:
        keep = graph.keep(kept)
        new = {name: _kept_part(r.site, keep, kernel) for name, (r, kernel) in kernels.items()}
        return {**given, **new}

    def settled() -> State:
        """Masks what is decided; the new state."""
        masked.mask(kept, present())
        return State(graph, masked, graph.keep_mask(kept))

    state = settled()
    for reader in readers.values():
        groups = [graph[name] for name in losing if reader in readers_in(graph[name], readers)]
        known: Moments | None = None
        for group in groups:
            if group.name not in kept:
                found = readers_in(group, readers)
                moments = steps.moments(state, found)
                kept[group.name] = steps.choose(state, group, found, moments)
                # What the reader takes in does not change with what it reads of it, unless
                # statistics upstream are taken across the channels.
                known = moments[reader.path] if group.exact else None
                state = settled()
        if groups and steps.solves:
            if known is None or steps.depends_on_sums(state, reader):
                known = steps.moments(state, [reader])[reader.path]
            matrix = steps.solve(state, reader, known, groups)
            if matrix is not None:
                kernels[reader.site.full_name] = reader, reader.unmatrix(matrix)
                state = settled()
    return Selection({name: kept[name] for name in losing}, present())


def _kept_part(site: Site, keep: Keep, kernel: Matrix) -> Array:
    """The kept positions of a whole kernel, in a type that plans hold."""
    kept = [
        np.arange(size) if labels is None else np.flatnonzero(keep(labels))
        for size, labels in zip(kernel.shape, site.labels, strict=True)
    ]
    name = np.asarray(site.variable).dtype.name
    part: Array = kernel[np.ix_(*kept)]
    return part.astype(name if name in ("float16", "float64") else "float32")
