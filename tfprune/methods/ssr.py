r"""SSR: structured sparsity of whole filters, solved by splitting with exact zeros (AULM).

Reference: S. Lin, R. Ji, Y. Li, C. Deng and X. Li, "Toward Compact ConvNets via Structure-Sparsity
Regularized Filter Pruning", IEEE TNNLS 31(2):574-588, 2020, arXiv:1901.07827. The constants and the
order of the steps are read in the authors' code (LeNet only); the paper's text was not at hand.
Sheet B8.4. The proximal steps are derived, and checked against a search for the minimum.

Row i of D holds everything that makes channel i of a group: its filters in all kernels that
produce it, and their biases. Training minimises

.. math:: J(D) + \sum_l \lambda_l \sum_i g(D_{l,i}), \qquad
          g(d) = \lVert d \rVert_2 \ (L_{2,1}) \quad\text{or}\quad
          g(d) = [d \ne 0] \ (L_{2,0})

with a copy F of D that alone is penalised, a multiplier Y and the penalty :math:`\rho`:

1. every step: the optimizer's, on
   :math:`J(D) + \tfrac{\rho}{2} \lVert D - (F - Y/\rho) \rVert^2`, that is with
   :math:`\rho (D - F) + Y` added to the gradient;
2. every T steps: F := the proximal point of :math:`Z = D + Y/\rho`, row by row:
   :math:`F_i = Z_i \max(1 - \lambda / (\rho \lVert Z_i \rVert), 0)` for :math:`L_{2,1}`, and
   :math:`F_i = Z_i` if :math:`\lVert Z_i \rVert^2 \ge 2 \lambda / \rho`, else 0, for
   :math:`L_{2,0}`;
3. then :math:`Y := Y + \rho (D - F)`.

The first two are also done before the first step, as in the code. At the end the channels go whose
row of F is zero: F, not D, is exactly sparse.

*Scale.* :math:`\lambda / \rho` is the only threshold, so that filters must be of comparable size.
``normalise=True`` measures a row by the root of the mean of its squares instead of its norm: with n
entries, :math:`\lambda` stands for :math:`\lambda \sqrt n` in :math:`L_{2,1}` (the group lasso's
customary weight) and for :math:`\lambda n` in :math:`L_{2,0}`. Neither need make the layers of a
network comparable: a single strength may empty some and spare the rest. ``weights`` give each its
own strength, as the authors' code has it, and :meth:`SSR.even_weights` makes some from a network.

*What equals what.* The smaller network computes what the trained one does with the lost channels
left out where they are read. Without batch normalisation, and with an activation that is 0 at 0 and
grows no faster than its argument (ReLU), a lost channel holds at most
:math:`\lVert D_i \rVert \cdot \lVert (x, 1) \rVert` with x what its filters see, and for such a
channel :math:`\lVert D_i \rVert = \lVert D_i - F_i \rVert`: the difference goes to 0 as the
splitting converges. *Behind batch normalisation it does not*: a small row is scaled up again as
long as its variance is above the normalisation's epsilon, and a row of zeros is not a zero channel
but a constant one, its shift; what reads it loses that constant. ``StructuredResult.difference`` is
measured; fine-tune afterwards, as the paper does.

Departures.

- All groups at once; the code prunes layer by layer, with a fine-tuning after each.
- Coupled channels (a residual stream) are one row over all kernels that make it. Depthwise kernels
  and scales follow a channel and are no part of its row.
- A group keeps ``min_channels``, those of the largest rows.
- With ``macs`` or ``pruning_ratio`` as many channels go as that takes, first those whose row of F
  is zero, by D, then by F: in the order in which a growing :math:`\lambda` would take the rows, so
  that ``weights`` and ``normalise`` count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from tfprune.allocation.steps import check_patterns, matches
from tfprune.arguments import check_positive, check_whole
from tfprune.criteria.scores import Scores, Vector, check_choice
from tfprune.errors import ArgumentError, ModelError
from tfprune.graph import ChannelGraph, ChannelGroup, Member, analyse
from tfprune.layers.per_channel import Axis
from tfprune.layers.updates import Gradients, MethodUpdate
from tfprune.methods.structured import StructuredMethod, penalised_groups

Norm = Literal["l21", "l20"]


@dataclass(frozen=True)
class SSR(StructuredMethod):
    """Trains with a penalty on whole filters, split off so that filters become exactly zero.

    Args:
        penalty: lambda of every group, or what the ``weights`` multiply.
        norm: ``"l21"``, the group lasso, or ``"l20"``, the number of filters.
        rho: of the splitting; 1 in the authors' code.
        every: T, steps between two updates of F and Y; 200 there.
        normalise: whether rows are measured by the root of the mean of their squares.
        weights: names or patterns of groups, or of layers that produce them -> factor on
            ``penalty``; the last pattern that matches counts, others have 1. The code has a lambda
            of 0.4, 0.15 and 0.02 for the three layers of LeNet.
        macs, pruning_ratio, round_to, min_channels, ignore: see :class:`StructuredMethod`. Without
            ``macs`` and ``pruning_ratio`` the channels go whose row of F is zero.

    Raises:
        ArgumentError: a value out of range.
    """

    penalty: float
    norm: Norm = "l21"
    rho: float = 1.0
    every: int = 200
    normalise: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("penalty", self.penalty)
        check_positive("rho", self.rho)
        check_choice("norm", self.norm, ("l21", "l20"))
        check_whole("every", self.every, 1)
        for pattern, weight in self.weights.items():
            if not np.isfinite(weight) or weight < 0:
                raise ArgumentError(
                    f"Expected weights of at least 0. Received: {weight!r} for {pattern!r}."
                )

    def update(self) -> MethodUpdate:
        """The splitting's part of a training step."""
        return Splitting(
            self.penalty,
            self.norm,
            self.rho,
            self.every,
            self.normalise,
            dict(self.weights),
            tuple(self.ignore),
        )

    def acts_on(self, group: ChannelGroup) -> bool:
        """Whether there is a kernel that makes the group's channels."""
        return bool(rows_of(group))

    def check(self, graph: ChannelGraph) -> None:
        """As :meth:`StructuredMethod.check`, and that ``weights`` name something."""
        check_patterns(graph, list(self.weights), "weights")
        super().check(graph)

    def prepare(self, model: Any) -> Any:
        """A copy of the model, with F and Y as the first of their updates leaves them.

        Raises:
            ModelError, ArgumentError, BudgetError: as :meth:`StructuredMethod.prepare`.
        """
        # A pattern that names nothing is refused before the update looks for it.
        check_patterns(analyse(model), list(self.weights), "weights")
        prepared = super().prepare(model)
        prepared.update.split()
        return prepared

    @staticmethod
    def even_weights(model: Any) -> dict[str, float]:
        """Factors for ``weights`` under which all groups are as far from their thresholds.

        Ours: the mean norm of a group's rows in ``model``, over the mean of these means. For
        ``norm="l21"`` and ``normalise=False``.

        Args:
            model: the one that will be prepared, or its channel graph.

        Returns:
            Group -> factor, for the groups that a kernel makes.

        Raises:
            ModelError: as :func:`~tfprune.graph.analyse` has it.
        """
        graph = model if isinstance(model, ChannelGraph) else analyse(model)
        means = {}
        for group in graph.prunable:
            axes = [Axis(member, group.width) for member in rows_of(group)]
            if axes:
                squares = [axis.total(ops.square(axis.variable)) for axis in axes]
                means[group.name] = float(np.sqrt(np.asarray(sum(squares), np.float64)).mean())
        overall = sum(means.values()) / max(len(means), 1) or 1.0
        return {name: mean / overall for name, mean in means.items()}

    def scores(self, graph: ChannelGraph) -> Scores:
        """The penalty that would take a row of F to zero.

        Where it is zero, a negative number that grows with the penalty that D's row would take.

        Raises:
            ModelError: not a model from :meth:`prepare`.
        """
        update = getattr(graph.model, "update", None)
        if not isinstance(update, Splitting):
            raise ModelError(
                "Expected a model from SSR.prepare, which holds F. Received: "
                f"{graph.model.name!r}, which is none."
            )
        rows = {rows.group: rows for rows in update.held.rows}
        values: dict[str, Vector] = {}
        for group in graph.prunable:
            if group.name not in rows:
                values[group.name] = np.ones(group.width)  # ignored: they all stay
                continue
            sparse, dense = (
                update.threshold(rows[group.name], norms)
                for norms in update.norms(rows[group.name])
            )
            values[group.name] = np.where(sparse > 0, sparse, -1 / (1 + dense))
        return Scores(values, "penalty that zeroes the row of F (SSR)")


