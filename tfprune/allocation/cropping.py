"""PreCrop and PreConfig: SynExp's fractions as whole numbers of channels.

Reference and sources: see :mod:`tfprune.allocation.expected_synflow`. At initialisation all
channels of a group are alike, so that the first ones stay. Rounding is ours: every width is rounded
down to one that is allowed, and then the widths that add most to SynExp per unit of cost are raised
step by step while the budgets hold. The cropped network has to be initialised **afresh** and
trained as the dense one would have been: sliced weights have the variance of another fan-in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfprune.allocation.budget import Budget, cost_functions, limits_of
from tfprune.allocation.expected_synflow import Mode, SynExp, kernel_axes, synexp
from tfprune.allocation.rounding import multiple
from tfprune.allocation.steps import Chain, Constraints, chains, kept_by_steps, matches
from tfprune.cost import CostModel
from tfprune.cost.posynomial import Posynomial
from tfprune.criteria.scores import Scores
from tfprune.graph import ChannelGraph, ChannelGroup, analyse
from tfprune.graph.plan import PruningPlan


def precrop(
    model: Any,
    *,
    macs: float | int | None = None,
    params: float | int | None = None,
    size_bytes: float | int | None = None,
    round_to: int | str = 8,
    min_channels: int = 1,
    max_pruning_ratio: float = 1.0,
    ignore: Sequence[str] = (),
    mode: Mode = "groups",
    input_shape: Any = None,
) -> PruningPlan:
    """The plan that PreCrop makes: no data, no weights, milliseconds.

    Initialise what it gives afresh: ``reinitialise(plan.apply(model), seed=0)`` with
    :func:`tfprune.protocols.reinitialise`, or train with :func:`tfprune.protocols.scratch_e`. For a
    trained network take the widths only, with a criterion of your choice:
    ``tfprune.plan(model, tfprune.allocation.ratios_of(plan), criterion="taylor", ...)``.

    Args:
        model: a functional or sequential model of Keras 3 or tf_keras, or its analysed graph.
        macs, params, size_bytes: budgets as for :func:`tfprune.plan`; each is met and none is
            exceeded. The paper's two variants are one of ``params`` and ``macs`` alone.
        round_to, min_channels, max_pruning_ratio, ignore: as for :func:`tfprune.plan`.
        mode: ``"groups"`` (exact) or ``"layers"``; see :mod:`tfprune.allocation.expected_synflow`.
        input_shape: shape of one example, for a model that leaves sizes free.

    Returns:
        A plan that keeps the first channels of every group.

    Raises:
        ArgumentError: no budget, or an argument out of range.
        BudgetError: out of reach.
        ModelError: subclassed or unbuilt, or MACs of a model with a free size.
    """
    graph = model if isinstance(model, ChannelGraph) else analyse(model, input_shape=input_shape)
    budget = Budget(macs, params, size_bytes)
    costs = CostModel(graph)
    first = Scores(
        {group.name: -np.arange(group.width, dtype=np.float64) for group in graph.prunable},
        "the first channels",
    )
    constraints = Constraints(round_to, min_channels, max_pruning_ratio, ignore)
    chain_list = chains(graph, first, constraints, costs)
    lowest = {chain.group.name: chain.widths[-1] for chain in chain_list}
    optimum = synexp(graph, budget, lowest=lowest, ignore=ignore, mode=mode)
    kept = _whole_numbers(chain_list, optimum, budget, costs)
    notes = {
        "criterion": "the first channels",
        "asked": ", ".join(f"{name}={value}" for name, value in budget.given().items()),
        "order": f"SynExp by {mode} ({optimum.objective:.6f} before rounding)",
        "round_to": str(round_to),
    }
    return PruningPlan.of(graph, kept, notes)


def ratios_of(plan: PruningPlan) -> dict[str, float]:
    """The fraction of channels that each group of a plan loses, for :func:`tfprune.plan`."""
    return {name: 1 - len(kept) / plan.widths[name] for name, kept in plan.kept.items()}


def _whole_numbers(
    chain_list: Sequence[Chain], optimum: SynExp, budget: Budget, costs: CostModel
) -> Mapping[str, Any]:
    """Down to allowed widths, then up again where it is worth most."""
    functions, limits = cost_functions(costs), limits_of(budget, costs)
    groups = [chain.group for chain in chain_list]
    axes = kernel_axes(costs.graph, groups)
    taken = {}
    for number, chain in enumerate(chain_list):
        wanted = optimum.fractions[chain.group.name] * chain.group.width + 1e-6
        taken[number] = next(i for i, width in enumerate(chain.widths) if width <= wanted)

    def mask(steps: Mapping[int, int]) -> Any:
        return costs.graph.keep_mask(kept_by_steps(chain_list, steps))

    def logs(steps: Mapping[int, int]) -> Any:
        return np.log([c.widths[steps[i]] / c.widths[0] for i, c in enumerate(chain_list)])

    def spent(steps: Mapping[int, int]) -> dict[str, int]:
        current = mask(steps)
        return {name: functions[name](current) for name in limits}

    now, worth = spent(taken), axes.objective(logs(taken))
    open_to = {number for number, step in taken.items() if step}
    while open_to:
        best: tuple[float, int, dict[str, int]] | None = None
        for number in sorted(open_to):
            higher = {**taken, number: taken[number] - 1}
            cost = spent(higher)
            if any(cost[name] > limit for name, limit in limits.items()):
                open_to.discard(number)  # costs only rise
                continue
            share = max((cost[n] - now[n]) / limit for n, limit in limits.items())
            gain = (axes.objective(logs(higher)) - worth) / max(share, 1e-12)
            if best is None or gain > best[0]:
                best = gain, number, cost
        if best is None:
            break
        _, number, now = best
        taken[number] -= 1
        worth = axes.objective(logs(taken))
        if not taken[number]:
            open_to.discard(number)
    return kept_by_steps(chain_list, taken)


def preconfig(
    model: Any,
    *,
    macs: float | int | None = None,
    params: float | int | None = None,
    size_bytes: float | int | None = None,
    max_expand: float = 1.5,
    round_to: int | str = 8,
    min_fraction: float = 0.25,
    streams: bool = False,
    ignore: Sequence[str] = (),
    input_shape: Any = None,
) -> dict[str, int]:
    """The widths that PreConfig gives a network: some groups shrink and others grow.

    Build it with :func:`tfprune.surgery.resize`, which initialises it afresh.

    Args:
        model: as for :func:`precrop`.
        macs, params, size_bytes: budgets; usually two, each a fraction of the original's up to
            1.0. With one only, nothing holds the other cost.
        max_expand: largest width of a group, as a multiple of its own. Above 2 the proxy
            degenerates in residual networks: it has no term against bottlenecks.
        round_to: widths are multiples of this, where the group is not narrower than one.
        min_fraction: smallest width of a group, as a fraction of its own.
        streams: whether groups that several layers produce (residual streams) may change too, and
            the group of the first layer.
        ignore: names or patterns of further groups that stay as they are.
        input_shape: shape of one example, for a model that leaves sizes free.

    Returns:
        Group name -> width, for the groups whose width changes.

    Raises:
        ArgumentError: no budget, or an argument out of range.
        BudgetError: out of reach.
        ModelError: subclassed or unbuilt, or MACs of a model with a free size.
    """
    graph = model if isinstance(model, ChannelGraph) else analyse(model, input_shape=input_shape)
    budget, step = Budget(macs, params, size_bytes), multiple(round_to)
    costs = CostModel(graph)
    held = [] if streams else [group.name for group in graph.prunable if _is_stream(graph, group)]
    constraints = Constraints(round_to, ignore=[*ignore, *held])
    groups = [
        group for group in graph.prunable
        if not any(matches(group, pattern) for pattern in constraints.ignore)
    ]  # fmt: skip
    unit = {group.name: 1 if group.width < step else step for group in groups}
    lowest = {
        group.name: min(
            group.width, max(unit[group.name], _up(min_fraction * group.width, unit[group.name]))
        )
        for group in groups
    }
    optimum = synexp(graph, budget, lowest=lowest, max_expand=max_expand, ignore=constraints.ignore)
    limits = limits_of(budget, costs)
    functions = {name: costs.posynomial(name, groups) for name in limits}
    axes = kernel_axes(graph, groups)
    whole = np.array([group.width for group in groups], np.float64)
    wanted = np.array([optimum.fractions[group.name] for group in groups]) * whole
    steps = np.array([unit[group.name] for group in groups])
    least = np.array([lowest[group.name] for group in groups])
    widths = np.maximum(least, np.floor((wanted + 1e-6) / steps) * steps)
    widths = _raised(widths, steps, np.floor(whole * max_expand + 1e-9), whole, functions, limits,
                     axes.objective)  # fmt: skip
    return {
        group.name: int(width)
        for group, width in zip(groups, widths, strict=True)
        if int(width) != group.width
    }


def _raised(
    widths: Any, steps: Any, most: Any, whole: Any,
    functions: Mapping[str, Posynomial], limits: Mapping[str, int], objective: Any,
) -> Any:  # fmt: skip
    """Widths raised one step at a time where SynExp gains most for the cost, within budgets."""
    while True:
        now = {name: function(widths / whole) for name, function in functions.items()}
        worth, best, chosen = objective(np.log(widths / whole)), -np.inf, None
        for number in range(len(widths)):
            higher = widths.copy()
            higher[number] += steps[number]
            cost = {name: function(higher / whole) for name, function in functions.items()}
            over = any(round(cost[name]) > limit for name, limit in limits.items())
            if higher[number] > most[number] or over:
                continue
            share = max((cost[name] - now[name]) / limit for name, limit in limits.items())
            gain = (objective(np.log(higher / whole)) - worth) / max(share, 1e-12)
            if gain > best:
                best, chosen = gain, number
        if chosen is None:
            return widths
        widths = widths.copy()
        widths[chosen] += steps[chosen]


def _is_stream(graph: ChannelGraph, group: ChannelGroup) -> bool:
    """Whether several kernels make the group's channels, or the first layer does."""
    makers = {member.path for member in group.producers if member.scored}
    return len(makers) > 1 or group is graph.groups[0]


def _up(value: float, step: int) -> int:
    return int(np.ceil(value / step - 1e-9)) * step
