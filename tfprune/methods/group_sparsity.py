r"""Penalties on whole channel groups: DepGraph's sparse training, and growing regularisation.

References.

- G. Fang, X. Ma, M. Song, M. Bi Mi and X. Wang, "DepGraph: Towards Any Structural Pruning", CVPR
  2023, arXiv:2301.12900: :class:`GroupNormSparsity`. The formulas are confirmed by two papers that
  cite it, the details are read in the authors' library Torch-Pruning; the paper's text was not at
  hand. Sheet A9.5.
- H. Wang, C. Qin, Y. Zhang and Y. Fu, "Neural Pruning via Growing Regularization", ICLR 2021,
  arXiv:2012.09243: :class:`GrowingRegularisation`. Recalled, constants included; neither text nor
  code was at hand.

*DepGraph.* Channel k of a group is everything that would be cut with it, and is worth

.. math:: I_k = \sum_{w \in \text{group}} \lVert w[k] \rVert_2^2

over the slices that make it, its scales, and the slices that read it. Training adds

.. math:: \rho\, \gamma_k\, w[k], \qquad
          \gamma_k = 2^{\alpha (I_{max} - I_k) / (I_{max} - I_{min})}

to the gradient of each of them: the weakest channel shrinks :math:`2^\alpha` times as fast as the
strongest, so that a gap opens. :math:`\gamma` is computed anew in every step, as a constant (it is
not differentiated). As in the library, I stands under a square root inside :math:`\gamma`
(``root=False`` is the paper's formula), and the factor 2 of the square's derivative is part of
:math:`\rho`. Where all channels are equal, all :math:`\gamma` are 1.

*Growing regularisation.* GReg-1 chooses first which filters go (L1 norm), and adds
:math:`\lambda_k w[k]` to their gradient, with

.. math:: \lambda_k(t) = \min(\tau,\ \delta\, \lfloor t / K \rfloor)

in step t for the chosen ones and 0 for the others: the network has time to move what they do
elsewhere. GReg-2 lets :math:`\lambda` grow for all filters up to a small :math:`\tau'` first; they
then fall by different amounts, depending on the curvature of the loss, and the choice is made by
the norms that result. ``variant="graded"`` is Torch-Pruning's relative of it (recalled): every
channel's :math:`\lambda_k` grows, by :math:`\delta (I_{max} - I_k) / (I_{max} - I_{min})`, and the
choice is made at the end.

*What equals what.* The smaller network computes what the trained one does with the removed channels
left out where they are read. With a_k what channel k holds, a layer that reads it with the slice
w[k] loses :math:`\sum_k w[k] a_k`, of norm at most :math:`\sum_k n_k \lvert a_k \rvert`, where
:math:`n_k = \sqrt{I_k}`, since the slice is a part of the group's norm. So the difference at every
layer that reads goes to 0 with the norms of the removed channels, if these norms include the
slices that read: in DepGraph's training, and with ``penalised="group"``. With the paper's
``penalised="filters"`` they do not, and with batch normalisation the small filters are scaled up
again, until their variance falls under its epsilon; what is lost then is a constant, its shift.
Further layers amplify as they do: there is no bound on the outputs. ``StructuredResult.difference``
is measured.

Departures.

- All channels are ranked together by norms relative to the group, and cut at once after training;
  the library removes them in 400 small steps, and GReg takes the same fraction of every layer.
- Biases, shifts and statistics neither count nor shrink (as in the library). Groups of ``ignore``
  are not penalised.
- The terms pass through the optimizer, momentum included; the library sets its weight decay to 0.
- GReg-2 chooses at the beginning of the next epoch. :math:`\lambda` of the others is then set to
  0. Until :math:`\lambda` has reached :math:`\tau` nothing ends by itself: the number of epochs is
  the user's, and the paper keeps :math:`\tau` for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from tfprune.arguments import check_positive, check_whole
from tfprune.criteria.group_norm import GroupNorm
from tfprune.criteria.norm import L1
from tfprune.criteria.scores import Normalize, Scores, Vector, check_choice
from tfprune.errors import ArgumentError, ModelError
from tfprune.graph import ChannelGraph, ChannelGroup, Member, analyse
from tfprune.graph.plan import PruningPlan
from tfprune.layers.distribution import strategy_scope
from tfprune.layers.per_channel import Axis
from tfprune.layers.updates import Gradients, MethodUpdate
from tfprune.methods.structured import StructuredMethod, penalised_groups

Penalised = Literal["filters", "group"]
"""The kernels that make a channel, or all weights that are cut with it."""

Variant = Literal["greg1", "greg2", "graded"]


@dataclass(frozen=True)
class GroupNormSparsity(StructuredMethod):
    """Shrinks all weights that go with a channel, weak channels faster, and removes the weakest.

    Args:
        reg: rho. The authors have 5e-4 for CIFAR and 1e-4 elsewhere, with 100 epochs of SGD at a
            learning rate of 0.01, no weight decay, and a tenth of it from 60 and from 80 epochs.
        alpha: the logarithm to base 2 of the ratio between fastest and slowest.
        root: whether gamma is computed from the square roots of I (the code) or from I (the paper).
        normalize: what a group's norms are divided by in the final ranking: ``"mean"`` or
            ``"max"`` (their code for CIFAR).
        macs, pruning_ratio, round_to, min_channels, ignore: see :class:`StructuredMethod`; one of
            the first two is needed.

    Raises:
        ArgumentError: a value out of range, or neither ``macs`` nor ``pruning_ratio``.
    """

    reg: float = 5e-4
    alpha: float = 4.0
    root: bool = True
    normalize: Normalize = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_target(self)
        check_positive("reg", self.reg)
        if not (np.isfinite(self.alpha) and self.alpha >= 0):
            raise ArgumentError(f"Expected alpha of at least 0. Received: {self.alpha!r}.")
        check_choice("normalize", self.normalize, ("mean", "max", "l2", "none"))

    def update(self) -> MethodUpdate:
        """The penalty's part of a training step."""
        return GroupNormPenalty(self.reg, self.alpha, self.root, tuple(self.ignore))

    def scores(self, graph: ChannelGraph) -> Scores:
        """I of every channel, relative to its group."""
        return GroupNorm(normalize=self.normalize)(graph)


