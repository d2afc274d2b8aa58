"""Between weights and channels, in the graph of a training step.

A :class:`~tfprune.graph.groups.Member` says which positions along one axis of a weight carry which
channels of a group. Here are the two ways across as ``keras.ops``: sums over everything that
belongs to a channel, and one number per channel spread over the weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from tfprune.graph import Member


class Axis:
    """One member's axis, prepared for a training step.

    Attributes:
        member: the member.
        width: channels of its group.
        variable: the weight.

    Args:
        member: see above.
        width: channels of the group that it belongs to.
    """

    def __init__(self, member: Member, width: int) -> None:
        self.member = member
        self.width = width
        self.variable = member.variable
        rank = len(member.variable.shape)
        size = int(member.variable.shape[member.axis])
        # Positions of other groups' channels go to a number behind the last.
        index = np.full(size, width, np.int32)
        index[member.positions] = member.channels
        self._index = index
        self._whole = size == width and bool((index == np.arange(width)).all())
        self._others = tuple(axis for axis in range(rank) if axis != member.axis)
        self._shape = tuple(size if axis == member.axis else 1 for axis in range(rank))

    def total(self, value: Any) -> Any:
        """Sums a tensor of the weight's shape over all that belongs to each channel: ``(width,)``.

        Positions that carry no channel of the group do not count.
        """
        sums = ops.sum(value, axis=self._others) if self._others else value
        if self._whole:
            return sums
        return ops.segment_sum(sums, self._index, num_segments=self.width + 1)[: self.width]

    def spread(self, values: Any, elsewhere: float = 0.0) -> Any:
        """A tensor that broadcasts to the weight's shape, from one number per channel.

        Args:
            values: shape ``(width,)``.
            elsewhere: what stands at positions that carry no channel of the group.
        """
        if not self._whole:
            rest = ops.full((1,), elsewhere, dtype=values.dtype)
            values = ops.take(ops.concatenate([values, rest]), self._index, axis=0)
        return ops.reshape(values, self._shape)

    @property
    def size(self) -> int:
        """Entries of the weight that belong to one channel (the largest number, if they differ)."""
        per_position = int(np.prod([int(self.variable.shape[axis]) for axis in self._others]))
        counts = np.bincount(self._index[self._index < self.width], minlength=self.width)
        return per_position * int(counts.max(initial=0))
