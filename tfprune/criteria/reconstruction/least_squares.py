r"""The W-step: a reader's whole kept kernel, solved for by least squares.

With the columns S of what the reader still reads, :math:`W' = \arg\min \lVert Y - X_S W'
\rVert^2` (He, Zhang and Sun, ICCV 2017, Eq. 4; sheet A3, step 3).

The ridge pulls towards the trained kernel :math:`W_S`, not towards zero:
:math:`W' = W_S + (A_{SS} + \epsilon)^{-1} (D_S - A_{SS} W_S)`. Where the rows determine the kernel
both are the same to about the ridge; where they do not (fewer rows than unknowns, dead inputs) the
kernel stays as it was trained instead of vanishing. The default of 0.1 guards against few rows:
activations are correlated, and a kernel that is solved for in directions of which the rows show
little fits their noise. How large it should be was tried on one network only, and not on held-out
validation data: a starting point, not a recommendation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tfprune.criteria.reconstruction.moments import Moments, Sampling, moments_against
from tfprune.criteria.reconstruction.readers import (
    Indices,
    Matrix,
    Reader,
    readers_in,
    readers_of,
)
from tfprune.criteria.reconstruction.sequence import Mask, State
from tfprune.criteria.reconstruction.solve import solve
from tfprune.criteria.reconstruction.targets import Originals
from tfprune.graph import ChannelGraph, ChannelGroup

Choose = Callable[
    [State, ChannelGroup, Sequence[Reader], Mapping[str, Moments]],
    Indices,
]


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """What is done at a reader: the targets are the original network's responses.

    Attributes:
        originals: the targets.
        sampling: what is looked at.
        ridge: relative to the mean of the diagonal of A.
        chooser: which channels stay; unused where all is chosen.
    """

    originals: Originals
    sampling: Sampling
    ridge: float
    chooser: Choose | None = None

    @classmethod
    def of(
        cls,
        graph: ChannelGraph,
        losing: Iterable[str],
        sampling: Sampling,
        ridge: float,
        residual: bool,
        chooser: Choose | None = None,
    ) -> LeastSquares:
        """For the readers of the groups that lose channels.

        ``residual``: whether a branch makes up for the drift of what it is added to.
        """
        readers = readers_of(graph)
        wanted = {r.path: r for name in losing for r in readers_in(graph[name], readers)}
        originals = Originals(
            graph, list(wanted.values()), sampling.positions, sampling.seed, residual
        )
        return cls(originals, sampling, ridge, chooser)

    @property
    def solves(self) -> bool:
        """Always."""
        return True

    def moments(self, state: State, readers: Sequence[Reader]) -> dict[str, Moments]:
        """Of the present network against the original one."""
        return moments_against(self.originals, state.masked, readers, self.sampling)

    def choose(
        self,
        state: State,
        group: ChannelGroup,
        readers: Sequence[Reader],
        moments: Mapping[str, Moments],
    ) -> Indices:
        """What the chooser says."""
        if self.chooser is None:
            raise AssertionError(f"nothing is left to choose, {group.name!r} either")
        return self.chooser(state, group, readers, moments)

    def solve(
        self, state: State, reader: Reader, moments: Moments, losing: Sequence[ChannelGroup]
    ) -> Matrix:
        """The kept kernel, refit as a whole."""
        return refit(reader, moments, state.inputs(reader), self.ridge)

    def depends_on_sums(self, state: State, reader: Reader) -> bool:
        """Where the target has the drift of other summands in it."""
        return reader.path in self.originals.sums


def refit(reader: Reader, moments: Moments, inputs: Mask, ridge: float) -> Matrix:
    """The least-squares weights of a reader that reads only some of its inputs.

    Args:
        reader: the reader, with its trained weights.
        moments: with targets.
        inputs: which positions along the kernel's input axis are read, shape (inputs,).
        ridge: relative to the mean of the diagonal of A.

    Returns:
        As :meth:`Reader.matrix`, zero at inputs that are not read.
    """
    assert moments.cross is not None  # noqa: S101 - for the type checker
    kept = np.flatnonzero(np.repeat(inputs, reader.taps))
    trained = reader.matrix(reader.kernel)
    result = np.zeros_like(trained)
    for number, weights in enumerate(trained):
        gram = moments.gram[number][np.ix_(kept, kept)]
        missing = moments.cross[number][kept] - gram @ weights[kept]
        result[number][kept] = weights[kept] + solve(gram, missing, ridge)
    return result