@keras.saving.register_keras_serializable(package="tfprune")
class GroupNormPenalty(MethodUpdate):
    """Adds ``reg * gamma_k * w`` to the gradients of all weights that go with channel k.

    Args:
        reg: rho.
        alpha: see :class:`GroupNormSparsity`.
        root: see there.
        ignore: names or patterns of groups that are left alone.
    """

    def __init__(
        self,
        reg: float,
        alpha: float = 4.0,
        root: bool = True,
        ignore: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.reg = reg
        self.alpha = alpha
        self.root = root
        self.hold(ignore=tuple(ignore))

    def get_config(self) -> dict[str, Any]:
        """The hyper-parameters."""
        return {
            "reg": self.reg,
            "alpha": self.alpha,
            "root": self.root,
            "ignore": list(self.held.ignore),
        }

    def bind(self, graph: ChannelGraph) -> None:
        """Finds the members of the groups."""
        self.hold(
            groups=[
                [Axis(member, group.width) for member in scored_members(group)]
                for group in penalised_groups(graph, self.held.ignore)
            ]
        )

    def gradients(self, gradients: Gradients, learning_rate: Any) -> Gradients:
        """With the penalty's gradient added."""
        terms = []
        for axes in self.held.groups:
            strength = self.reg * shrinkage(squared_norms(axes), self.alpha, root=self.root)
            terms += [(axis, strength) for axis in axes]
        return with_decay(gradients, terms)

    def figures(self) -> Mapping[str, float]:
        """The sum of gamma_k I_k, times reg: what the penalty comes to."""
        total = 0.0
        for axes in self.held.groups:
            norms = squared_norms(axes)
            gammas = shrinkage(norms, self.alpha, root=self.root)
            total += float(np.asarray(ops.sum(gammas * norms)))
        return {"group_penalty": self.reg * total}


@dataclass(frozen=True)
class GrowingRegularisation(StructuredMethod):
    """Lets the weight decay of the channels that will go grow until nothing is left of them.

    Args:
        growth: delta, what lambda grows by. 1e-4 in the paper (1e-5 for GReg-2's first phase,
            recalled).
        every: K, after how many steps (10 for CIFAR, 5 for ImageNet, recalled).
        ceiling: tau, where lambda stays. The paper has 1. A step must not overshoot: keep the
            learning rate times ``ceiling`` below 1.
        variant: ``"greg1"`` chooses in :meth:`prepare`; ``"greg2"`` once all lambda have reached
            ``pick_ceiling``; ``"graded"`` at the end.
        pick_ceiling: tau' of GReg-2; 0.01 in the paper.
        penalised: ``"filters"``: the kernels that make a channel (the paper); ``"group"``: all
            weights that are cut with it, so that what reads a removed channel goes to 0 as well
            (Torch-Pruning).
        criterion: what chooses: ``"l1"`` norms of filters (the paper) or ``"group_norm"``.
        macs, pruning_ratio, round_to, min_channels, ignore: see :class:`StructuredMethod`; one of
            the first two is needed.

    Raises:
        ArgumentError: a value out of range, or neither ``macs`` nor ``pruning_ratio``.
    """

    growth: float = 1e-4
    every: int = 10
    ceiling: float = 1.0
    variant: Variant = "greg1"
    pick_ceiling: float = 0.01
    penalised: Penalised = "filters"
    criterion: Literal["l1", "group_norm"] = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_target(self)
        for name in ("growth", "ceiling", "pick_ceiling"):
            check_positive(name, getattr(self, name))
        check_whole("every", self.every, 1)
        check_choice("variant", self.variant, ("greg1", "greg2", "graded"))
        check_choice("penalised", self.penalised, ("filters", "group"))
        check_choice("criterion", self.criterion, ("l1", "group_norm"))
        if self.variant == "greg2" and self.pick_ceiling > self.ceiling:
            raise ArgumentError(
                f"Expected pick_ceiling of at most ceiling. Received: {self.pick_ceiling!r} and "
                f"{self.ceiling!r}."
            )

    def update(self) -> MethodUpdate:
        """The growing penalty's part of a training step."""
        return GrowingPenalty(
            self.growth,
            self.every,
            self.ceiling,
            self.variant,
            self.pick_ceiling,
            self.penalised,
            tuple(self.ignore),
        )

    def scores(self, graph: ChannelGraph) -> Scores:
        """The norms by which channels are chosen, as they are now."""
        return (L1() if self.criterion == "l1" else GroupNorm())(graph)

    def prepare(self, model: Any) -> Any:
        """A copy of the model; with GReg-1 it is settled in it which channels will go.

        Raises:
            ModelError, ArgumentError, BudgetError: as :meth:`StructuredMethod.prepare`.
        """
        prepared = super().prepare(model)
        if self.variant == "greg1":
            self.choose(prepared)
        return prepared

    def callbacks(self) -> list[Any]:
        """The structure in the logs, and with GReg-2 the choice."""
        chosen = [ChooseWhenGrown(self)] if self.variant == "greg2" else []
        return [*super().callbacks(), *chosen]

    def choose(self, model: Any) -> None:
        """Settles in a prepared model which channels go, by their norms now."""
        graph = analyse(model)
        plan = self.decide(graph, self.scores(graph))
        with strategy_scope(model):
            growing_penalty(graph).choose(plan.kept)

    def choice(self, graph: ChannelGraph) -> PruningPlan:
        """What was chosen; before there is a choice, what would be chosen now.

        Args:
            graph: of a model from :meth:`prepare`.

        Raises:
            ModelError: not a model from :meth:`prepare`.
        """
        update = growing_penalty(graph)
        if not update.has_chosen:
            return super().choice(graph)
        return PruningPlan.of(graph, update.kept(), {"method": self.describe()})


class ChooseWhenGrown(keras.callbacks.Callback):  # type: ignore[misc]
    """Chooses at the beginning of the first epoch in which all lambda are at ``pick_ceiling``.

    It looks at nothing but the model's state, so that a resumed training chooses alike.

    Args:
        method: whose model is trained.
    """

    def __init__(self, method: GrowingRegularisation) -> None:
        super().__init__()
        self._method = method

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Chooses if it is time."""
        if self.model.update.is_ripe:
            self._method.choose(self.model)


@keras.saving.register_keras_serializable(package="tfprune")
class GrowingPenalty(MethodUpdate):
    """Adds ``lambda_k * w`` to the gradients, and lets lambda_k grow.

    State: the step's number, and for every group lambda_k and whether channel k is to go, float32,
    shape ``(width,)``.

    Args:
        growth, every, ceiling, variant, pick_ceiling, penalised: see
            :class:`GrowingRegularisation`.
        ignore: names or patterns of groups that are left alone.
    """

    def __init__(
        self,
        growth: float,
        every: int,
        ceiling: float = 1.0,
        variant: Variant = "greg1",
        pick_ceiling: float = 0.01,
        penalised: Penalised = "filters",
        ignore: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.growth = growth
        self.every = every
        self.ceiling = ceiling
        self.variant = variant
        self.pick_ceiling = pick_ceiling
        self.penalised = penalised
        self.hold(ignore=tuple(ignore))

    def get_config(self) -> dict[str, Any]:
        """The hyper-parameters."""
        return {
            "growth": self.growth,
            "every": self.every,
            "ceiling": self.ceiling,
            "variant": self.variant,
            "pick_ceiling": self.pick_ceiling,
            "penalised": self.penalised,
            "ignore": list(self.held.ignore),
        }

    def bind(self, graph: ChannelGraph) -> None:
        """Finds the weights, and makes the state: no penalty, no choice."""
        groups = penalised_groups(graph, self.held.ignore)

        def members(group: ChannelGroup) -> list[Member]:
            if self.penalised == "group":
                return scored_members(group)
            return [member for member in group.producers if member.scored]

        self.hold(
            names=[group.name for group in groups],
            axes=[[Axis(member, group.width) for member in members(group)] for group in groups],
            reg=[self.state(f"reg_{i}", shape=(g.width,)) for i, g in enumerate(groups)],
            chosen=[self.state(f"chosen_{i}", shape=(g.width,)) for i, g in enumerate(groups)],
            step=self.state("step", dtype="int32"),
            settled=self.state("settled", dtype="int32"),
        )

    def gradients(self, gradients: Gradients, learning_rate: Any) -> Gradients:
        """With lambda_k w added."""
        pairs = zip(self.held.axes, self.held.reg, strict=True)
        return with_decay(
            gradients, ((axis, ops.convert_to_tensor(r)) for axes, r in pairs for axis in axes)
        )

    def update(self, gradients: Gradients, learning_rate: Any) -> None:
        """Counts the step, and after every K of them lets lambda grow."""
        held = self.held
        held.step.assign_add(1)
        due = ops.equal(ops.mod(held.step, self.every), 0)
        settled = ops.equal(held.settled, 1)
        for axes, reg, chosen in zip(held.axes, held.reg, held.chosen, strict=True):
            speed, ceiling = ops.convert_to_tensor(chosen), self.ceiling
            if self.variant == "greg2":
                speed = ops.where(settled, speed, ops.ones_like(speed))
                ceiling = ops.where(settled, self.ceiling, self.pick_ceiling)
            if self.variant == "graded":
                speed = weakness(squared_norms(axes))
            grown = ops.minimum(reg + self.growth * speed, ceiling)
            reg.assign(ops.where(due, grown, reg))

    def choose(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Settles what goes; lambda of everything else is 0 from here.

        Args:
            kept: group name -> indices of the channels that stay; groups that are not named stay.
        """
        held = self.held
        for name, reg, chosen in zip(held.names, held.reg, held.chosen, strict=True):
            goes = np.zeros(chosen.shape, np.float32)
            if name in kept:
                goes[:] = 1
                goes[np.asarray(kept[name], np.int64)] = 0
            chosen.assign(goes)
            reg.assign(np.asarray(reg) * goes)
        held.settled.assign(1)

    @property
    def has_chosen(self) -> bool:
        """Whether it is settled what goes."""
        return bool(np.asarray(self.held.settled))

    @property
    def is_ripe(self) -> bool:
        """Whether nothing is settled and all lambda have reached ``pick_ceiling``."""
        # In float32 the ceiling may be a rounding error below.
        least = self.pick_ceiling * (1 - 1e-6)
        return not self.has_chosen and all(
            bool((np.asarray(reg) >= least).all()) for reg in self.held.reg
        )

    def kept(self) -> dict[str, Any]:
        """Group name -> indices of the channels that are not to go."""
        pairs = zip(self.held.names, self.held.chosen, strict=True)
        return {name: np.flatnonzero(np.asarray(chosen) == 0) for name, chosen in pairs}

    def figures(self) -> Mapping[str, float]:
        """The largest lambda, and the largest norm of what is to go as a fraction of its group's.

        The latter is that of the root of I over the penalised weights, and 0 without a choice.
        """
        largest = max((float(np.asarray(reg).max()) for reg in self.held.reg), default=0.0)
        left = 0.0
        for axes, chosen in zip(self.held.axes, self.held.chosen, strict=True):
            norms: Vector = np.sqrt(np.asarray(squared_norms(axes), np.float64))
            if norms.max(initial=0.0) > 0:
                left = max(left, float((norms * np.asarray(chosen)).max() / norms.max()))
        return {"regularisation": largest, "norm_to_go": left}


def growing_penalty(graph: ChannelGraph) -> GrowingPenalty:
    """The update of a model from :meth:`GrowingRegularisation.prepare`.

    Raises:
        ModelError: another model.
    """
    update = getattr(graph.model, "update", None)
    if isinstance(update, GrowingPenalty):
        return update
    raise ModelError(
        "Expected a model from GrowingRegularisation.prepare, which remembers what was chosen. "
        f"Received: {graph.model.name!r}, which is none."
    )


def scored_members(group: ChannelGroup) -> list[Member]:
    """What counts of a group: kernels that make or read its channels, and scales."""
    return [member for member in group.members if member.scored]


def squared_norms(axes: Sequence[Axis]) -> Any:
    """I_k: the sum of squares of all that belongs to each channel, shape ``(width,)``."""
    return sum(axis.total(ops.square(axis.variable)) for axis in axes)


def weakness(norms: Any) -> Any:
    """``(max - I_k) / (max - min)``: 1 for the weakest, 0 for the strongest, or if all are equal.

    Args:
        norms: shape ``(width,)``.
    """
    largest = ops.max(norms)
    span = largest - ops.min(norms)
    return (largest - norms) / ops.where(span > 0, span, ops.ones_like(span))


def shrinkage(squares: Any, alpha: float, *, root: bool) -> Any:
    """gamma_k, from 1 for the strongest channel to ``2 ** alpha`` for the weakest.

    Args:
        squares: I_k, shape ``(width,)``.
        alpha: see there.
        root: whether the square roots of I decide.
    """
    return ops.power(2.0, alpha * weakness(ops.sqrt(squares) if root else squares))


def with_decay(gradients: Gradients, terms: Iterable[tuple[Axis, Any]]) -> Gradients:
    """The gradients with ``strength_k * w[k]`` added, for weights that have a gradient.

    Args:
        gradients: by ``id`` of the weight.
        terms: axes of weights, each with one strength per channel, shape ``(width,)``. A weight
            may come several times.
    """
    result = dict(gradients)
    for axis, strength in terms:
        key = id(axis.variable)
        if key in result:
            result[key] = result[key] + axis.spread(strength) * axis.variable
    return result


def require_target(method: StructuredMethod) -> None:
    """Raises :class:`ArgumentError` if neither ``macs`` nor ``pruning_ratio`` is given."""
    if method.macs is None and method.pruning_ratio is None:
        raise ArgumentError(
            f"Expected macs or pruning_ratio, as {type(method).__name__} has no rule of its own "
            "for how much goes. Received: neither. Write, say, macs=0.5."
        )
