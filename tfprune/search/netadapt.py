"""NetAdapt: a network adapted to a budget in small steps, each the best of one proposal per group.

Reference: Yang, Howard, Chen, Zhang, Go, Sandler, Sze and Adam, "NetAdapt: Platform-Aware Neural
Network Adaptation for Mobile Applications", ECCV 2018 (arXiv:1804.03230). The procedure as verified
in a re-implementation by the authors' group: step i has to bring the resource down to

    target_i = current - r0 * decay ** (i - 1),     r0 = 2.5 % of the original, decay = 0.96;

for every layer the largest width that meets target_i is proposed, with the filters of largest L2
norm; each proposal is fine-tuned briefly (learning rate 1e-3, 500 iterations there) and measured on
held-out data; the one with the smallest ``(drop + 1e-6) / (saved + 1e-5)`` is taken. The paper
itself takes the highest accuracy among the proposals (recalled): ``rule="accuracy"``. A long
fine-tuning ends the procedure, which is left to :func:`tfprune.fine_tune`.

The resource is anything that can be computed from widths: MACs, parameters, bytes, or milliseconds
from a table (:func:`tfprune.litert.latency_table`).

Departures: channel groups in the place of layers; the resource is the share of the dense model's
in the rule, so that it does not depend on the unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tfprune import criteria
from tfprune.allocation import Chain, Constraints, chains
from tfprune.allocation.budget import cost_functions
from tfprune.cost import CostModel
from tfprune.cost.model import Mask
from tfprune.errors import ArgumentError, BudgetError
from tfprune.graph import ChannelGraph, analyse
from tfprune.graph.copying import copy_model
from tfprune.graph.plan import PruningPlan
from tfprune.protocols import fine_tune
from tfprune.search.measuring import Judge, Measurement, Metric, resolve_metric
from tfprune.search.retraining import Retraining
from tfprune.search.watching import progress_bar
from tfprune.surgery import apply, check_finite
from tfprune.workers import Examples, PortableModel, check_executor, gather, run_tasks

Array = NDArray[Any]
Cost = Callable[[ChannelGraph], Callable[[Mask], float]]
"""From a graph to what a mask over its channels costs."""

_NAMES = ("macs", "params", "size_bytes")


@dataclass(frozen=True)
class Proposal:
    """One group's proposal in one step.

    Attributes:
        group: its name.
        width: channels that it would keep.
        cost: of the network then.
        score: the metric after brief training.
    """

    group: str
    width: int
    cost: float
    score: float


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        target: the cost that proposals had to meet.
        proposals: one per group that could meet it.
        taken: the number of the proposal that was taken.
    """

    target: float
    proposals: tuple[Proposal, ...]
    taken: int

    @property
    def best(self) -> Proposal:
        """The proposal that was taken."""
        return self.proposals[self.taken]


@dataclass(frozen=True)
class NetAdaptResult:
    """The result of :func:`netadapt`.

    Attributes:
        model: the adapted network, after the brief trainings only; fine-tune it.
        dense: the metric of the dense network.
        dense_cost: its cost.
        budget: the cost that was asked for.
        steps: in order.
        metric: what was measured.
    """

    model: Any
    dense: float
    dense_cost: float
    budget: float
    steps: tuple[Step, ...]
    metric: str

    def __str__(self) -> str:
        from tfprune.reports.text import table

        rows = [
            (str(number), f"{step.best.cost / self.dense_cost:.3f}", step.best.group,
             str(step.best.width), f"{step.best.score:.4f}", str(len(step.proposals)))
            for number, step in enumerate(self.steps, start=1)
        ]  # fmt: skip
        head = ("step", "cost", "group", "width", self.metric, "proposals")
        return f"NetAdapt from {self.metric} {self.dense:.4f}\n{table(head, rows, right=head[:2])}"


