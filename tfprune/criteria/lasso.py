r"""LASSO channel pruning: a sparse choice of channels, and the next layer solved for anew.

Reference: He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV
2017 (arXiv:1707.06168). For a layer with filters W that reads c channels, at N sampled positions
with patches X and the original network's responses Y without the bias,

.. math:: \min_{\beta, W} \frac{1}{2N} \Big\lVert Y - \sum_i \beta_i X_i W_i^\top \Big\rVert_F^2
    + \lambda \lVert \beta \rVert_1, \quad \lVert \beta \rVert_0 \le c', \; \lVert W_i \rVert_F = 1.

With W fixed this is a LASSO on the channels' contributions, whose Gram matrix and right-hand side
follow from the moments of X and Y (:mod:`tfprune.criteria.reconstruction.problem`; sheet A3,
"Efficient computation"). The whole path in :math:`\lambda` is computed at once by least-angle
regression, where the authors bracket and bisect; the solution is that of the smallest
:math:`\lambda` with at most c' channels. Then W is solved for by least squares on the channels that
stay (:mod:`tfprune.criteria.reconstruction.least_squares`), once, as the authors do in practice;
``alternate`` gives the alternation of the paper's text.

The target is always the unpruned network's response, so that errors made upstream are corrected;
residual branches also correct the drift of what they are added to
(:mod:`tfprune.criteria.reconstruction.sums`).

Departures, with reasons:

- Exactly c' channels stay: where no point of the path has that many, those of next largest
  :math:`|\beta|`, then those that would enter next, fill up. The authors accept up to 10% more.
- All sampled rows count, where the authors' code draws N / 20 of them for the LASSO; W is
  normalised as in the text (the code leaves that out), and the bias stays as it is (the code
  refits it).
- 1,000 images with 10 positions by default, where the paper takes 5,000; ``images=5000`` is that.
- The paper puts a sampler (a gather) in front of the first convolution of a residual branch. Here
  all layers that read a residual stream lose the same channels: a gather costs time on a phone, and
  the stream itself stays as wide.
- Coupled groups: one LASSO over all readers, each divided by its energy; :math:`\lVert W_i \rVert`
  is then that of all slices that read channel i, divided alike.
- A ridge of 1e-6 of the mean diagonal in the LASSO, so that equal channels make no singular matrix,
  and one of 0.1 towards the trained kernel in the W-step (see there).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.criteria.reconstruction.least_squares import LeastSquares, refit
from tfprune.criteria.reconstruction.moments import Moments, Sampling
from tfprune.criteria.reconstruction.problem import Problem, Vector, group_problem
from tfprune.criteria.reconstruction.ranking import rising
from tfprune.criteria.reconstruction.readers import Indices, Matrix, Reader, owners_of, readers_of
from tfprune.criteria.reconstruction.scoring import require_readers, score_groups
from tfprune.criteria.reconstruction.sequence import State, run
from tfprune.criteria.reconstruction.solve import check_ridge
from tfprune.criteria.scores import Scores
from tfprune.criteria.selection import Quota, Selection
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph, ChannelGroup

_PATH_RIDGE = 1e-6


@dataclass(frozen=True)
class Lasso:
    r"""LASSO on the channels, then least squares on the layers that read them.

    As a criterion: the score of a channel is the largest :math:`\lambda` at which it is in use, on
    the dense network, divided by the group's largest: 0 to 1. Ties are broken by :math:`|\beta|`
    at the end of the path. Groups that no convolution or dense layer reads are scored by the L1
    norm.

    As a selector: layer after layer, against the responses of the original network.

    Memory: see :mod:`tfprune.criteria.reconstruction.moments`; it does not depend on the amount of
    data. With fewer rows (images times positions) than unknowns (channels times window) the ridge
    decides: what the rows do not determine stays as trained.

    Args:
        data: training data; labels are not used.
        images: how many examples, the first of the data; ``None`` for all.
        positions: output positions drawn per example and layer; a layer with no more than these
            gives all.
        seed: of the positions.
        ridge: of the W-step, towards the trained kernel, relative to the mean of the diagonal of A.
        alternate: how often W is solved for in between, at as many widths evenly on the way.
        residual: whether branches make up for the drift of what they are added to.
        batch_size: examples that the networks see at once.

    Raises:
        ArgumentError: a number below 1, a negative ridge or ``alternate``.
    """

    data: Any
    images: int | None = 1000
    positions: int = 10
    seed: int = 0
    ridge: float = 0.1
    alternate: int = 0
    residual: bool = True
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        if isinstance(self.alternate, bool) or not isinstance(self.alternate, int):
            raise ArgumentError(f"Expected alternate to be an int. Received: {self.alternate!r}.")
        if self.alternate < 0:
            raise ArgumentError(
                f"Expected alternate to be at least 0. Received: {self.alternate!r}."
            )
        self._sampling()

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group.

        Raises:
            DataError: no examples, they do not fit the model, or activations that are not finite.
        """
        return score_groups(
            graph,
            self._sampling(),
            lambda problem: path_of(problem, _PATH_RIDGE).scores(),
            "LASSO channel pruning",
        )

    def select(self, graph: ChannelGraph, quotas: Mapping[str, Quota]) -> Selection:
        """The channels that stay, and the kernels that read them, solved for.

        Raises:
            ArgumentError: a group that no convolution or dense layer reads.
            DataError: as for the call.
        """
        require_readers(graph, list(quotas), readers_of(graph))

        def choose(
            state: State,
            group: ChannelGroup,
            readers: Sequence[Reader],
            moments: Mapping[str, Moments],
        ) -> Indices:
            return self._choose(state, group, readers, moments, quotas[group.name])

        steps = LeastSquares.of(graph, quotas, self._sampling(), self.ridge, self.residual, choose)
        return run(graph, list(quotas), steps)

    def _choose(
        self,
        state: State,
        group: ChannelGroup,
        readers: Sequence[Reader],
        moments: Mapping[str, Moments],
        quota: Quota,
    ) -> Indices:
        """beta-steps, with W-steps in between if asked for; A and D serve all of them."""
        matrices: dict[str, Matrix] = {reader.path: state.matrix(reader) for reader in readers}
        outputs = {reader.path: state.outputs(reader) for reader in readers}
        kept = np.arange(group.width)
        for width in _widths(group.width, quota.width, self.alternate):
            problem = group_problem(group, readers, moments, matrices, outputs)
            kept = path_of(problem, _PATH_RIDGE).choose(width, quota.protected, kept)
            if width == quota.width:
                break
            for reader in readers:
                owners = owners_of(reader, group)
                read = state.inputs(reader) & ((owners < 0) | np.isin(owners, kept))
                matrices[reader.path] = refit(reader, moments[reader.path], read, self.ridge)
        return kept

    def _sampling(self) -> Sampling:
        return Sampling(self.data, self.images, self.positions, self.seed, self.batch_size)


