r"""Sparse Structure Selection: factors on channels and residual blocks, driven to zero.

Reference: Z. Huang and N. Wang, "Data-Driven Sparse Structure Selection for Deep Neural Networks",
ECCV 2018, arXiv:1707.01213. The placement of the factors and the hyper-parameters are read in the
authors' code (MXNet), the update is derived again and found restated in a later paper; the paper's
text was not at hand. Sheet A5.

Every structure, a channel, a group of a grouped convolution or the branch of a residual addition,
is multiplied by a factor :math:`\lambda`, 1 at first. Training minimises

.. math:: \frac{1}{N} \sum L(y, C(x; W, \lambda)) + R(W) + \gamma \lVert \lambda \rVert_1

with weight decay R on W only. W is trained by the optimizer, on the same batches as
:math:`\lambda`, whose steps are those of an accelerated proximal gradient (APG) with momentum
:math:`\mu`. What is stored is the point :math:`\lambda' = \lambda + \mu v` where the next gradient
g is taken, so that one is enough:

.. math::
    z_t &= \lambda'_{t-1} - \eta\,g \\
    v_t &= S_{\eta\gamma}(z_t) - \lambda'_{t-1} + \mu\,v_{t-1} \\
    \lambda'_t &= S_{\eta\gamma}(z_t) + \mu\,v_t,
    \qquad S_a(z) = \operatorname{sign}(z) \max(|z| - a, 0)

with the learning rate :math:`\eta` of the step. As in the authors' code, :math:`\lambda'` is
clamped at 0 from below. A structure whose factor is zero is removed; it can return while training
goes on. The threshold is :math:`\eta\gamma`: at small learning rates almost nothing more goes.

*Where the factors are.* The network has none: they are multiplied into its weights, and the W
behind them are state. The factor of a channel is on all weights that read it, which is the channel
multiplied right before its readers. The factor of a block is on the affine operation at the end of
its branch: kernel and bias, or scale and shift of a normalisation; with the clamp a ReLU or a
maximum pooling may follow, as factors from 0 pass through them. The gradient with respect to W
is :math:`\lambda` times the weight's gradient G, that with respect to :math:`\lambda` the sum of
:math:`W \odot G`. So nothing is left to fold in at the end.

*What is removed.* Without ``macs`` and ``pruning_ratio`` the structures at zero. With ``macs``
blocks at zero always go. If that is not enough, channels go by :math:`|\lambda|`, the lowest of the
whole network first; with ``channels=False`` further blocks by :math:`|\lambda|`. A block is not
weighed against channels: its factor is on a sum of many channels.

*What equals what.* A structure at zero is multiplied by exact zeros wherever it is read. Without
``macs`` and ``pruning_ratio`` the finished network is the trained one, but for float32 sums without
these zeros (blocks: exactly). Without the clamp, and for structures that ``macs`` or
``pruning_ratio`` take before they are at zero, what :math:`\lambda'` left of them is lost:
``StructuredResult.difference`` measures it.

Departures.

- With ``groups=True`` a factor is on all channels that a group of a grouped convolution makes; what
  it reads goes with it (:mod:`tfprune.layers.whole_groups`). Without, the factors are those of the
  network's channel groups, which tie the channels at the same place of all groups.
- They put the factor of a channel behind its batch normalisation. Here it stands behind the
  activation too, at the readers; for ReLU and factors from 0 that is the same.
- Without the clamp a structure goes if :math:`\lambda = S(z)` is zero, although :math:`\lambda'`
  may not be.
- A group keeps ``min_channels``.
- Weight decay reaches everything that trains, as with ``fine_tune``, but has to be given here, as
  it is for W and not for the weights that the factors are multiplied into.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from tfprune import allocation
from tfprune.allocation import Budget
from tfprune.allocation.steps import matches
from tfprune.cost import CostModel
from tfprune.criteria.scores import Scores
from tfprune.errors import ArgumentError, BudgetError
from tfprune.graph import ChannelGraph, ChannelGroup
from tfprune.graph.blocks import blocks_of
from tfprune.graph.plan import PruningPlan
from tfprune.layers.per_channel import Axis
from tfprune.layers.updates import Gradients, MethodUpdate
from tfprune.layers.whole_groups import with_whole_groups, without_whole_groups
from tfprune.methods.branch_ends import end_of
from tfprune.methods.structured import StructuredMethod


@dataclass(frozen=True)
class SparseStructureSelection(StructuredMethod):
    """Trains factors of channels and blocks to zero, and removes what they are on.

    The paper trains with Nesterov's momentum of 0.9, also W:
    ``keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)``, from scratch, and does not
    fine-tune.

    Args:
        penalty: gamma. The authors' code has 0.01 for the blocks of ResNet-50 on ImageNet.
        channels: whether channels have factors.
        blocks: whether residual blocks have.
        groups: whether grouped convolutions, as ResNeXt's, have a factor for each whole group.
        momentum: mu of the factors; the paper's is 0.9.
        weight_decay: of all that trains but the factors. ``fine_tune`` and the optimizer get none.
        clamp: whether factors stay from 0 upwards, as in the authors' code.
        macs, pruning_ratio, round_to, min_channels, ignore: see :class:`StructuredMethod`.
            ``pruning_ratio`` counts channels. Groups in ``ignore`` have no factors.

    Raises:
        ArgumentError: a value out of range, or neither channels nor blocks.
    """

    penalty: float = 0.01
    channels: bool = True
    blocks: bool = True
    groups: bool = False
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clamp: bool = True

    threshold: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not np.isfinite(self.penalty) or self.penalty <= 0:
            raise ArgumentError(f"Expected a positive penalty. Received: {self.penalty!r}.")
        if not 0 <= self.momentum < 1:
            raise ArgumentError(f"Expected a momentum in [0, 1). Received: {self.momentum!r}.")
        if not np.isfinite(self.weight_decay) or self.weight_decay < 0:
            raise ArgumentError(f"Expected a weight_decay from 0. Received: {self.weight_decay!r}.")
        if not (self.channels or self.blocks):
            raise ArgumentError("Expected channels=True or blocks=True. Received: neither.")
        if self.pruning_ratio is not None and not self.channels:
            raise ArgumentError(
                "Expected channels=True with pruning_ratio, which counts channels. Received: "
                "channels=False. Ask for macs."
            )

    def update(self) -> MethodUpdate:
        """The factors, and W behind them."""
        return StructureFactors(
            self.penalty,
            self.channels,
            self.blocks,
            self.momentum,
            self.weight_decay,
            self.clamp,
            self.ignore,
        )

    def acts_on(self, group: ChannelGroup) -> bool:
        """Whether the group's channels can have factors."""
        return self.channels and not obstacle(group)

    def prepare(self, model: Any) -> Any:
        """A copy of the model with factors of 1.

        A warning names the blocks that can have none.

        Raises:
            What :meth:`StructuredMethod.prepare` raises.
        """
        prepared = super().prepare(with_whole_groups(model) if self.groups else model)
        left = prepared.update.left_alone
        if left:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
            more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
            warnings.warn(
                f"{len(left)} blocks have no factors and stay: {reasons}{more}.", stacklevel=2
            )
        return prepared

    def carried_out(self, model: Any, plan: PruningPlan) -> Any:
        """The smaller model, its grouped convolutions plain ones again."""
        smaller = super().carried_out(model, plan)
        return without_whole_groups(smaller) if self.groups else smaller

    def check(self, graph: ChannelGraph) -> None:
        """Raises what :meth:`prepare` raises, before any training."""
        factors = graph.model.update
        if not factors.values("channels") and not factors.values("blocks"):
            kinds = [k for k in ("channels", "blocks") if getattr(self, k)]
            left = [f"{name}: {why}" for name, why in factors.left_alone.items()]
            raise ArgumentError(
                f"Expected {' or '.join(kinds)} that can have factors. Received: "
                f"{graph.model.name!r}, which has none. {'; '.join(left[:3])}"
            )
        self.decide(graph, Scores({g.name: np.ones(g.width) for g in graph.prunable}, "any"))

    def callbacks(self) -> list[Any]:
        """What refuses optimizers with weight decay, and what writes to the logs."""
        return [RequirePlainOptimizer(), *super().callbacks()]

    def fit_options(self, epochs: int, options: dict[str, Any]) -> dict[str, Any]:
        """As :meth:`StructuredMethod.fit_options`, without ``weight_decay``."""
        if options.get("weight_decay"):
            raise ArgumentError(
                "Expected no weight_decay for fine_tune: SparseStructureSelection(weight_decay=...)"
                f" has its own, which leaves factors out. Received: {options['weight_decay']!r}."
            )
        check_optimizer(options.get("optimizer", "sgd"))
        return super().fit_options(epochs, options)

    def scores(self, graph: ChannelGraph) -> Scores:
        """The absolute factor of every channel; 1 where there is none."""
        found = graph.model.update.values("channels")
        values = {
            group.name: np.abs(found[group.name]) if group.name in found else np.ones(group.width)
            for group in graph.prunable
        }
        return Scores(values, "factor")

    def decide(self, graph: ChannelGraph, scores: Scores) -> PruningPlan:
        """Blocks at zero go; channels, or further blocks, by what is asked for."""
        allocation.check_patterns(graph, self.ignore, "ignore")
        factors = graph.model.update
        blocks = {name: abs(float(v)) for name, v in factors.values("blocks").items()}
        gone = [name for name, value in blocks.items() if value == 0]
        limit = None
        if self.macs is not None:
            limit = allocation.limits_of(Budget(self.macs), CostModel(graph))["macs"]
            if not self.channels:
                gone = _lowest(graph, blocks, limit)
        costs = CostModel(graph, gone)
        found = factors.values("channels")
        left = [group.name for group in graph.prunable if group.name not in found]
        constraints = replace(self._constraints(), ignore=[*self.ignore, *left])
        chains = allocation.chains(graph, scores, constraints, costs)
        if limit is not None:
            order = allocation.global_ranking(chains)
            kept = allocation.meet(Budget(limit), chains, order, costs)
        elif self.pruning_ratio is not None:
            order = allocation.global_ranking(chains)
            kept = allocation.overall(chains, order, self.pruning_ratio)
        else:
            kept = allocation.above(chains, self.threshold)
        notes = {"method": self.describe()}
        alone = "; ".join(f"{name}: {why}" for name, why in factors.left_alone.items())
        return PruningPlan.of(
            graph, kept, {**notes, "blocks that stay": alone} if alone else notes, blocks=gone
        )