def netadapt(
    model: Any,
    train: Any,
    validation: Any,
    *,
    budget: float = 0.5,
    cost: str | Cost = "macs",
    criterion: Any = "l2",
    data: Any = None,
    first_step: float = 0.025,
    decay: float = 0.96,
    retraining: Retraining | None = None,
    rule: Literal["ratio", "accuracy"] = "ratio",
    metric: Metric | None = None,
    round_to: int | str = 8,
    min_channels: int = 1,
    max_pruning_ratio: float = 1.0,
    ignore: Sequence[str] = (),
    batch_size: int = 128,
    input_shape: Any = None,
    executor: Executor | None = None,
    progress: bool = True,
) -> NetAdaptResult:
    """Shrinks a network step by step until it costs no more than a budget.

    Args:
        model: a functional or sequential model of Keras 3 or tf_keras; it stays as it is.
        train: labelled training data for the brief trainings; read into arrays once.
        validation: labelled data held out of the training, never the test set: they choose.
        budget: a fraction of the dense network's cost, above 0 and below 1.
        cost: ``"macs"``, ``"params"``, ``"size_bytes"``, or a function from a graph to a function
            from a mask over its channels to a number, such as ``latency_table(model).cost``. It
            must not rise when channels go; a measured table may, and such a proposal is passed by.
        criterion: which channels a proposal keeps: a name or an object that scores.
        data: for a criterion that needs some.
        first_step: what the first step has to save, as a fraction of the dense network's cost.
        decay: what every further step has to save, as a fraction of what the one before had to.
        retraining: the brief training of every proposal.
        rule: ``"ratio"``: the smallest loss of quality per cost saved (the code); ``"accuracy"``:
            the best metric (the paper).
        metric: what is measured; by default the accuracy.
        round_to, min_channels, max_pruning_ratio, ignore: as for :func:`tfprune.plan`. The ratio
            is of the dense network's widths.
        batch_size: of validation data, and of training data given as arrays.
        input_shape: shape of one example, for a model that leaves sizes free.
        executor: where proposals are trained and measured; ``None`` for here. The result is the
            same; see :mod:`tfprune.workers`.
        progress: shows a bar for every step on standard error.

    Returns:
        The adapted network and what happened on the way.

    Raises:
        ArgumentError: an argument out of range, an unknown criterion, no executor.
        BudgetError: no group alone can save enough for the next step.
        DataError: no examples, or no labels.
        ModelError: subclassed or unbuilt, or weights that are not finite.
    """
    _check(budget, cost, first_step, decay, rule)
    check_executor(executor)
    constraints = Constraints(round_to, min_channels, max_pruning_ratio, ignore)
    graph = analyse(model, input_shape=input_shape)
    check_finite(graph.model)
    chosen = criteria.get(criterion, data)
    shape = getattr(model, "input_shape", None)
    examples = gather(validation, batch_size=batch_size, labels=True, input_shape=shape)
    training = gather(train, batch_size=batch_size, labels=True, input_shape=shape)
    resolved = resolve_metric(model, metric, examples.y)
    brief = retraining or Retraining()

    original = {group.name: group.width for group in graph.prunable}
    dense_cost = _cost_of(cost, graph)(CostModel(graph).full_mask())
    wanted = budget * dense_cost
    current = copy_model(model)
    dense = Judge(Measurement(PortableModel(current), examples, resolved)).masked({})
    spent, score, saving = dense_cost, dense, first_step * dense_cost
    steps: list[Step] = []
    while spent > wanted:
        target = max(spent - saving, wanted)
        now = analyse(current, input_shape=input_shape)
        found = _proposals(now, chosen, constraints, original, cost, target)
        if not found:
            raise _stuck(target, dense_cost, spent, wanted)
        shared = _Shared(PortableModel(current), training, examples, resolved, brief)
        trained: dict[int, tuple[float, list[Array]]] = {}
        with progress_bar(progress, f"NetAdapt {spent / dense_cost:.3f}", len(found), 0) as advance:
            tasks = [kept for _, _, kept, _ in found]
            with closing(run_tasks(executor, _trained, shared, tasks, per_call=1)) as run:
                for number, result in run:
                    trained[number] = result
                    advance()
        proposals = tuple(
            Proposal(name, width, price, trained[number][0])
            for number, (name, width, _, price) in enumerate(found)
        )
        taken = _best(proposals, rule, resolved, score, spent, dense_cost)
        steps.append(Step(target, proposals, taken))
        current = apply(current, PruningPlan.of(now, found[taken][2]))
        for variable, value in zip(current.weights, trained[taken][1], strict=True):
            variable.assign(value)
        spent, score = proposals[taken].cost, proposals[taken].score
        saving *= decay
    return NetAdaptResult(current, dense, dense_cost, wanted, tuple(steps), resolved.name)


def _cost_of(cost: str | Cost, graph: ChannelGraph) -> Callable[[Mask], float]:
    return cost_functions(CostModel(graph))[cost] if isinstance(cost, str) else cost(graph)