def _widths(width: int, target: int, between: int) -> list[int]:
    """Falling widths down to the target, with some evenly in between."""
    steps = np.linspace(width, target, between + 2)[1:]
    return list(dict.fromkeys(int(np.ceil(step - 1e-9)) for step in steps))


@dataclass(frozen=True, eq=False)
class Path:
    r"""The solutions of one group's LASSO for every :math:`\lambda`, linear between knots.

    Attributes:
        lambdas: falling, shape (knots,); N times that of the formula above.
        betas: coefficients of unit-norm filters, shape (knots, channels).
    """

    lambdas: Vector
    betas: Matrix

    def scores(self) -> Vector:
        r"""The largest :math:`\lambda` at which each channel is in use, the largest being 1.

        Ties are moved apart in the order of :math:`|\beta|` at the end of the path, then of the
        indices, of which the lower stays.
        """
        used = self.betas != 0
        first = np.where(used.any(0), used.argmax(0), 0)
        # A channel enters at the knot before the first at which it is not zero.
        entry = np.where(used.any(0), self.lambdas[np.maximum(first - 1, 0)], 0.0)
        top = self.lambdas.max(initial=0.0) or 1.0
        indices = np.arange(self.betas.shape[1])
        order = np.lexsort((-indices, np.abs(self.betas[-1]), entry))
        return rising(order, entry[order] / top)

    def choose(
        self, width: int, protected: Indices, among: NDArray[np.integer[Any]] | None = None
    ) -> Indices:
        r"""Sorted indices of ``width`` channels, from the smallest :math:`\lambda` that is enough.

        Args:
            width: how many.
            protected: which are chosen in any case.
            among: the channels that are left to choose from; by default all.
        """
        few = np.flatnonzero((self.betas != 0).sum(1) <= width)
        beta = np.abs(self.betas[few[-1]])
        rank = np.zeros(len(beta))  # 3: protected, 2: in use, 1: not yet in use, 0: out of the race
        rank[np.arange(len(beta)) if among is None else among] = 1
        rank[(rank > 0) & (beta > 0)] = 2
        rank[protected] = 3
        order = np.lexsort((self.scores(), beta, rank))
        return np.sort(order[::-1][:width])


def path_of(problem: Problem, ridge: float) -> Path:
    """The LASSO path of a group, by least-angle regression on the Gram matrix.

    Args:
        problem: the group's.
        ridge: added to the diagonal of the Gram matrix of unit-norm filters, relative to its mean.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lars_path_gram

    live = np.flatnonzero((np.diag(problem.gram) > 0) & (problem.norms > 0))
    betas = np.zeros((1, len(problem)))
    if not len(live):
        return Path(np.zeros(1), betas)
    norms = problem.norms[live]
    gram = problem.gram[np.ix_(live, live)] / np.outer(norms, norms)
    # Near a mean diagonal of 1, as scikit-learn's thresholds are absolute.
    scale = np.trace(gram) / len(live)
    gram = gram / scale
    gram[np.diag_indices(len(live))] += ridge
    with warnings.catch_warnings():
        # The end of the path is cut off where rounding takes over; what is missing is filled up.
        warnings.simplefilter("ignore", ConvergenceWarning)
        lambdas, _, coefficients = lars_path_gram(
            problem.cross[live] / norms / scale,
            gram,
            n_samples=1,
            max_iter=10 * len(live) + 100,
            method="lasso",
        )
    betas = np.zeros((len(lambdas), len(problem)))
    betas[:, live] = coefficients.T
    return Path(lambdas * scale, betas)
