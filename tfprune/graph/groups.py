"""Channel groups: the channels that the same producers make, and everything that hangs on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.graph.context import Record, Role, Site
from tfprune.graph.labelling import label_model
from tfprune.graph.labels import Freeze, Keep, Labels, Solution
from tfprune.graph.structure import Structure, structure_of
from tfprune.graph.trace import Trace

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Member:
    """One axis of one weight, as far as it belongs to a group.

    Attributes:
        path: the operation's path, such as ``"block1/conv"``.
        weight: the weight's name, such as ``"kernel"``.
        axis: the axis, counted from the front.
        role: ``"produces"``, ``"follows"`` or ``"consumes"``.
        positions: int array: the positions along the axis that carry a channel of the group.
        channels: int array of the same shape: for each of them, the channel's index in the group.
        variable: the live variable.
        scored: whether criteria look at it (kernels, scales; not biases and statistics).
        masked: whether the masked model zeroes removed positions: those through which the channel
            is read.
    """

    path: str
    weight: str
    axis: int
    role: Role
    positions: Indices
    channels: Indices
    variable: Any
    scored: bool
    masked: bool

    @property
    def full_name(self) -> str:
        """What a plan calls the weight: ``"block1/conv/kernel"``."""
        return f"{self.path}/{self.weight}"

    def __str__(self) -> str:
        return f"{self.full_name} axis {self.axis}"


@dataclass(frozen=True)
class ChannelGroup:
    """The channels that the same producers make; they can be removed one by one.

    Attributes:
        name: unique in the model: the path of the first producer, and what tells groups of one
            producer apart, such as ``"attention:heads"``.
        width: number of channels.
        producers, followers, consumers: the axes of weights that make, accompany and read them.
        prunable: whether channels may be removed.
        reason: if not, why (in words).
        exact: whether the pruned model computes what the masked one does; ``False`` where
            statistics are taken across the channels (layer and group normalisation).
        inexact_reason: which normalisation, where.
        channel_ids: int array, shape ``(width,)``: the channels' numbers within the graph.
        inner: how many neighbouring positions a channel takes in the tensor that its producers
            make, flattened: the width of a head for a group of attention heads, else 1.
    """

    name: str
    width: int
    producers: tuple[Member, ...]
    followers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    prunable: bool
    reason: str
    exact: bool
    inexact_reason: str
    channel_ids: Indices
    inner: int

    @property
    def path(self) -> str:
        """The path of the first producer."""
        return self.producers[0].path

    @property
    def members(self) -> tuple[Member, ...]:
        """Producers, followers and consumers."""
        return (*self.producers, *self.followers, *self.consumers)

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the operations whose weights the group touches, producers first."""
        return tuple(dict.fromkeys(member.path for member in self.members))


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """Every channel of a model: which go together, which may go, and why not.

    Attributes:
        model: the live model.
        framework: ``"keras"`` or ``"tf_keras"``.
        groups: all groups, prunable or not, in the order of the model.
        structure: what identifies the model for a plan.
        notes: operations whose inputs are frozen, with the reason.
        group_of, index_of: int arrays, shape ``(channels,)``: the group (-1: none) of every
            channel and its index within it.
        record, solution, trace: what the rules said, closed (for cost and surgery).
    """

    model: Any
    framework: str
    groups: tuple[ChannelGroup, ...]
    structure: Structure
    notes: tuple[Freeze, ...]
    group_of: Indices
    index_of: Indices
    record: Record
    solution: Solution
    trace: Trace

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def by_name(self) -> Mapping[str, ChannelGroup]:
        """The groups by their name."""
        return {group.name: group for group in self.groups}

    def __getitem__(self, name: str) -> ChannelGroup:
        group = self.by_name.get(name)
        if group is not None:
            return group
        raise KeyError(
            f"Expected the name of a channel group. Received: {name!r}. "
            f"Groups: {', '.join(group.name for group in self.groups)}."
        )

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups from which channels may be removed."""
        return tuple(group for group in self.groups if group.prunable)

    def channels(self, labels: Labels) -> Labels:
        """The channel number of each label."""
        return self.solution.channel_of[labels]

    def keep_mask(self, kept: Mapping[str, Sequence[int] | Indices]) -> NDArray[np.bool_]:
        """bool array, shape ``(channels,)``, from kept indices by group name."""
        mask = np.ones(len(self.solution.frozen), bool)
        for name, indices in kept.items():
            group = self[name]
            mask[group.channel_ids] = False
            mask[group.channel_ids[np.asarray(indices, np.int64)]] = True
        return mask

    def keep(self, kept: Mapping[str, Sequence[int] | Indices]) -> Keep:
        """A function from labels to the bool mask of those that stay."""
        mask, channel_of = self.keep_mask(kept), self.solution.channel_of
        return lambda labels: mask[channel_of[labels]]

    def __str__(self) -> str:
        from tfprune.reports.tables import graph_table

        return graph_table(self)


def analyse(model: Any, *, input_shape: Any = None) -> ChannelGraph:
    """Labels every channel of a model and groups those that must go together.

    Args:
        model: a functional or sequential model of Keras 3 or tf_keras, built; it may nest others.
            It is only read.
        input_shape: shape of one example without the batch axis (a list of shapes for several
            inputs), for a model that leaves sizes free, such as ``(224, 224, 3)``: without it
            the MACs of such a model are not known.

    Returns:
        The graph. Printing it gives a table: group, width, layers, share of MACs, and whether it
        can be pruned or why not.

    Raises:
        ModelError: the model is subclassed, unbuilt or no Keras model.
        ArgumentError: ``input_shape`` does not fit.
    """
    record, traced = label_model(model, input_shape)
    solution = record.store.solve()
    members, producing = _collect(record, solution)
    count = len(solution.frozen)
    signature = np.zeros(count, np.uint64)
    for number, channels in enumerate(producing):
        signature[channels] += _hash(number)
    # Frozen and free channels of one producer are different groups.
    signature[solution.frozen] ^= np.uint64(1)
    made = np.zeros(count, bool)
    if producing:
        made[np.concatenate(producing)] = True
    _, first, group_of = np.unique(
        np.where(made, signature, np.uint64(0)), return_index=True, return_inverse=True
    )
    order = np.argsort(first, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    group_of = np.where(made, rank[group_of], -1)
    present = np.unique(group_of[made])
    renumber = np.full(len(order) + 1, -1)
    renumber[present] = np.arange(len(present))
    group_of = renumber[group_of]

    index_of = np.full(count, -1)
    ids: list[Indices] = []
    by_group = np.argsort(group_of, kind="stable")
    bounds = np.searchsorted(group_of[by_group], np.arange(len(present) + 1))
    for number in range(len(present)):
        channel_ids = np.sort(by_group[bounds[number] : bounds[number + 1]])
        ids.append(channel_ids)
        index_of[channel_ids] = np.arange(len(channel_ids))

    by_role = _assign(members, group_of, index_of, len(present))
    inexact: dict[int, str] = {}
    for labels, path, why in record.inexact:
        for number in np.unique(group_of[solution.channel_of[labels]]).tolist():
            inexact.setdefault(number, f"{why} ({path})")
    _, first_label = np.unique(solution.channel_of, return_index=True)
    starts = sorted(record.names)
    groups: list[ChannelGroup] = []
    used: dict[str, int] = {}
    for number, channel_ids in enumerate(ids):
        producers, followers, consumers = by_role[number]
        base = producers[0].path
        label = int(first_label[channel_ids[0]])
        named = np.searchsorted(starts, label, side="right") - 1
        if named >= 0 and label == starts[named]:
            base = f"{base}:{record.names[starts[named]]}"
        used[base] = used.get(base, 0) + 1
        name = base if used[base] == 1 else f"{base}#{used[base]}"
        frozen = bool(solution.frozen[channel_ids[0]])
        groups.append(
            ChannelGroup(
                name=name,
                width=len(channel_ids),
                producers=tuple(producers),
                followers=tuple(followers),
                consumers=tuple(consumers),
                prunable=not frozen and len(channel_ids) > 1,
                reason=_reason(solution, channel_ids) if frozen else (
                    "it has only one channel" if len(channel_ids) == 1 else ""
                ),
                exact=number not in inexact,
                inexact_reason=inexact.get(number, ""),
                channel_ids=channel_ids,
                inner=math.gcd(*(_inner_size(record, member) for member in producers)),
            )
        )  # fmt: skip
    notes = tuple(
        dict.fromkeys(
            freeze for reasons in solution.reasons.values() for freeze in reasons if freeze.path
        )
    )
    return ChannelGraph(
        model=model,
        framework=traced.framework,
        groups=tuple(groups),
        structure=structure_of(record),
        notes=notes,
        group_of=group_of,
        index_of=index_of,
        record=record,
        solution=solution,
        trace=traced,
    )


def _collect(
    record: Record, solution: Solution
) -> tuple[list[tuple[Site, int, Role, Labels]], list[Labels]]:
    """Every labelled axis of every weight with its channels; the distinct producing ones."""
    members: list[tuple[Site, int, Role, Labels]] = []
    producing: list[Labels] = []
    for site in record.sites.values():
        for axis, (labels, role) in enumerate(zip(site.labels, site.roles, strict=True)):
            if labels is None or role is None:
                continue
            channels = solution.channel_of[labels]
            members.append((site, axis, role, channels))
            if role == "produces" and site.scored:
                producing.append(np.unique(channels))
    return members, producing


def _assign(
    members: list[tuple[Site, int, Role, Labels]],
    group_of: Indices,
    index_of: Indices,
    count: int,
) -> list[tuple[list[Member], list[Member], list[Member]]]:
    """Splits every labelled axis among the groups that stand on it."""
    result: list[tuple[list[Member], list[Member], list[Member]]] = [
        ([], [], []) for _ in range(count)
    ]
    slot = {"produces": 0, "follows": 1, "consumes": 2}
    for site, axis, role, channels in members:
        owners = group_of[channels]
        for number in np.unique(owners).tolist():
            if number < 0:
                continue
            positions = np.flatnonzero(owners == number)
            result[number][slot[role]].append(
                Member(
                    path=site.path,
                    weight=site.name,
                    axis=axis,
                    role=role,
                    positions=positions,
                    channels=index_of[channels[positions]],
                    variable=site.variable,
                    scored=site.scored,
                    masked=axis in site.masked,
                )
            )
    return result


def _inner_size(record: Record, member: Member) -> int:
    """Positions of the axes that the same weight makes behind the member's."""
    roles = record.sites[id(member.variable)].roles
    later = range(member.axis + 1, len(roles))
    return math.prod(
        int(member.variable.shape[axis]) for axis in later if roles[axis] == "produces"
    )


def _hash(number: int) -> np.uint64:
    """A fixed 64-bit hash (splitmix64): sums of distinct ones tell sets of producers apart."""
    mask = (1 << 64) - 1
    z = (number + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return np.uint64((z ^ (z >> 31)) & ~1)


def _reason(solution: Solution, channel_ids: Indices) -> str:
    seen: dict[Freeze, None] = {}
    for channel in channel_ids.tolist():
        for freeze in solution.reasons.get(channel, ()):
            seen.setdefault(freeze)
    texts = [str(freeze) for freeze in seen]
    more = f", and {len(texts) - 2} more" if len(texts) > 2 else ""
    return "; ".join(texts[:2]) + more
