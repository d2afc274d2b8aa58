"""Pruning a little, fine-tuning, and again: iterative pruning."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfprune import criteria
from tfprune.allocation.budget import Budget, cost_functions, limits_of
from tfprune.cost import CostModel, measure
from tfprune.errors import ArgumentError, FileError
from tfprune.graph import analyse
from tfprune.graph.plan import PruningPlan
from tfprune.loading import load_model
from tfprune.protocols.fine_tuning import fine_tune
from tfprune.protocols.framework import framework
from tfprune.protocols.record import FineTuneRecord
from tfprune.pruning import plan as make_plan
from tfprune.saving import save_model
from tfprune.writing import replacing


@dataclass(frozen=True)
class Round:
    """One round of pruning and tuning.

    Attributes:
        plan: what went, in the names and widths of the model of the round before.
        parameters: values in all weights after the round.
        macs: multiply-accumulates of one example after the round, ``None`` if a size is free.
        record: of the fine-tuning.
    """

    plan: PruningPlan
    parameters: int
    macs: int | None
    record: FineTuneRecord


@dataclass(frozen=True)
class IterativeRecord:
    """The result of :func:`prune_iteratively`.

    Attributes:
        model: pruned and tuned; the source stays as it is.
        rounds: in their order.
    """

    model: Any
    rounds: tuple[Round, ...]


def prune_iteratively(
    model: Any,
    train: Any,
    validation: Any = None,
    *,
    macs: float | int | None = None,
    params: float | int | None = None,
    size_bytes: float | int | None = None,
    criterion: Any = "l1",
    data: Any = None,
    rounds: int | str = 5,
    epochs: int = 1,
    final_epochs: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    order: Any = "uniform",
    round_to: int | str = 8,
    min_channels: int = 1,
    ignore: Sequence[str] = (),
    input_shape: Any = None,
    seed: int = 0,
    **tuning: Any,
) -> IterativeRecord:
    """Prunes towards a budget in rounds, each followed by fine-tuning.

    With a number of ``rounds`` the budget falls by the same factor in every one:
    ``dense * target ** (k / rounds)`` after round k, and the criterion looks at the tuned network
    again, as Molchanov et al. (CVPR 2019) and DepGraph do with many small rounds. With
    ``rounds="groups"`` one group after another goes straight to its final width, in the order of
    the model, with fine-tuning in between: the procedure of ThiNet (ICCV 2017) and HRank (CVPR
    2020), layer by layer. How wide each group ends is then decided once, on the dense network.

    *Interruptions.* With ``folder`` every finished round is on disk (its model and plan), and the
    round in progress as :func:`tfprune.fine_tune` leaves it; the same call goes on from there.

    Args:
        model: a functional or sequential model of Keras 3 or tf_keras. It stays as it is.
        train, validation: as for :func:`tfprune.fine_tune`.
        macs, params, size_bytes: budgets, as for :func:`tfprune.plan`.
        criterion, data: as there; a criterion is asked anew in every round.
        rounds: a number from 1, or ``"groups"``.
        epochs: of fine-tuning after every round.
        final_epochs: of fine-tuning after the last one; ``None`` for as many as after the others.
        folder: an existing folder for the rounds; ``None`` keeps them in memory only.
        order, round_to, min_channels, ignore, input_shape: as for
            :func:`tfprune.plan`.
        seed: of the first round's fine-tuning; every further round adds one.
        **tuning: all other options of :func:`tfprune.fine_tune`, but ``checkpoint``.

    Returns:
        The pruned model, and one :class:`Round` for each round in which something went.

    Raises:
        ArgumentError: no budget, no rounds, no epochs, a folder that does not exist or holds the
            rounds of another call, or what ``plan`` and ``fine_tune`` refuse.
        BudgetError: out of reach; raised before any training.
        DataError, ModelError: as ``plan`` and ``fine_tune``.
    """
    framework(model)
    budget = Budget(macs, params, size_bytes)
    _check(budget, rounds, epochs, final_epochs, tuning)
    chosen = criteria.get(criterion, data)
    options: dict[str, Any] = {
        "criterion": chosen,
        "order": order,
        "round_to": round_to,
        "min_channels": min_channels,
        "ignore": ignore,
        "input_shape": input_shape,
    }
    # Out of reach in the end is out of reach: known before anything is trained.
    goal = make_plan(model, **{**options, **budget.given()})
    requests = (
        _by_groups(goal, options)
        if rounds == "groups"
        else _by_budget(model, budget, int(rounds), goal, options)
    )
    settings = {
        "structure": goal.structure.fingerprint,
        "weights": _digest(model),
        "budget": budget.given(),
        "rounds": rounds,
        "goal": {name: len(kept) for name, kept in goal.kept.items()},
        "epochs": [epochs, final_epochs],
        "seed": seed,
    }
    files = None if folder is None else _Files(Path(folder), settings)

    current, done = model, []
    for number, request in enumerate(requests):
        last = number == len(requests) - 1
        wanted = final_epochs if last and final_epochs is not None else epochs
        stored = None if files is None else files.read(number)
        if stored is None:
            plan = make_plan(current, **request)
            pruned = plan.apply(current)
        else:
            pruned, plan = stored
        record = fine_tune(
            pruned, train, validation, epochs=wanted, seed=seed + number,
            checkpoint=None if files is None else files.state(number), **tuning,
        )  # fmt: skip
        if files is not None and stored is None:
            files.write(number, pruned, plan)
        current = pruned
        done.append(_round(current, plan, record, input_shape))
    return IterativeRecord(current, tuple(done))


def _by_budget(
    model: Any, budget: Budget, rounds: int, goal: PruningPlan, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Budgets that fall geometrically, the last one being the goal's."""
    costs = CostModel(analyse(model, input_shape=options["input_shape"]))
    limits = limits_of(budget, costs)
    dense = {name: cost_functions(costs)[name](costs.full_mask()) for name in limits}
    result = []
    for number in range(1, rounds + 1):
        step = {
            name: limit if number == rounds
            else int(dense[name] * (limit / dense[name]) ** (number / rounds))
            for name, limit in limits.items()
            if limit < dense[name]
        }  # fmt: skip
        # The last round has the exact goal, and limits that bind nothing stay out of the others.
        result.append({**options, **(limits if number == rounds else step)})
    return result if goal.kept else []