class Rows:
    """What makes the channels of one group, and the state that goes with it.

    Attributes:
        group: its name.
        weight: its factor on the penalty.
        axes: of the kernels and biases.
        entries: float32 array, shape ``(width,)``: entries of every row.
        inside: for every axis, a tensor of ones where the weight belongs to the group.
        sparse, multiplier: F and Y, state weights in the shapes of the kernels and biases.
    """

    def __init__(self, group: ChannelGroup, weight: float, number: int, update: Splitting) -> None:
        self.group = group.name
        self.weight = weight
        self.axes = [Axis(member, group.width) for member in rows_of(group)]
        shapes = [axis.variable.shape for axis in self.axes]
        self.entries: NDArray[np.float32] = np.zeros(group.width, np.float32)
        self.inside: list[NDArray[np.float32]] = []
        for axis, shape in zip(self.axes, shapes, strict=True):
            member = axis.member
            along = np.zeros(shape[member.axis], np.float32)
            along[member.positions] = 1
            broad = [-1 if a == member.axis else 1 for a in range(len(shape))]
            self.inside.append(along.reshape(broad))
            others = np.prod([size for a, size in enumerate(shape) if a != member.axis])
            np.add.at(self.entries, member.channels, np.float32(others))
        self.sparse = [
            update.state(f"f_{number}_{i}", shape=shape) for i, shape in enumerate(shapes)
        ]
        self.multiplier = [
            update.state(f"y_{number}_{i}", shape=shape) for i, shape in enumerate(shapes)
        ]

    def squares(self, tensors: Sequence[Any]) -> Any:
        """The sum of squares of every row, shape ``(width,)``."""
        totals = [axis.total(ops.square(t)) for axis, t in zip(self.axes, tensors, strict=True)]
        return sum(totals[1:], start=totals[0])


