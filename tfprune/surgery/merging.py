r"""Merges channels that are equal: one of each cluster stays, and its readers take over the others.

If the channels :math:`k` of a cluster :math:`H` carry the same values, a layer that reads them
with slices :math:`W_k` computes :math:`\sum_{k \in H} W_k x_k = (\sum_{k \in H} W_k) x`: one
channel with the summed slice does for all (C-SGD: X. Ding, G. Ding, Y. Guo and J. Han, CVPR 2019,
arXiv:1904.03837; sheet B6, step 4).

*What is exact.* Channels carry the same values if everything that makes them (filters, biases) and
everything that accompanies them (scales, offsets and statistics of batch normalisation, depthwise
filters, slopes) is equal within the cluster, in every layer of the group. Then outputs stay, but
for rounding, whatever lies between: activations, pooling, residual sums, products, concatenations,
flattening, several readers. What is *not* exact, and is refused:

- statistics across channels (layer and group normalisation), in which a channel that stands for two
  would have to count twice;
- channels that are not treated alike: one goes through another branch, or meets another constant;
- a weight that makes channels and reads them with the same axis (tied embeddings): it would have to
  be cut and summed at once.

In attention it works for heads, value widths and outputs as for any other channel. Key widths are
read by the products of queries and keys; there the query's slices are summed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph, ChannelGroup
from tfprune.graph.context import Site, constant_array
from tfprune.graph.groups import Indices
from tfprune.graph.trace import leaves

Array = NDArray[Any]


def merged(
    graph: ChannelGraph,
    clusters: Mapping[str, Any],
    *,
    kept: Mapping[str, Any] | None = None,
    factors: Mapping[str, Any] | None = None,
    average: bool = False,
) -> tuple[dict[str, Indices], dict[str, Array]]:
    """What is left of clusters of channels, and the new values of the weights that read them.

    ``PruningPlan.of(graph, kept, values=values)`` is the plan that does it. Every weight is
    taken from the model as it is, so that the order of layers does not matter: of a weight between
    two such groups the output axis is cut and the input axis summed.

    Args:
        graph: the analysed model; it is only read.
        clusters: group name -> int array of shape ``(width,)``: the number of every channel's
            cluster. Any numbers do; channels of one number are one cluster. Channels of a negative
            number go without being merged with anything. Other groups stay as they are.
        kept: group name -> which channel of every cluster stays, one of each; by default the first.
        factors: group name -> float array of shape ``(width,)``: what a channel's slice is
            multiplied with before it is summed, where a channel is a multiple of the one that stays
            (by default 1).
        average: give the channel that stays the mean of its cluster, in all that makes and
            accompanies it. For channels that are nearly equal: the smaller model then is
            exactly the given one with every such weight replaced by its mean over the cluster.

    Returns:
        Group name -> sorted indices of the channels that stay; and full names of weights -> new
        values in the shape of their kept part (``PruningPlan.values``), floating-point arrays.

    Raises:
        ArgumentError: a group that is unknown, may not be pruned or cannot be merged (with the
            reason), an array of another shape, a cluster of which not exactly one channel stays, or
            whose channels are not treated alike.
    """
    stays = _checked(graph, clusters, kept or {})
    count = len(graph.solution.frozen)
    target: Indices = np.arange(count, dtype=np.int64)
    factor: NDArray[np.float64] = np.ones(count)
    for name, numbers in clusters.items():
        ids, numbers = graph[name].channel_ids, np.asarray(numbers)
        of_cluster = dict(zip(numbers[stays[name]].tolist(), ids[stays[name]], strict=True))
        target[ids] = [of_cluster.get(n, -1) for n in numbers.tolist()]
        if factors is not None and name in factors:
            factor[ids] = _shaped(name, factors[name], graph[name].width, "factors")
    keep = graph.keep(stays)
    values: dict[str, Array] = {}
    for site in graph.record.sites.values():
        value = _merged_weight(graph, site, target, factor, average)
        if value is not None:
            value = value * (1.0 if site.scale is None else site.scale(keep))
            wide = np.asarray(site.variable).dtype == np.float64
            values[site.full_name] = value if wide else value.astype(np.float32)
    return stays, values


def _merged_weight(
    graph: ChannelGraph, site: Site, target: Indices, factor: NDArray[np.float64], average: bool
) -> Array | None:
    """The kept part of a weight in float64, or ``None`` if it is only cut or stays whole."""
    result, changed = None, False
    for axis, labels in enumerate(site.labels):
        if labels is None:
            continue
        channels = graph.channels(labels)
        reads = axis in site.masked
        if (target[channels] == channels).all() and not (reads and (factor[channels] != 1).any()):
            continue
        if result is None:
            result = np.asarray(site.variable).astype(np.float64)
        if not (reads or average):
            result = np.compress(target[channels] == channels, result, axis=axis)
            continue
        changed = True
        result = np.moveaxis(result, axis, 0)
        stays, into = _destinations(channels, target)
        if reads:
            column = factor[channels].reshape(-1, *[1] * (result.ndim - 1))
            result = _summed(result * column, into, len(stays))
        else:
            members = np.bincount(into[into >= 0], minlength=len(stays))
            result = _summed(result, into, len(stays))
            result = result / members.reshape(-1, *[1] * (result.ndim - 1))
        result = np.moveaxis(result, 0, axis)
    return np.ascontiguousarray(result) if result is not None and changed else None


def _summed(value: Array, into: Indices, count: int) -> Array:
    """The sums of the slices that go into each of ``count``; none of them is empty."""
    order = np.argsort(into, kind="stable")
    starts = np.searchsorted(into[order], np.arange(count))
    return np.add.reduceat(value[order], starts, axis=0)


def occurrences(channels: Indices) -> Indices:
    """How many earlier positions of an axis carry the same channel, for every position.

    Behind a flatten a channel stands at one position per pixel, behind a depthwise convolution at
    several in a row: equal channels are paired in the order of their positions.

    Args:
        channels: channel number of every position, shape ``(size,)``.
    """
    order = np.argsort(channels, kind="stable")
    in_order = channels[order]
    starts = np.flatnonzero(np.r_[True, in_order[1:] != in_order[:-1]])
    lengths = np.diff(np.r_[starts, len(channels)])
    result = np.empty(len(channels), np.int64)
    result[order] = np.arange(len(channels)) - np.repeat(starts, lengths)
    return result


def _destinations(channels: Indices, target: Indices) -> tuple[Indices, Indices]:
    """The positions that stay, and the number among them that each goes into (-1: none)."""
    number = occurrences(channels)
    stays = np.flatnonzero(target[channels] == channels)
    found = {
        (int(channels[p]), int(number[p])): i for i, p in enumerate(stays)
    }  # channels treated alike have a partner for every position
    into = [
        -1 if target[c] < 0 else found[int(target[c]), int(n)]
        for c, n in zip(channels.tolist(), number.tolist(), strict=True)
    ]
    return stays, np.asarray(into, np.int64)


# -- what can be merged ------------------------------------------------------------------------


def obstacle(graph: ChannelGraph, group: ChannelGroup) -> str:
    """Why equal channels of a group cannot be merged, in words; empty if they can."""
    if not group.prunable:
        return group.reason
    if not group.exact:
        return f"{group.inexact_reason} takes statistics across the channels"
    adapted = {graph.record.paths[key] for key in graph.record.finishers}
    for member in group.members:
        if member.path in adapted:
            return f"{member.path} computes with arrays that it makes from its weights"
        scale = graph.record.sites[id(member.variable)].scale
        if member.masked and member.role != "consumes" and scale is None:
            return f"{member} makes the channels and reads them"
    return ""


def kinds(graph: ChannelGraph) -> NDArray[np.uint64]:
    """A number for every channel of a model: equal ones are treated alike wherever they go.

    Channels are alike if they stand in the same tensors and weights, as often, and meet the same
    constants.

    Returns:
        uint64 array, shape ``(channels,)``. Compare channels of one group only.
    """
    result = np.zeros(len(graph.solution.frozen), np.uint64)
    for number, labels in enumerate(_axes(graph)):
        np.add.at(result, graph.channels(labels), _hash(f"axis {number}".encode()))
    for traced in graph.record.traces.values():
        for call in traced.calls:
            given = [constant_array(leaf) for leaf in leaves([call.args, call.kwargs])]
            arrays = [a for a in given if a is not None and a.dtype.kind == "f" and a.ndim]
            own = np.size(getattr(call.op, "input_mean", 0.0)) > 1
            if not arrays and not own:
                continue
            known = graph.record.tensors.get(call.outputs[0].key, ())
            for axis in range(-len(known), 0):
                along = known[axis]
                if along is None:
                    continue
                channels = graph.channels(along)
                if own:  # statistics in a normalisation's configuration
                    result[channels] += np.arange(len(channels), dtype=np.uint64)
                for array in arrays:
                    if -axis <= array.ndim and array.shape[axis] == len(channels) > 1:
                        slices = np.moveaxis(array, axis, 0)
                        hashes = [_hash(np.ascontiguousarray(part).tobytes()) for part in slices]
                        np.add.at(result, channels, np.asarray(hashes, np.uint64))
    return result


def _axes(graph: ChannelGraph) -> Iterator[Indices]:
    axes: list[Sequence[Any]] = [*graph.record.tensors.values()]
    axes += [site.labels for site in graph.record.sites.values()]
    return (labels for item in axes for labels in item if labels is not None)


def _hash(content: bytes) -> np.uint64:
    """Fixed 64 bits: sums of distinct ones tell multisets apart."""
    return np.uint64(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()))


def _checked(
    graph: ChannelGraph, clusters: Mapping[str, Any], kept: Mapping[str, Any]
) -> dict[str, Indices]:
    """The channels that stay, of clusters that are fit to be merged."""
    kind = kinds(graph)
    result = {}
    for name in [*clusters, *kept]:
        if name not in graph.by_name or name not in clusters:
            raise ArgumentError(
                f"Expected clusters by names of channel groups. Received: {name!r}, "
                + ("for which there are none." if name in graph.by_name else "which is none. ")
                + f"Groups: {', '.join(group.name for group in graph.prunable)}."
            )
    for name, given in clusters.items():
        group = graph[name]
        numbers = _shaped(name, given, group.width, "clusters")
        if numbers.dtype.kind not in "iu":
            raise ArgumentError(
                f"Expected whole numbers of clusters for {name!r}. Received: {numbers.dtype}."
            )
        present, first = np.unique(numbers, return_index=True)
        first = first[present >= 0]
        stays = np.sort(np.asarray(kept[name], np.int64)) if name in kept else np.sort(first)
        in_range = len(stays) and stays.min() >= 0 and stays.max() < group.width
        if not in_range or not np.array_equal(np.sort(numbers[stays]), present[present >= 0]):
            raise ArgumentError(
                f"Expected exactly one channel of each of the {(present >= 0).sum()} clusters of "
                f"{name!r} to stay. Received: {stays.tolist()[:8]}."
            )
        result[name] = stays
        if len(stays) == group.width:
            continue
        why = obstacle(graph, group)
        if why:
            raise ArgumentError(f"Expected channels that can be merged. Group {name!r}: {why}.")
        leader = dict(zip(numbers[stays].tolist(), stays.tolist(), strict=True))
        partner = [leader.get(n, i) for i, n in enumerate(numbers.tolist())]
        ids = group.channel_ids
        unlike = np.flatnonzero(kind[ids] != kind[ids[partner]])
        if len(unlike):
            raise ArgumentError(
                f"Expected clusters of channels that are treated alike. In group {name!r} channels "
                f"{unlike[0]} and {partner[unlike[0]]} go different ways: some layer sees one of "
                "them only, or meets it with another constant."
            )
    return result


def _shaped(name: str, given: Any, width: int, what: str) -> Array:
    array = np.asarray(given)
    if array.shape != (width,):
        raise ArgumentError(
            f"Expected {what} for the {width} channels of {name!r}. Received: shape {array.shape}."
        )
    return array