def _by_groups(goal: PruningPlan, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One group at a time, to its width in the goal, which rounding has been through already."""
    rest = {key: value for key, value in options.items() if key in ("criterion", "input_shape")}
    return [
        {"pruning_ratio": {name: 1 - len(kept) / goal.widths[name]}, "round_to": 1, **rest}
        for name, kept in goal.kept.items()
    ]


def _round(model: Any, plan: PruningPlan, record: FineTuneRecord, input_shape: Any) -> Round:
    cost = measure(model, input_shape=input_shape)
    return Round(plan, cost.parameters, cost.macs, record)


class _Files:
    """The rounds on disk: ``round-0.keras``, ``round-0.json``, ``round-0.state``."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        if not folder.is_dir():
            raise ArgumentError(f"Expected an existing folder. Received: {str(folder)!r}.")
        path = folder / "rounds.json"
        text = json.dumps(settings, indent=2, sort_keys=True)
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(text)
        elif path.read_text() != text:
            raise ArgumentError(
                f"Expected an empty folder, or one with the rounds of the same call. Received: "
                f"{str(folder)!r}, whose rounds.json says otherwise. Use another folder."
            )

    def state(self, number: int) -> Path:
        return self._folder / f"round-{number}.state"

    def read(self, number: int) -> tuple[Any, PruningPlan] | None:
        """The pruned model of a finished round, and its plan; ``None`` if there is none."""
        model, plan = (self._folder / f"round-{number}.{end}" for end in ("keras", "json"))
        if not model.exists() or not plan.exists():
            return None
        return load_model(model), PruningPlan.load(plan)

    def write(self, number: int, model: Any, plan: PruningPlan) -> None:
        try:
            plan.save(self._folder / f"round-{number}.json")
            save_model(model, self._folder / f"round-{number}.keras")
        except OSError as error:
            raise FileError(
                f"Cannot write round {number} to {str(self._folder)!r}: {error}."
            ) from error


def _digest(model: Any) -> str:
    """SHA-256 of the weights, in hex, 16 digits."""
    digest = hashlib.sha256()
    for weight in model.weights:
        digest.update(np.ascontiguousarray(np.asarray(weight)).tobytes())
    return digest.hexdigest()[:16]


def _check(
    budget: Budget, rounds: Any, epochs: int, final_epochs: int | None, tuning: Mapping[str, Any]
) -> None:
    if not budget:
        raise ArgumentError("Expected a budget: macs=, params= or size_bytes=. Received: none.")
    whole = isinstance(rounds, int) and not isinstance(rounds, bool) and rounds >= 1
    if not whole and rounds != "groups":
        raise ArgumentError(
            f"Expected rounds to be a number from 1, or 'groups'. Received: {rounds!r}."
        )
    for name, value in (("epochs", epochs), ("final_epochs", final_epochs)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ArgumentError(f"Expected {name} of at least 1. Received: {value!r}.")
    if "checkpoint" in tuning:
        raise ArgumentError("Expected folder= instead of checkpoint=: each round has its own file.")