def apg_step(
    factor: Any, velocity: Any, gradient: Any, rate: Any, penalty: float, momentum: float,
    clamp: bool = True,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """One accelerated proximal step (sheet A5).

    Args:
        factor: lambda', where the gradient was taken.
        velocity: v, of the same shape.
        gradient: of the loss without the penalty.
        rate: eta.
        penalty: gamma.
        momentum: mu.
        clamp: whether lambda' stays from 0 upwards.

    Returns:
        lambda = S(z), the new velocity and the new lambda'.
    """
    moved = factor - rate * gradient
    settled = ops.sign(moved) * ops.maximum(ops.abs(moved) - rate * penalty, 0)
    velocity = settled - factor + momentum * velocity
    after = settled + momentum * velocity
    return settled, velocity, ops.maximum(after, 0) if clamp else after


@dataclass(frozen=True)
class _Factor:
    """A structure's state: lambda' and v, and lambda, shapes ``(width,)`` or ``()``."""

    kind: str
    name: str
    factor: Any
    velocity: Any
    settled: Any


@dataclass(frozen=True)
class _Scaled:
    """A weight of the model, W behind it, and the factors on it with the axes of channels."""

    variable: Any
    full: Any
    factors: tuple[tuple[_Factor, Axis | None], ...]

    def multiplier(self, without: int = -1) -> Any:
        """The product of all factors, or of all but one."""
        product: Any = 1.0
        for number, (known, axis) in enumerate(self.factors):
            if number != without:
                value = ops.cast(known.factor, self.variable.dtype)
                product = product * (value if axis is None else axis.spread(value, elsewhere=1.0))
        return product


@keras.saving.register_keras_serializable(package="tfprune")
class StructureFactors(MethodUpdate):
    """Factors on channels and blocks, multiplied into the weights, with W behind them.

    Attributes:
        left_alone: blocks without factors, with the reason.

    Args:
        penalty: gamma.
        channels, blocks: whether they have factors.
        momentum: mu.
        weight_decay: of W and of all other weights.
        clamp: whether factors stay from 0 upwards.
        ignore: patterns of groups without factors.
    """

    def __init__(
        self,
        penalty: float,
        channels: bool = True,
        blocks: bool = True,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        clamp: bool = True,
        ignore: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.penalty = penalty
        self.channels = channels
        self.blocks = blocks
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.clamp = clamp
        self.ignore = list(ignore)
        self.left_alone: dict[str, str] = {}

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {
            "penalty": self.penalty,
            "channels": self.channels,
            "blocks": self.blocks,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "clamp": self.clamp,
            "ignore": list(self.ignore),
        }

    def bind(self, graph: ChannelGraph) -> None:
        """Makes the factors, and a copy of every weight that some are multiplied into."""
        factors: list[_Factor] = []
        on: dict[int, tuple[Any, list[tuple[_Factor, Axis | None]]]] = {}

        def made(kind: str, name: str, shape: tuple[int, ...]) -> _Factor:
            number = len(factors)
            factors.append(
                _Factor(
                    kind,
                    name,
                    self.state(f"factor_{number}", np.ones(shape, np.float32)),
                    self.state(f"velocity_{number}", np.zeros(shape, np.float32)),
                    self.state(f"settled_{number}", np.ones(shape, np.float32)),
                )
            )
            return factors[-1]

        def put(variable: Any, factor: _Factor, axis: Axis | None) -> None:
            on.setdefault(id(variable), (variable, []))[1].append((factor, axis))

        for group in graph.prunable if self.channels else ():
            if obstacle(group) or any(matches(group, pattern) for pattern in self.ignore):
                continue
            factor = made("channels", group.name, (group.width,))
            for member in readers(group):
                put(member.variable, factor, Axis(member, group.width))
        left: dict[str, str] = {}
        for block in blocks_of(graph) if self.blocks else ():
            variables, why = end_of(graph, block, positive=self.clamp)
            if why:
                left[block.name] = why
                continue
            factor = made("blocks", block.name, ())
            for variable in variables:
                put(variable, factor, None)
        scaled = {
            key: _Scaled(variable, self._copy_of(number, variable), tuple(each))
            for number, (key, (variable, each)) in enumerate(on.items())
        }
        others = {id(v): v for v in graph.model.trainable_variables if id(v) not in on}
        self.hold(factors=factors, scaled=scaled, others=others)
        self.left_alone = left

    def _copy_of(self, number: int, variable: Any) -> Any:
        dtype = keras.backend.standardize_dtype(variable.dtype)
        return self.state(f"full_{number}", ops.convert_to_tensor(variable), dtype=dtype)

    def gradients(self, gradients: Gradients, learning_rate: Any) -> Gradients:
        """Those of W, with weight decay, in the place of the weights'; and those of the factors."""
        changed: Gradients = {}
        for key, scaled in self.held.scaled.items():
            if key not in gradients:
                continue
            full = ops.convert_to_tensor(scaled.full)
            gradient = ops.cast(gradients[key], full.dtype)
            changed[key] = gradient * scaled.multiplier() + self.weight_decay * full
            for number, (known, axis) in enumerate(scaled.factors):
                part = gradient * full * scaled.multiplier(without=number)
                total = ops.sum(part) if axis is None else axis.total(part)
                total = ops.cast(total, "float32")
                # For update(), which gets no others than these.
                mine = id(known.factor)
                changed[mine] = changed[mine] + total if mine in changed else total
        for key, variable in self.held.others.items():
            if key in gradients:
                changed[key] = gradients[key] + self.weight_decay * ops.cast(
                    variable, gradients[key].dtype
                )
        return {**gradients, **changed}

    def update(self, gradients: Gradients, learning_rate: Any) -> None:
        """Moves W as the optimizer moved the weights, and then the factors."""
        for scaled in self.held.scaled.values():
            before = scaled.full * scaled.multiplier()
            scaled.full.assign(scaled.full + (ops.convert_to_tensor(scaled.variable) - before))
        for known in self.held.factors:
            if id(known.factor) not in gradients:
                continue
            settled, velocity, factor = apg_step(
                ops.convert_to_tensor(known.factor),
                ops.convert_to_tensor(known.velocity),
                gradients[id(known.factor)],
                learning_rate,
                self.penalty,
                self.momentum,
                self.clamp,
            )
            known.settled.assign(settled)
            known.velocity.assign(velocity)
            known.factor.assign(factor)
        for scaled in self.held.scaled.values():
            scaled.variable.assign(scaled.full * scaled.multiplier())

    def values(self, kind: str) -> dict[str, Any]:
        """Name -> factors, which decide what goes: float64, shape ``(width,)`` or ``()``.

        Lambda' where it is clamped, else lambda.

        Args:
            kind: ``"channels"`` or ``"blocks"``.
        """
        return {
            known.name: np.asarray(known.factor if self.clamp else known.settled).astype(np.float64)
            for known in self.held.factors
            if known.kind == kind
        }

    def figures(self) -> Mapping[str, float]:
        """The penalty's value, and which fractions of channels and blocks are at zero."""
        result = {"factor_penalty": 0.0}
        for kind in ("channels", "blocks"):
            values = [np.atleast_1d(value) for value in self.values(kind).values()]
            if values:
                every = np.concatenate(values)
                result["factor_penalty"] += self.penalty * float(np.abs(every).sum())
                result[f"zero_{kind}"] = float((every == 0).mean())
        return result


def readers(group: ChannelGroup) -> list[Any]:
    """The members through which the group's channels are read."""
    return [member for member in group.members if member.masked]


def obstacle(group: ChannelGroup) -> str:
    """Why a group's channels can have no factors; empty if they can."""
    read = readers(group)
    if not read:
        return "no weight reads them"
    frozen = [member.full_name for member in read if not member.variable.trainable]
    if frozen:
        return f"{frozen[0]} reads them and does not train"
    return group.inexact_reason if not group.exact else ""


def _lowest(graph: ChannelGraph, blocks: Mapping[str, float], limit: int) -> list[str]:
    """The blocks that go for a limit of MACs: those at zero, then the lowest that it takes.

    Raises:
        BudgetError: all of them are not enough.
    """
    gone: list[str] = []
    reached = 0
    for name in sorted(blocks, key=lambda known: blocks[known]):
        costs = CostModel(graph, gone)
        reached = costs.macs(costs.full_mask())
        if blocks[name] > 0 and reached <= limit:
            return gone
        gone.append(name)
    costs = CostModel(graph, gone)
    reached = costs.macs(costs.full_mask())
    if reached > limit:
        raise BudgetError(
            f"Expected a budget within reach. Received: macs={limit:,} is below the {reached:,} "
            f"that remain without any of the {len(gone)} blocks. Ask for more, or use "
            "channels=True."
        )
    return gone


class RequirePlainOptimizer(keras.callbacks.Callback):  # type: ignore[misc]
    """Refuses optimizers that would change the weights that factors are multiplied into."""

    def on_train_begin(self, logs: Any = None) -> None:
        """Looks at the optimizer that the model was compiled with."""
        optimizer = self.model.optimizer
        while optimizer is not None:
            check_optimizer(optimizer)
            optimizer = getattr(optimizer, "inner", getattr(optimizer, "inner_optimizer", None))


def check_optimizer(optimizer: Any) -> None:
    """Raises :class:`ArgumentError` for weight decay and averaging in an optimizer."""
    for setting in ("weight_decay", "use_ema"):
        if getattr(optimizer, setting, None):
            raise ArgumentError(
                "Expected an optimizer without weight_decay and use_ema, which would not act on W "
                f"but on the weights that factors are multiplied into. Received: "
                f"{type(optimizer).__name__} with {setting}={getattr(optimizer, setting)!r}. "
                "SparseStructureSelection has a weight_decay of its own."
            )
