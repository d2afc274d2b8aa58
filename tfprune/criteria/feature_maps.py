"""Feature maps of the channels of a group, at the places where they are read.

HRank and CHIP score a filter by its feature map. Their code, which was read for this, looks behind
the activation: at the output of every ReLU, of the max pooling behind the first convolution of
ResNet-50, and of the ReLU in front of the next convolution of DenseNet. That is, but for the
poolings of VGG, where the next layer reads the map, and the same holds here for any model:

- A *place* of a group is a tensor that a member of the group consumes. In a plain network this is
  the map behind batch normalisation and activation (and pooling, where the papers' VGG is observed
  in front of it).
- Where the next reader finds no map any more, since a pooling over all positions or a flatten
  stands before it, the place is that operation's input, which is the last map.
- A group that is read several times (a residual stream, the branches of an Inception block, the
  later layers of a DenseNet block) has several places. Each is scored on its own, and a channel
  gets the mean over the places where it stands. The authors score every convolution by itself and
  so never meet the question.
- In a concatenated tensor a group sees its own channels, not its neighbours'.
- A group without any map (dense units, the squeezed channels of a gate) is observed where it is
  read, with one number per channel and example.
- Channels that stand in no tensor between layers (the heads inside an attention layer) cannot be
  observed; they are scored by the L1 norm of their filters, as nothing else is known of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.batches import iterate
from tfprune.criteria.norm import L1
from tfprune.criteria.scores import Normalize, Vector, normalized
from tfprune.errors import DataError
from tfprune.graph import ChannelGraph, ChannelGroup
from tfprune.graph.evaluate import evaluate, flatten
from tfprune.graph.labels import Labels
from tfprune.graph.trace import Call, Ref, is_model

Maps = NDArray[np.floating[Any]]
"""Shape (examples, positions along the channel axis, every other axis)."""

# Examples that the model sees at once: all of its tensors are held meanwhile.
_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class Place:
    """One axis of one tensor, as far as it carries channels of a group.

    Attributes:
        group: the group.
        path: the path of the operation that takes the tensor.
        axis: the axis, counted from the front.
        positions: int array: the positions along the axis that carry a channel of the group.
        channels: int array of the same shape: for each of them, the channel's index in the group.
        spatial: whether a channel has more than one number per example.
    """

    group: ChannelGroup
    path: str
    axis: int
    positions: Labels
    channels: Labels
    spatial: bool

    @cached_property
    def present(self) -> Labels:
        """The channels of the group that stand here, in order."""
        return np.unique(self.channels)

    @cached_property
    def owners(self) -> Labels:
        """For each position, the index of its channel in :attr:`present`."""
        return np.searchsorted(self.present, self.channels)


def places_of(graph: ChannelGraph) -> dict[tuple[int, int], list[Place]]:
    """(id of a call, number of its input) -> the places there; each tensor once per group."""
    readers = {
        (path, group.name)
        for group in graph.prunable
        for member in group.consumers
        for path in accumulate(member.path.split("/"), "{}/{}".format)  # a wrapper reads as well
    }
    found: dict[tuple[tuple[int, int, int], int, str], tuple[tuple[int, int], Place]] = {}
    calls = [call for traced in graph.record.traces.values() for call in traced.calls]
    for call in calls:
        if is_model(call.op):
            continue
        path = graph.record.paths.get(id(call.op), "")
        for number, ref in enumerate(call.inputs):
            for place in _standing(graph, ref, path):
                name = place.group.name
                if (path, name) in readers or (place.spatial and _folds(graph, call, place)):
                    found.setdefault((ref.key, place.axis, name), ((id(call), number), place))
    with_maps = {place.group.name for _, place in found.values() if place.spatial}
    result: dict[tuple[int, int], list[Place]] = {}
    for key, place in found.values():
        if place.spatial or place.group.name not in with_maps:
            result.setdefault(key, []).append(place)
    return result


def read_maps(
    graph: ChannelGraph,
    places: Mapping[tuple[int, int], Sequence[Place]],
    data: Any,
    *,
    batches: int | None,
    batch_size: int,
    see: Callable[[Place, Maps], None],
) -> int:
    """Shows ``see`` the maps of some examples at every place, again and again.

    Args:
        graph: the analysed model.
        places: from :func:`places_of`.
        data, batches, batch_size: see :func:`tfprune.batches.iterate`. The model sees at most 16
            examples at once, however large the batches are.
        see: gets the maps at a place, shape (examples, ``len(place.positions)``, other axes),
            float32 unless the model computes in float64.

    Returns:
        The number of batches.

    Raises:
        DataError: no examples, or maps that are not finite.
    """

    def observe(call: Call, tensors: Sequence[Any]) -> None:
        for number, tensor in enumerate(tensors):
            for place in places.get((id(call), number), ()):
                maps = np.moveaxis(np.asarray(tensor), place.axis, 1)[:, place.positions]
                if maps.dtype != np.float64:
                    maps = maps.astype(np.float32)
                if not np.isfinite(maps).all():
                    raise DataError(
                        f"Expected finite feature maps. Received: NaN or infinity at the input "
                        f"of {place.path!r}. Look at the data, and at the model's outputs for them."
                    )
                see(place, maps)

    used = 0
    shape = getattr(graph.model, "input_shape", None)
    for x, _ in iterate(data, batch_size=batch_size, limit=batches, input_shape=shape):
        inputs = flatten(x)
        for start in range(0, len(inputs[0]), _AT_ONCE):
            evaluate(graph, [part[start : start + _AT_ONCE] for part in inputs], observe=observe)
        used += 1
    return used


def from_places(
    graph: ChannelGraph, scored: Mapping[Place, Vector], normalize: Normalize
) -> dict[str, Vector]:
    """For every prunable group, the mean over its places.

    Args:
        graph: the analysed model.
        scored: for each place, one number per channel in ``place.present``.
        normalize: what the numbers of each place are divided by before that.
    """
    total = {group.name: np.zeros(group.width) for group in graph.prunable}
    count = {group.name: np.zeros(group.width) for group in graph.prunable}
    for place, values in scored.items():
        total[place.group.name][place.present] += normalized(values, normalize)
        count[place.group.name][place.present] += 1
    fallback = L1(normalize=normalize)(graph)
    return {
        name: total[name] / np.maximum(count[name], 1) if count[name].any() else fallback[name]
        for name in total
    }


def _standing(graph: ChannelGraph, ref: Ref, path: str) -> Iterator[Place]:
    """The prunable groups whose channels stand on an axis of a tensor (not the examples' axis)."""
    for axis, labels in enumerate(graph.record.tensors.get(ref.key, ())):
        if labels is None or axis == 0:
            continue
        channels = graph.channels(labels)
        owners = graph.group_of[channels]
        for index in np.unique(owners[owners >= 0]).tolist():
            group = graph.groups[index]
            if group.prunable:
                positions = np.flatnonzero(owners == index)
                members = graph.index_of[channels[positions]]
                yield Place(group, path, axis, positions, members, _is_spatial(ref, axis))


def _folds(graph: ChannelGraph, call: Call, place: Place) -> bool:
    """Whether the place's channels leave the call, and no longer as maps."""
    return any(
        other.group is place.group and not other.spatial
        for ref in call.outputs
        for other in _standing(graph, ref, place.path)
    )


def _is_spatial(ref: Ref, axis: int) -> bool:
    """Whether a channel on ``axis`` has several numbers per example (a free size counts as so)."""
    return any(size != 1 for other, size in enumerate(ref.shape) if other not in (0, axis))
