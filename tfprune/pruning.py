"""The two calls that most people need: :func:`plan` and :func:`prune`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tfprune import allocation, criteria
from tfprune.allocation import Budget, Chain, Constraints
from tfprune.allocation.order import Order
from tfprune.cost import CostModel
from tfprune.errors import ArgumentError, BudgetError
from tfprune.graph import ChannelGraph, analyse
from tfprune.graph.plan import PruningPlan
from tfprune.surgery import apply, check_finite


def plan(
    model: Any,
    pruning_ratio: float | Mapping[str, float] | None = None,
    *,
    macs: float | int | None = None,
    params: float | int | None = None,
    size_bytes: float | int | None = None,
    criterion: Any = "l1",
    data: Any = None,
    order: str | Callable[[Sequence[Chain]], Order] = "uniform",
    round_to: int | str = 8,
    min_channels: int = 1,
    max_pruning_ratio: float = 1.0,
    ignore: Sequence[str] = (),
    input_shape: Any = None,
) -> PruningPlan:
    """Decides which channels go, without touching the model.

    Args:
        model: a functional or sequential model of Keras 3 or tf_keras, or its analysed graph.
        pruning_ratio: the fraction of channels to **remove**, from 0 up to but not including 1:
            of every group (with ``order="uniform"``) or of all channels together (``"global"``);
            or a mapping from names or patterns of groups or layers to ratios.
        macs, params, size_bytes: budgets instead of a ratio: a float is a fraction of the dense
            model's (``0.5``), an int a number. Several may be given; all are met, none is exceeded,
            and one step fewer would not do.
        criterion: what a channel is worth: a name (``tfprune.criteria.names()``) or an object.
        data: training data for the criteria that need some.
        order: ``"uniform"``: all groups lose the same fraction; ``"global"``: the lowest scores go
            first, wherever they are; or a function from the chains of widths
            (:class:`tfprune.allocation.Chain`) to the order of their steps, such as
            ``tfprune.search.sensitivity_analysis(...).order()``: the n-th mention of a chain's
            number is its n-th step.
        round_to: kept widths are multiples of this: an int, or a preset such as ``"cpu_int8"``
            (``tfprune.allocation.PRESETS``). Groups narrower than one multiple are not rounded.
            One channel above a multiple costs a phone as much as a whole further multiple.
            Attention heads count with their width, as kernels see all heads side by side: any
            number of heads of width 64 will do, and heads of width 12 go in pairs if
            ``round_to`` is 8.
        min_channels: fewest channels that a group keeps.
        max_pruning_ratio: largest fraction of any group that may go.
        ignore: names or patterns of groups, or of layers whose output channels all stay.
        input_shape: shape of one example, for ``macs`` of a model that leaves sizes free.

    Returns:
        The plan: print it, save it, apply it, prove it with :func:`tfprune.verify`.

    Raises:
        ModelError: the model is subclassed or unbuilt, or has weights that are not finite.
        ArgumentError: an argument out of range, an unknown criterion, a name that matches nothing.
        BudgetError: the budget is out of reach (the message names the range), or nothing would go.
        DataError: the data are empty or lack labels.
    """
    budget = Budget(macs, params, size_bytes)
    if (pruning_ratio is None) == (not budget):
        raise ArgumentError(
            "Expected either pruning_ratio or budgets (macs, params, size_bytes). Received: "
            f"{'both' if budget else 'neither'}. Write, say, pruning_ratio=0.5 or macs=0.5."
        )
    if pruning_ratio is not None and not isinstance(pruning_ratio, Mapping):
        allocation.check_ratio(pruning_ratio)
    ordered = _order_function(order)
    constraints = Constraints(round_to, min_channels, max_pruning_ratio, ignore)
    chosen = criteria.get(criterion, data)

    graph = model if isinstance(model, ChannelGraph) else analyse(model, input_shape=input_shape)
    check_finite(graph.model)
    costs = CostModel(graph)
    scores = chosen(graph)
    chain_list = allocation.chains(graph, scores, constraints, costs)
    if isinstance(pruning_ratio, Mapping):
        kept = allocation.by_pattern(graph, chain_list, pruning_ratio)
    elif pruning_ratio is not None and order == "uniform":
        kept = allocation.every_group(chain_list, pruning_ratio)
    elif pruning_ratio is not None:
        steps = ordered(chain_list)
        kept = allocation.overall(chain_list, steps, pruning_ratio)
    else:
        kept = allocation.meet(budget, chain_list, ordered(chain_list), costs)

    selection = _select(graph, chosen, scores, kept, budget, costs)
    asked = {"pruning_ratio": pruning_ratio, **budget.given()}
    notes = {
        "criterion": scores.criterion,
        "asked": ", ".join(f"{k}={v}" for k, v in asked.items() if v is not None),
        "order": order if isinstance(order, str) else _name_of(order),
        "round_to": str(round_to),
        **selection.notes,
    }
    result = PruningPlan.of(graph, selection.kept, notes, selection.values)
    wants_something = (
        bool(budget)
        or (isinstance(pruning_ratio, Mapping) and any(pruning_ratio.values()))
        or (not isinstance(pruning_ratio, Mapping) and bool(pruning_ratio))
    )
    if not result.kept and wants_something and not (budget and _loose(budget)):
        raise BudgetError(
            f"Expected a request that removes channels. Received: {notes['asked']} with "
            f"round_to={round_to}, min_channels={min_channels}, which leaves every group whole. "
            + (
                "Nothing in this model can be pruned; print(tfprune.analyse(model)) says why."
                if not graph.prunable
                else "Ask for more, or use a smaller round_to."
            )
        )
    return result


def _order_function(order: Any) -> Callable[[Sequence[Chain]], Order]:
    """From chains to an order of all their steps: by name, or a function that is checked."""
    if isinstance(order, str) and order in allocation.ORDERS:
        return allocation.ORDERS[order]
    if not callable(order) or isinstance(order, type):
        raise ArgumentError(
            f"Expected order to be one of {', '.join(allocation.ORDERS)}, or a function from "
            f"chains to an order of their steps. Received: {order!r}."
        )

    def ordered(chain_list: Sequence[Chain]) -> Order:
        steps = list(order(chain_list))
        wanted = [i for i, chain in enumerate(chain_list) for _ in chain.widths[1:]]
        whole = all(isinstance(n, int | np.integer) for n in steps)
        if not whole or sorted(steps) != wanted:
            raise ArgumentError(
                f"Expected an order of all {len(wanted)} steps: the number of each of the "
                f"{len(chain_list)} chains, as often as it has steps. Received: {len(steps)} "
                f"entries from {_name_of(order)} that are not so."
            )
        return [int(n) for n in steps]

    return ordered


def _name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _select(
    graph: ChannelGraph,
    chosen: criteria.Criterion,
    scores: criteria.Scores,
    kept: Mapping[str, Any],
    budget: Budget,
    costs: CostModel,
) -> criteria.Selection:
    """The allocation's choice, or a selector's among as many channels.

    Raises:
        BudgetError: the channels that it chose cost more than those of the allocation, and too
            much. That can only be where an axis holds some channels of a group and not the others.
    """
    losing = {name: len(k) for name, k in kept.items() if len(k) < graph[name].width}
    if not isinstance(chosen, criteria.Selector) or not losing:
        return criteria.Selection(kept)
    protected = allocation.protected_channels(graph, scores, costs)
    quotas = {
        name: criteria.Quota(width, np.flatnonzero(protected[graph[name].channel_ids]))
        for name, width in losing.items()
    }
    selection = chosen.select(graph, quotas)
    for name, width in losing.items():
        if len(selection.kept[name]) != width:
            raise ArgumentError(
                f"Expected a selector to keep {width} channels of {name!r}. Received: "
                f"{len(selection.kept[name])} from {type(chosen).__name__}."
            )
    selection = replace(selection, kept={**kept, **selection.kept})
    allocation.check_met(budget, selection.kept, costs)
    return selection


def _loose(budget: Budget) -> bool:
    """Whether the dense model may meet the budget as it is, so that nothing has to go."""
    return all(value >= 1 for value in budget.given().values())


def prune(
    model: Any, pruning_ratio: float | Mapping[str, float] | None = None, **options: Any
) -> Any:
    """A smaller model: :func:`plan`, then apply it.

    Args:
        model: a functional or sequential model of Keras 3 or tf_keras; it stays as it is.
        pruning_ratio: see :func:`plan`.
        **options: all of :func:`plan`'s.

    Returns:
        An ordinary model of the same framework with fewer channels, ready to fine-tune.

    Raises:
        TfpruneError: as :func:`plan`.
    """
    return apply(model, plan(model, pruning_ratio, **options))