@keras.saving.register_keras_serializable(package="tfprune")
class Splitting(MethodUpdate):
    """AULM's three steps. State: the number of the step, and for every row F and Y, float32.

    Args:
        penalty, norm, rho, every, normalise, weights: see :class:`SSR`.
        ignore: names or patterns of groups that are left alone.
    """

    def __init__(
        self,
        penalty: float,
        norm: Norm = "l21",
        rho: float = 1.0,
        every: int = 200,
        normalise: bool = False,
        weights: Mapping[str, float] | None = None,
        ignore: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.penalty = penalty
        self.norm = norm
        self.rho = rho
        self.every = every
        self.normalise = normalise
        self.hold(factors=dict(weights or {}), ignore=tuple(ignore))

    def get_config(self) -> dict[str, Any]:
        """The hyper-parameters."""
        return {
            "penalty": self.penalty,
            "norm": self.norm,
            "rho": self.rho,
            "every": self.every,
            "normalise": self.normalise,
            "weights": dict(self.held.factors),
            "ignore": list(self.held.ignore),
        }

    def bind(self, graph: ChannelGraph) -> None:
        """Finds the rows, and makes the state."""

        def factor(group: ChannelGroup) -> float:
            factors = [f for pattern, f in self.held.factors.items() if matches(group, pattern)]
            return float(factors[-1]) if factors else 1.0

        groups = [g for g in penalised_groups(graph, self.held.ignore) if rows_of(g)]
        self.hold(
            rows=[Rows(group, factor(group), i, self) for i, group in enumerate(groups)],
            step=self.state("step", dtype="int32"),
        )

    def gradients(self, gradients: Gradients, learning_rate: Any) -> Gradients:
        """With ``rho (D - F) + Y`` added."""
        result = dict(gradients)
        for rows in self.held.rows:
            for axis, inside, f, y in zip(
                rows.axes, rows.inside, rows.sparse, rows.multiplier, strict=True
            ):
                key = id(axis.variable)
                if key in result:
                    pull = self.rho * (axis.variable - ops.convert_to_tensor(f)) + y
                    result[key] = result[key] + pull * inside
        return result

    def update(self, gradients: Gradients, learning_rate: Any) -> None:
        """Counts the step, and after every T of them updates F and Y."""
        step = self.held.step
        step.assign_add(1)
        self.split(ops.equal(ops.mod(step, self.every), 0))

    def split(self, due: Any = True) -> None:
        """The steps of F and Y, if they are due.

        Args:
            due: bool scalar.
        """
        for rows in self.held.rows:
            dense = [ops.convert_to_tensor(axis.variable) for axis in rows.axes]
            old = [ops.convert_to_tensor(y) for y in rows.multiplier]
            shifted = [d + y / self.rho for d, y in zip(dense, old, strict=True)]
            factors = self._shrunk(rows, rows.squares(shifted))
            for axis, d, z, y, f, multiplier in zip(
                rows.axes, dense, shifted, old, rows.sparse, rows.multiplier, strict=True
            ):
                new = axis.spread(factors) * z
                f.assign(ops.where(due, new, f))
                multiplier.assign(ops.where(due, y + self.rho * (d - new), y))

    def _shrunk(self, rows: Rows, squares: Any) -> Any:
        """What the proximal step multiplies every row by."""
        strength = self.penalty * rows.weight / self.rho
        if self.norm == "l20":
            return keep_large(squares, strength * (rows.entries if self.normalise else 1.0))
        return soft(squares, strength * (np.sqrt(rows.entries) if self.normalise else 1.0))

    def norms(self, rows: Rows) -> tuple[Vector, Vector]:
        """The norms of all rows of F and of D, float64, shape ``(width,)`` each."""
        scale = np.sqrt(rows.entries) if self.normalise else np.float32(1)
        both = rows.sparse, [axis.variable for axis in rows.axes]
        sparse, dense = (
            np.sqrt(np.asarray(rows.squares(tensors), np.float64)) / scale for tensors in both
        )
        return sparse, dense

    def threshold(self, rows: Rows, norms: Vector) -> Vector:
        """The penalty at which rows of these norms become zero, by the proximal steps.

        Args:
            rows: of one group.
            norms: as :meth:`norms` returns them, float64, shape ``(width,)``.

        Returns:
            Penalties, float64, shape ``(width,)``: ``rho ||z|| / weight`` for the group lasso, and
            ``rho ||z||^2 / (2 weight)`` for the number of filters.
        """
        # Without a penalty of its own a group goes after all others.
        scale = self.rho / max(rows.weight, 1e-12)
        return scale * (norms**2 / 2 if self.norm == "l20" else norms)

    def figures(self) -> Mapping[str, float]:
        """The fraction of rows of F that are zero, and how far D is from F.

        The latter, ``residual``, is the norm of D - F over that of D: 0 when it has converged.
        """
        zero = width = 0
        apart = size = 0.0
        for rows in self.held.rows:
            sparse, _ = self.norms(rows)
            zero, width = zero + int((sparse == 0).sum()), width + len(sparse)
            for axis, inside, f in zip(rows.axes, rows.inside, rows.sparse, strict=True):
                d = np.asarray(axis.variable) * inside
                apart += float(np.square(d - np.asarray(f)).sum())
                size += float(np.square(d).sum())
        return {"zero_rows": zero / max(width, 1), "residual": float(np.sqrt(apart / (size or 1)))}


def soft(squares: Any, threshold: Any) -> Any:
    """Factor on each row that minimises ``threshold ||f|| + ||f - z||^2 / 2`` as ``f = c z``.

    Args:
        squares: ``||z||^2`` of every row, shape ``(rows,)``.
        threshold: scalar, or one for each row.

    Returns:
        ``max(1 - threshold / ||z||, 0)``, and 0 where z is 0.
    """
    norms = ops.sqrt(squares)
    some = norms > threshold
    return ops.where(some, 1 - threshold / ops.where(some, norms, ops.ones_like(norms)), 0.0)


def keep_large(squares: Any, threshold: Any) -> Any:
    """Factor on each row that minimises ``threshold [f != 0] + ||f - z||^2 / 2`` as ``f = c z``.

    Args:
        squares: ``||z||^2`` of every row, shape ``(rows,)``.
        threshold: scalar, or one for each row.

    Returns:
        1 where ``||z||^2 >= 2 threshold``, else 0.
    """
    return ops.cast(squares >= 2 * threshold, squares.dtype)


def rows_of(group: ChannelGroup) -> list[Member]:
    """What makes a group's channels: kernels and their biases; empty without a kernel."""
    return list(group.producers) if any(member.scored for member in group.producers) else []
