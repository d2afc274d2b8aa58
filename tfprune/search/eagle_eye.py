"""EagleEye: many random width vectors, each judged with batch normalisation estimated anew.

Reference: Bailin Li, Bowen Wu, Jiang Su, Guangrun Wang and Liang Lin, "EagleEye: Fast Sub-net
Evaluation for Efficient Neural Network Pruning", ECCV 2020 (arXiv:2007.02491). The procedure as
verified in the authors' code: a ratio per layer, uniform in [min, max] ([0, 0.4] to remove 25 % of
the FLOPs, [0, 0.7] for 50 %, [0, 0.8] for 75 %); kept if |FLOPs ratio - target| <= 0.005; the
filters of smallest L1 norm go; about 100 training batches refresh the statistics of batch
normalisation; the score is the accuracy on validation data; the best candidate is fine-tuned.

Departures: channel groups in the place of layers; masks in the place of rebuilt networks, which
compute the same; statistics pooled over the batches (:func:`tfprune.recalibrate_batch_norm`) in the
place of a moving average from the dense network's; widths rounded to multiples
(``round_to=1`` for the paper's own); equal candidates are measured once; and by default the budget
is never exceeded, where the paper accepts both sides of it (``never_exceed=False``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.allocation import Budget, Chain, Constraints, kept_by_steps, kept_count, limits_of
from tfprune.allocation.budget import cost_functions
from tfprune.cost import CostModel
from tfprune.errors import ArgumentError, BudgetError
from tfprune.graph import ChannelGraph, analyse
from tfprune.graph.plan import PruningPlan
from tfprune.search.measuring import Judge, Measurement, Metric, resolve_metric
from tfprune.search.ranking import ranked_chains
from tfprune.search.record import Results, weights_digest
from tfprune.search.watching import progress_bar
from tfprune.surgery import check_finite
from tfprune.workers import Examples, PortableModel, check_executor, digest_of, gather, run_tasks


@dataclass(frozen=True)
class Candidate:
    """One accepted width vector.

    Attributes:
        widths: group name -> channels kept.
        cost: MACs, parameters or bytes, whichever the budget is of.
        fraction: of the dense model's cost.
        score: the metric on validation data.
    """

    widths: Mapping[str, int]
    cost: int
    fraction: float
    score: float


@dataclass(frozen=True)
class EagleEyeResult:
    """The result of :func:`eagle_eye`. Printing it gives a table of the best candidates.

    Attributes:
        plan: of the best candidate.
        candidates: all that were measured, in the order in which they were drawn.
        best: the index of the best among them, the first of equals.
        draws: how many width vectors were drawn for them.
        asked: how many candidates were asked for.
        budget: what the cost is of: ``"macs"``, ``"params"`` or ``"size_bytes"``.
        metric: the metric's name.
        larger_is_better: whether a larger score is better.
    """

    plan: PruningPlan
    candidates: tuple[Candidate, ...]
    best: int
    draws: int
    asked: int
    budget: str
    metric: str
    larger_is_better: bool

    def __str__(self) -> str:
        from tfprune.reports.text import count, percent, table

        sign = -1 if self.larger_is_better else 1
        ranking = sorted(
            range(len(self.candidates)), key=lambda i: (sign * self.candidates[i].score, i)
        )
        rows = [
            (i, f"{c.score:.4f}", count(c.cost), percent(c.fraction, 2))
            for i in ranking[:10]
            for c in [self.candidates[i]]
        ]
        head = (
            f"EagleEye: candidate {self.best} is the best of {len(self.candidates)} "
            f"({self.asked} asked for, {self.draws:,} draws)"
        )
        columns = ("candidate", self.metric, self.budget, "of dense")
        return f"{head}\n\n{table(columns, rows, right=columns)}"


def eagle_eye(
    model: Any,
    train: Any,
    validation: Any,
    *,
    macs: float | int | None = None,
    params: float | int | None = None,
    size_bytes: float | int | None = None,
    candidates: int = 100,
    min_ratio: float = 0.0,
    max_ratio: float = 0.7,
    tolerance: float = 0.005,
    never_exceed: bool = True,
    criterion: Any = "l1",
    data: Any = None,
    recalibration_batches: int = 100,
    metric: Metric | None = None,
    round_to: int | str = 8,
    min_channels: int = 1,
    ignore: Sequence[str] = (),
    draws: int = 20_000,
    batch_size: int = 128,
    seed: int = 0,
    input_shape: Any = None,
    path: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    progress: bool = True,
) -> EagleEyeResult:
    """The best of many random pruned networks of one cost.

    Args:
        model: of Keras 3 or tf_keras, or its analysed graph. It stays as it is.
        train: training data, on which batch normalisation is estimated anew for each candidate;
            labels are not needed. The first batches are read into memory.
        validation: **validation data, never the test set**, with labels: arrays or a finite
            ``tf.data.Dataset`` of batches; read into memory.
        macs, params, size_bytes: the budget, exactly one of them: a float is a fraction of the
            dense model's cost, an int a number.
        candidates: how many to measure (100 is our choice).
        min_ratio, max_ratio: the range of each group's random pruning ratio.
        tolerance: how far a candidate's cost may be from the budget, as a fraction of the dense
            model's cost.
        never_exceed: accept only candidates within the budget, from ``target - tolerance`` to
            ``target``; ``False`` accepts those up to ``target + tolerance``, as the paper does.
        criterion: what ranks the channels; a name or an object (of a selector, its scores).
        data: training data for the criteria that need some.
        recalibration_batches: batches of ``train`` for batch normalisation.
        metric: what to measure; the accuracy of a classifier if ``None``.
        round_to, min_channels, ignore, input_shape: as in :func:`tfprune.plan`.
        draws: give up drawing after so many.
        batch_size: of the batches cut from arrays.
        seed: of the drawing. The result depends on it, and not on the executor.
        path: a JSON file that holds every score as soon as it is measured; if it is there
            already, the search goes on from it.
        executor: where to measure: see :mod:`tfprune.workers`; ``None`` for this process.
        progress: whether to show a progress bar on standard error.

    Returns:
        The plan of the best candidate, and all candidates. There are fewer than asked for if so
        many different ones did not come up in ``draws``.

    Raises:
        ModelError: the model is subclassed or unbuilt, or has weights that are not finite.
        ArgumentError: a value out of range, not exactly one budget, an unknown criterion, no metric
            for the model, a file of another search, a model that cannot be sent away.
        BudgetError: no draw is accepted; the message names the range that the draws have.
        DataError: the data are empty, lack labels, or do not fit the model.
    """
    check_executor(executor)
    budget = Budget(macs, params, size_bytes)
    _check(budget, min_ratio, max_ratio, tolerance, candidates, draws, seed)
    graph = model if isinstance(model, ChannelGraph) else analyse(model, input_shape=input_shape)
    check_finite(graph.model)
    shape = getattr(graph.model, "input_shape", None)
    examples = gather(validation, labels=True, batch_size=batch_size, input_shape=shape)
    resolved = resolve_metric(graph.model, metric, examples.y)
    first = gather(train, batches=recalibration_batches, batch_size=batch_size, input_shape=shape)
    calibration = Examples(first.x, None, first.batch_size)
    constraints = Constraints(round_to, min_channels, ignore=ignore)
    chain_list, words = ranked_chains(graph, criterion, data, constraints)

    drawing = _Drawing(CostModel(graph), chain_list, budget, tolerance, never_exceed)
    accepted, drawn = drawing.accepted(min_ratio, max_ratio, candidates, draws, seed)
    settings = {
        "model": graph.structure.fingerprint,
        "weights": weights_digest(graph),
        "criterion": words,
        "ranking": digest_of([chain.order for chain in chain_list]),
        "metric": resolved.name,
        "larger is better": resolved.larger_is_better,
        "validation": examples.digest,
        "training data": calibration.digest,
        "groups": [chain.group.name for chain in chain_list],
        "candidates": accepted,
    }
    keys = [str(number) for number in range(len(accepted))]
    results = Results("EagleEye", settings, keys, path)
    missing = results.missing
    shared = Measurement(PortableModel(graph.model), examples, resolved, calibration)
    tasks = [drawing.kept(accepted[int(key)]) for key in missing]
    with progress_bar(progress, "EagleEye", len(keys), len(keys) - len(missing)) as advance:
        if missing:
            run = run_tasks(executor, _score, shared, tasks)
            with closing(run):
                for number, value in run:
                    results.add(missing[number], value)
                    advance()
    scores = [results.values[key] for key in keys]
    best = scores.index(max(scores) if resolved.larger_is_better else min(scores))
    ((name, asked),) = budget.given().items()
    notes = {
        "criterion": words,
        "asked": f"{name}={asked}",
        "order": f"EagleEye, best of {len(scores)}, seed {seed}",
        resolved.name: f"{scores[best]:.4f} before fine-tuning",
        "round_to": str(round_to),
    }
    return EagleEyeResult(
        plan=PruningPlan.of(graph, drawing.kept(accepted[best]), notes),
        candidates=tuple(
            drawing.candidate(widths, score) for widths, score in zip(accepted, scores, strict=True)
        ),
        best=best,
        draws=drawn,
        asked=candidates,
        budget=name,
        metric=resolved.name,
        larger_is_better=resolved.larger_is_better,
    )


def _score(judge: Judge, kept: Mapping[str, tuple[int, ...]]) -> float:
    return judge.masked(kept)


class _Drawing:
    """Random widths whose cost is near a budget.

    Args:
        costs: of the model.
        chain_list: the groups and their widths.
        budget: of one cost.
        tolerance, never_exceed: as in :func:`eagle_eye`.
    """

    def __init__(
        self,
        costs: CostModel,
        chain_list: Sequence[Chain],
        budget: Budget,
        tolerance: float,
        never_exceed: bool,
    ) -> None:
        ((self._name, self._limit),) = limits_of(budget, costs).items()
        self._function = cost_functions(costs)[self._name]
        self._dense = self._function(costs.full_mask())
        self._graph = costs.graph
        self._chains = chain_list
        # Rising, for the binary search.
        self._negative = [-np.array(chain.widths) for chain in chain_list]
        self._lowest = self._limit - tolerance * self._dense
        self._highest = self._limit + (0 if never_exceed else tolerance * self._dense)

    def accepted(
        self, min_ratio: float, max_ratio: float, candidates: int, draws: int, seed: int
    ) -> tuple[list[list[int]], int]:
        """Different width vectors in the order of drawing, and how many draws they took.

        Raises:
            BudgetError: there are none.
        """
        most = self._cost(self._widths([min_ratio] * len(self._chains)))
        least = self._cost(self._widths([max_ratio] * len(self._chains)))
        if not self._chains or least > self._highest or most < self._lowest:
            raise self._out_of_reach(f"ratios from {min_ratio} to {max_ratio}", least, most)
        generator = np.random.default_rng(seed)
        found: dict[tuple[int, ...], None] = {}
        seen = [math.inf, -math.inf]
        number = 0
        while number < draws and len(found) < candidates:
            number += 1
            widths = self._widths(
                generator.uniform(min_ratio, max_ratio, len(self._chains)).tolist()
            )
            cost = self._cost(widths)
            seen = [min(seen[0], cost), max(seen[1], cost)]
            if self._lowest <= cost <= self._highest:
                found.setdefault(tuple(widths))
        if not found:
            raise self._out_of_reach(f"{draws:,} draws", int(seen[0]), int(seen[1]))
        return [list(widths) for widths in found], number

    def kept(self, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Kept indices by group name."""
        return {
            chain.group.name: tuple(int(i) for i in chain.kept(width))
            for chain, width in zip(self._chains, widths, strict=True)
        }

    def candidate(self, widths: Sequence[int], score: float) -> Candidate:
        """The record of a width vector."""
        cost = self._cost(widths)
        names = [chain.group.name for chain in self._chains]
        return Candidate(dict(zip(names, widths, strict=True)), cost, cost / self._dense, score)

    def _widths(self, ratios: Sequence[float]) -> list[int]:
        """The smallest allowed widths that remove no more than the ratios say."""
        result = []
        for chain, negative, ratio in zip(self._chains, self._negative, ratios, strict=True):
            wanted = kept_count(chain.group.width, ratio)
            step = int(np.searchsorted(negative, -wanted, side="right")) - 1
            result.append(chain.widths[step])
        return result

    def _cost(self, widths: Sequence[int]) -> int:
        taken = {
            i: c.widths.index(w) for i, (c, w) in enumerate(zip(self._chains, widths, strict=True))
        }
        return self._function(self._graph.keep_mask(kept_by_steps(self._chains, taken)))

    def _out_of_reach(self, what: str, least: int, most: int) -> BudgetError:
        return BudgetError(
            f"Expected a budget near which random widths come. Received: {self._name}="
            f"{self._limit:,} ({self._limit / self._dense:.3f} of dense, accepted from "
            f"{self._lowest / self._dense:.3f} to {self._highest / self._dense:.3f}), and {what} "
            f"give {least:,} to {most:,} ({least / self._dense:.3f} to {most / self._dense:.3f}). "
            "Change max_ratio or min_ratio so that the budget lies in the middle, widen tolerance, "
            "use a smaller round_to, or raise draws."
        )


def _check(
    budget: Budget,
    min_ratio: float,
    max_ratio: float,
    tolerance: float,
    candidates: int,
    draws: int,
    seed: int,
) -> None:
    if len(budget.given()) != 1:
        raise ArgumentError(
            "Expected exactly one of macs, params and size_bytes. Received: "
            f"{', '.join(budget.given()) or 'none'}."
        )
    if not 0 <= min_ratio <= max_ratio < 1:
        raise ArgumentError(
            "Expected 0 <= min_ratio <= max_ratio < 1. Received: "
            f"min_ratio={min_ratio!r}, max_ratio={max_ratio!r}."
        )
    if not 0 <= tolerance < 1:
        raise ArgumentError(f"Expected a tolerance from 0 below 1. Received: {tolerance!r}.")
    for name, value, least in (
        ("candidates", candidates, 1),
        ("draws", draws, 1),
        ("seed", seed, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"Expected {name} of at least {least}. Received: {value!r}.")