def _proposals(
    graph: ChannelGraph,
    criterion: criteria.Criterion,
    constraints: Constraints,
    original: Mapping[str, int],
    cost: str | Cost,
    target: float,
) -> list[tuple[str, int, dict[str, tuple[int, ...]], float]]:
    """For every group the largest width that meets the target: name, width, kept, cost."""
    price = _cost_of(cost, graph)
    scores = criterion(graph)
    unlimited = Constraints(constraints.round_to, constraints.min_channels, 1.0, constraints.ignore)
    result = []
    for chain in chains(graph, scores, unlimited, CostModel(graph)):
        name = chain.group.name
        least = math.ceil(original[name] * (1 - constraints.max_pruning_ratio) - 1e-9)
        for width in _narrower(chain, least):
            kept = {name: tuple(int(i) for i in chain.kept(width))}
            value = price(graph.keep_mask(kept))
            if value <= target:
                result.append((name, width, kept, value))
                break
    return result


def _narrower(chain: Chain, least: int) -> list[int]:
    return [width for width in chain.widths[1:] if width >= least]


@dataclass(frozen=True, eq=False)
class _Shared:
    """What the proposals of one step have in common."""

    model: PortableModel
    train: Examples
    validation: Examples
    metric: Metric
    retraining: Retraining

    def open(self) -> _Shared:
        return self


def _trained(shared: _Shared, kept: Mapping[str, tuple[int, ...]]) -> tuple[float, list[Array]]:
    """The metric and the weights of a proposal after its brief training."""
    graph = analyse(shared.model.model)
    small = apply(graph.model, PruningPlan.of(graph, kept))
    brief = shared.retraining
    x, y = shared.train.x, shared.train.y
    if brief.batches is not None:
        count = brief.batches * brief.batch_size
        x, y = _first(x, count), _first(y, count)
    fine_tune(
        small, (x, y), epochs=brief.epochs, learning_rate=brief.learning_rate,
        schedule=brief.schedule, optimizer=brief.optimizer, weight_decay=brief.weight_decay,
        decay=brief.decay, loss=brief.loss, batch_size=brief.batch_size, seed=brief.seed, verbose=0,
    )  # fmt: skip
    score = Judge(Measurement(PortableModel(small), shared.validation, shared.metric)).masked({})
    return score, [np.asarray(weight) for weight in small.weights]


def _first(part: Any, count: int) -> Any:
    if isinstance(part, Mapping):
        return {key: value[:count] for key, value in part.items()}
    return [value[:count] for value in part] if isinstance(part, list) else part[:count]


def _best(
    proposals: Sequence[Proposal], rule: str, metric: Metric, score: float, spent: float,
    dense_cost: float,
) -> int:  # fmt: skip
    """The proposal to take; the first of equals."""

    def badness(proposal: Proposal) -> float:
        drop = metric.drop(score, proposal.score)
        if rule == "accuracy":
            return drop
        return (drop + 1e-6) / ((spent - proposal.cost) / dense_cost + 1e-5)

    values = [badness(proposal) for proposal in proposals]
    return values.index(min(values))


def _stuck(target: float, dense_cost: float, spent: float, wanted: float) -> BudgetError:
    return BudgetError(
        f"Expected a group that brings the cost to {target / dense_cost:.3f} of the dense "
        f"network's by itself. Received: none at {spent / dense_cost:.3f}, on the way to "
        f"{wanted / dense_cost:.3f}. Use a smaller first_step, a smaller round_to, fewer ignored "
        "groups, or a larger budget."
    )


def _check(budget: float, cost: Any, first_step: float, decay: float, rule: str) -> None:
    if not 0 < budget < 1:
        raise ArgumentError(
            f"Expected budget as a fraction of the dense network's cost, between 0 and 1. "
            f"Received: {budget!r}."
        )
    if not callable(cost) and cost not in _NAMES:
        raise ArgumentError(
            f"Expected cost to be one of {', '.join(_NAMES)}, or a function from a graph to a "
            f"function of a mask. Received: {cost!r}."
        )
    for name, value in (("first_step", first_step), ("decay", decay)):
        if not 0 < value <= 1:
            raise ArgumentError(f"Expected {name} above 0 and at most 1. Received: {value!r}.")
    if rule not in ("ratio", "accuracy"):
        raise ArgumentError(f"Expected rule to be 'ratio' or 'accuracy'. Received: {rule!r}.")
