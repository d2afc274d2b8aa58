r"""The regression behind a group: its readers' responses, explained by its channels.

With the patches :math:`X_c` that a reader takes of channel c and the slice :math:`W_c` of its
kernel that reads them, :math:`Z_c = X_c W_c` is the channel's contribution at all sampled positions
and to all filters. Their inner products follow from the moments A and D (sheet A2, "Beyond
sampling", and A3, "Efficient computation"; derived there and verified against the explicit sums):

.. math:: G_{cd} = \langle Z_c, Z_d \rangle = \sum_{i \in c, j \in d} A_{ij} (W W^\top)_{ij}, \qquad
    b_c = \langle Z_c, Y \rangle = \sum_{i \in c} (D \circ W)_i.

What else the reader reads (neighbours in a concatenation) counts as given, with its present
weights, and is taken off the target.

A group with several readers (a residual stream, branches) has one problem: the sum of theirs, each
divided by the energy of its target. Responses of different layers have different scales, and those
of the largest would decide alone; divided, each reader says which part of its response is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tfprune.criteria.reconstruction.moments import Moments
from tfprune.criteria.reconstruction.readers import Indices, Matrix, Reader, owners_of
from tfprune.graph import ChannelGroup

Vector = NDArray[np.float64]

# Values of a block of A * (W W') held at once, besides A: 64 MB.
_BLOCK = 8 * 2**20


@dataclass(frozen=True, eq=False)
class Problem:
    """min over beta of ``||y - Z beta||^2``, by its moments.

    Attributes:
        gram: ``Z'Z``, shape (channels, channels).
        cross: ``Z'y``, shape (channels,).
        energy: ``y'y``.
        norms: Frobenius norm of what reads each channel, shape (channels,).
    """

    gram: Matrix
    cross: Vector
    energy: float
    norms: Vector

    def __len__(self) -> int:
        return len(self.cross)

    def loss(self, beta: Vector) -> float:
        """``||y - Z beta||^2``."""
        return float(self.energy - 2 * self.cross @ beta + beta @ self.gram @ beta)


def problem_of(
    reader: Reader,
    group: ChannelGroup,
    moments: Moments,
    matrix: Matrix,
    outputs: NDArray[np.bool_] | None = None,
) -> Problem:
    """The problem of one reader; without targets, that of the channels' own sum.

    Args:
        reader: the reader.
        group: the group whose channels are the unknowns.
        moments: of the reader.
        matrix: its weights, as :meth:`Reader.matrix` gives them; zero for channels that went.
        outputs: which filters count, shape (filters,); by default all.
    """
    owners = owners_of(reader, group)
    wanted = np.ones(matrix.shape[0] * matrix.shape[2], bool) if outputs is None else outputs
    wanted = wanted.reshape(matrix.shape[0], -1)
    size = group.width + 1  # the last stands for all else that the reader reads
    gram, cross, norms, energy = np.zeros((size, size)), np.zeros(size), np.zeros(size), 0.0
    for number, filters in enumerate(wanted):
        weights = matrix[number][:, filters]
        gram += block_sums(moments.gram[number], weights, owners, group.width, reader.taps)
        _add(norms, owners, weights**2, reader.taps)
        if moments.cross is not None and moments.energy is not None:
            _add(cross, owners, moments.cross[number][:, filters] * weights, reader.taps)
            energy += float(moments.energy[number][filters].sum())
    if moments.cross is None:
        own = gram[:-1, :-1]
        return Problem(own, own.sum(1), max(float(own.sum()), 0.0), np.sqrt(norms[:-1]))
    return Problem(
        gram=gram[:-1, :-1],
        cross=cross[:-1] - gram[:-1, -1],
        # Rounding may leave a little below zero where all else explains the target.
        energy=max(energy - 2 * float(cross[-1]) + float(gram[-1, -1]), 0.0),
        norms=np.sqrt(norms[:-1]),
    )


def _add(total: Vector, owners: Indices, values: Matrix, taps: int) -> None:
    """Adds up what stands in the rows of each owner; -1 is the last."""
    np.add.at(total, owners, values.sum(1).reshape(-1, taps).sum(1))


def block_sums(gram: Matrix, weights: Matrix, owners: Indices, width: int, taps: int = 1) -> Matrix:
    """Sums of ``gram * (weights @ weights.T)`` over the blocks of each pair of owners.

    Args:
        gram: shape (P, P).
        weights: shape (P, filters).
        owners: shape (P / taps,): the channel of every ``taps`` neighbours, or -1.
        width: number of channels.
        taps: see ``owners``.

    Returns:
        Shape (width + 1, width + 1); the last row and column are those of owner -1.
    """
    from scipy.sparse import csr_array

    count = len(owners)
    which = csr_array(
        (np.ones(count), (np.arange(count), np.where(owners < 0, width, owners))),
        shape=(count, width + 1),
    )
    result = np.zeros((width + 1, width + 1))
    step = max(_BLOCK // (len(gram) * taps), 1)
    for start in range(0, count, step):
        some = slice(start * taps, min(start + step, count) * taps)
        block = weights[some] @ weights.T
        block *= gram[some]
        if taps > 1:
            block = np.add.reduceat(block, np.arange(0, block.shape[1], taps), axis=1)
            block = block.reshape(-1, taps, count).sum(1)
        result += which[start : start + step].T @ (block @ which)
    return result


def combined(problems: Sequence[Problem]) -> Problem:
    """One problem from those of all readers, each divided by its energy.

    A reader whose target is zero has nothing to lose and is left out.
    """
    live = [problem for problem in problems if problem.energy > 0]
    if not live:
        return problems[0]
    return Problem(
        gram=np.asarray(sum(p.gram / p.energy for p in live)),
        cross=np.asarray(sum(p.cross / p.energy for p in live)),
        energy=float(len(live)),
        norms=np.sqrt(np.asarray(sum(p.norms**2 / p.energy for p in live))),
    )


def group_problem(
    group: ChannelGroup,
    readers: Sequence[Reader],
    moments: Mapping[str, Moments],
    matrices: Mapping[str, Matrix],
    outputs: Mapping[str, NDArray[np.bool_]] | None = None,
) -> Problem:
    """The problem of a group over all of its readers, by the paths of the readers."""
    return combined(
        [
            problem_of(
                reader,
                group,
                moments[reader.path],
                matrices[reader.path],
                None if outputs is None else outputs[reader.path],
            )
            for reader in readers
        ]
    )
