"""Shrink and expand: the loop around MorphNet's penalty.

Reference: as :mod:`tfprune.methods.morphnet`; sheet C4, section 4.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfprune.allocation import Budget
from tfprune.allocation.budget import limits_of
from tfprune.allocation.rounding import multiple
from tfprune.allocation.steps import check_patterns
from tfprune.arguments import check_whole
from tfprune.cost import CostModel
from tfprune.errors import ArgumentError, BudgetError
from tfprune.graph import analyse
from tfprune.methods.morphnet import CostTerms, MorphNet
from tfprune.methods.structured import penalised_groups
from tfprune.protocols import FineTuneRecord, scratch_e
from tfprune.protocols.record import ScratchRecord
from tfprune.surgery import resize


@dataclass(frozen=True)
class Expansion:
    """A network of other widths.

    Attributes:
        model: with new weights, uncompiled.
        multiplier: w.
        widths: group name -> width, of every group that may change.
        cost: of the model, by the name of the budget.
    """

    model: Any = field(repr=False)
    multiplier: float
    widths: Mapping[str, int]
    cost: Mapping[str, int]


def expand(
    model: Any,
    widths: Mapping[str, int] | None = None,
    *,
    macs: int | None = None,
    params: int | None = None,
    round_to: int | str = 1,
    ignore: Sequence[str] = (),
    seed: int = 0,
) -> Expansion:
    """Multiplies all widths by the largest factor that meets the budget, with new weights.

    Args:
        model: a functional or sequential model. It stays as it is.
        widths: group name -> O', the width to multiply, for groups that have another one in
            ``model``. A group that has shrunk to one channel can grow again only from here, in the
            network where it was wider: a group of one channel counts as one that cannot change.
        macs, params: the budget, numbers (not fractions): usually the cost of the seed network.
            With both, both are met.
        round_to: widths are rounded to the nearest multiple of this, at least one; those of groups
            that are narrower than one multiple, to whole numbers.
        ignore: names or patterns of groups that keep their widths.
        seed: of the new weights.

    Raises:
        ArgumentError: no budget, an unknown group, or a value out of range.
        BudgetError: ``widths`` cost more than the budget, or nothing can grow.
        ModelError: a layer that cannot be made wider, see :func:`tfprune.surgery.resize`.
    """
    budgets = {k: v for k, v in (("macs", macs), ("params", params)) if v is not None}
    if not budgets:
        raise ArgumentError("Expected a budget, macs= or params=. Received: none.")
    for name, value in budgets.items():
        check_whole(name, value, 1)
    step = multiple(round_to)
    graph = analyse(model)
    check_patterns(graph, ignore, "ignore")
    groups = penalised_groups(graph, ignore)
    base = {group.name: group.width for group in groups}
    for name, width in (widths or {}).items():
        check_whole(f"widths[{name!r}]", width, 1)
        if name not in base:
            raise ArgumentError(
                f"Expected widths of groups that may change. Received: {name!r}, which the model "
                "has not, or which is ignored or cannot be pruned."
            )
        base[name] = width
    terms = {name: CostTerms(CostModel(graph), groups, name) for name in budgets}

    def cost(chosen: Mapping[str, int]) -> dict[str, int]:
        # As resize does it: channels of a group that grows come several times.
        times = [
            np.bincount(np.arange(chosen[g.name]) % g.width, minlength=g.width) for g in groups
        ]
        return {name: round(part.cost(np.concatenate(times))) for name, part in terms.items()}

    def at(factor: float) -> dict[str, int]:
        return {g.name: scaled(base[g.name], factor, step, g.inner) for g in groups}

    def fits(factor: float) -> bool:
        return all(cost(at(factor))[name] <= limit for name, limit in budgets.items())

    if not groups:
        raise BudgetError(
            f"Expected groups that can grow. Received: {graph.model.name!r}, which has none that "
            "is not ignored."
        )
    if any(cost(base)[name] > limit for name, limit in budgets.items()):
        raise BudgetError(
            f"Expected a budget that leaves room to grow. Received: {budgets} for widths that "
            f"cost {cost(base)}."
        )
    factor = largest_factor(fits)
    wanted = at(factor)
    return Expansion(resize(model, wanted, seed=seed), factor, wanted, cost(wanted))


def scaled(width: int, factor: float, step: int, inner: int = 1) -> int:
    """A width times a factor, rounded to the nearest multiple; halves up.

    Args:
        width: see there. One below a multiple is rounded to a whole number.
        factor: w.
        step: the multiple, of positions of the tensor that the channels make.
        inner: positions of one channel.
    """
    coarse = step // math.gcd(step, inner)
    unit = coarse if width >= coarse else 1
    return max(unit, unit * math.floor(width * factor / unit + 0.5))


def largest_factor(fits: Any) -> float:
    """The largest factor that fits, to a relative 1e-12; more never fits where less does not.

    Args:
        fits: function of the factor.

    Raises:
        BudgetError: not even a tiny one fits, or any one does.
    """
    low, high = 1.0, 1.0
    for _ in range(60):
        if fits(low):
            break
        low, high = low / 2, low
    else:
        raise BudgetError("Expected a budget within reach. Received: one below every width.")
    for _ in range(60):
        if not fits(high):
            break
        low, high = high, 2 * high
    else:
        raise BudgetError(
            "Expected a budget that limits the widths. Received: one that does not depend on them."
        )
    while high - low > 1e-12 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Morph:
    """One round of :func:`shrink_expand`.

    Attributes:
        shrunk: group name -> width that was alive after training (what the method kept).
        multiplier: w of the expansion.
        widths: group name -> width after it.
        cost: after it, by the name of the budget.
        record: how the training went.
    """

    shrunk: Mapping[str, int]
    multiplier: float
    widths: Mapping[str, int]
    cost: Mapping[str, int]
    record: FineTuneRecord = field(repr=False)


@dataclass(frozen=True)
class ShrinkExpandResult:
    """What :func:`shrink_expand` returns.

    Attributes:
        model: of the last widths; trained from scratch, or with new weights.
        rounds: what happened in each round.
        scratch: how the final training went; ``None`` without one.
    """

    model: Any = field(repr=False)
    rounds: tuple[Morph, ...]
    scratch: ScratchRecord | None = field(repr=False)

    @property
    def widths(self) -> Mapping[str, int]:
        """Group name -> width of the model."""
        return self.rounds[-1].widths


def shrink_expand(
    model: Any,
    train: Any,
    validation: Any = None,
    *,
    method: MorphNet,
    rounds: int = 1,
    epochs: int,
    macs: float | int | None = None,
    params: float | int | None = None,
    round_to: int | str = 1,
    scratch: Mapping[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> ShrinkExpandResult:
    """Trains and shrinks, expands to the budget, and again; then trains from scratch if asked to.

    Args:
        model: the seed network. It stays as it is; its weights are where the first round starts.
        train, validation: as for :func:`tfprune.fine_tune`.
        method: what shrinks.
        rounds: how often.
        epochs: of each round's training.
        macs, params: the budget: numbers, or fractions of the seed network's. Without one it is
            the seed network's cost in the method's resource.
        round_to: of the expanded widths, see :func:`expand`.
        scratch: options of :func:`tfprune.protocols.scratch_e` (``{"epochs": 160}``) for the final
            training with the standard recipe; ``None``: the network is returned with new weights.
        seed: of new weights, plus the number of the round.
        **options: of ``fine_tune``, for the rounds.

    Raises:
        What :meth:`MorphNet.run`, :func:`expand` and ``scratch_e`` raise.
    """
    check_whole("rounds", rounds, 1)
    budget = Budget(macs, params)
    if not budget:
        budget = Budget(**{method.resource: 1.0})
    limits = limits_of(budget, CostModel(analyse(model)))
    done: list[Morph] = []
    for number in range(rounds):
        run = method.run(model, train, validation, epochs=epochs, seed=seed + number, **options)
        groups = penalised_groups(analyse(model), method.ignore)
        shrunk = {g.name: len(run.plan.kept.get(g.name, range(g.width))) for g in groups}
        wider = expand(
            model,
            shrunk,
            macs=limits.get("macs"),
            params=limits.get("params"),
            round_to=round_to,
            ignore=method.ignore,
            seed=seed + number,
        )
        model = wider.model
        done.append(Morph(shrunk, wider.multiplier, wider.widths, wider.cost, run.record))
    if scratch is None:
        return ShrinkExpandResult(model, tuple(done), None)
    final = scratch_e(model, train, validation, **{"seed": seed + rounds, **scratch})
    return ShrinkExpandResult(final.model, tuple(done), final)
