"""Which channel groups the methods that merge channels act on, and how far they shrink."""

from __future__ import annotations

import numpy as np

from tfprune.criteria.scores import Scores
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph
from tfprune.methods.structured import StructuredMethod
from tfprune.pruning import plan as plan_of
from tfprune.surgery.merging import kinds, obstacle


def left_alone(graph: ChannelGraph) -> dict[str, str]:
    """The groups whose channels cannot be made equal and merged, each with the reason."""
    kind = kinds(graph)
    frozen = {graph.record.paths[k] for k, op in graph.record.ops.items()
              if not getattr(op, "trainable", True)}  # fmt: skip
    result = {}
    for group in graph.prunable:
        still = [m.path for m in (*group.producers, *group.followers) if m.path in frozen]
        why = obstacle(graph, group)
        if not why and len(np.unique(kind[group.channel_ids])) > 1:
            why = "its channels go different ways"
        if not why and still:
            why = f"{still[0]} is not trained"
        if why:
            result[group.name] = why
    return result


def notes_on(graph: ChannelGraph) -> dict[str, str]:
    """For a plan's notes: which groups are left alone, and why."""
    reasons = left_alone(graph)
    listed = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    return {"left alone": listed} if listed else {}


def check_any(graph: ChannelGraph, name: str) -> None:
    """Raises :class:`ArgumentError` if every group has to be left alone.

    Args:
        graph: of the model.
        name: of the method.
    """
    reasons = left_alone(graph)
    if len(reasons) == len(graph.prunable):
        listed = "; ".join(f"{group}: {why}" for group, why in list(reasons.items())[:5])
        raise ArgumentError(
            f"Expected channels that {name} can merge. Received: {graph.model.name!r}, which "
            f"has none. {listed or 'print(tfprune.analyse(model)) says what can be pruned'}."
        )


def uniform_widths(graph: ChannelGraph, method: StructuredMethod) -> dict[str, int]:
    """Group name -> channels that stay, if every group loses the same part.

    Args:
        graph: of the model.
        method: whose ``macs`` or ``pruning_ratio`` is met.

    Raises:
        ArgumentError, BudgetError: as :func:`tfprune.plan`.
    """
    ones = Scores({g.name: np.ones(g.width) for g in graph.prunable}, "any")
    plan = plan_of(
        graph,
        method.pruning_ratio,
        macs=method.macs,
        criterion=lambda _: ones,
        order="uniform",
        round_to=method.round_to,
        min_channels=method.min_channels,
        ignore=[*method.ignore, *left_alone(graph)],
    )
    return {name: len(kept) for name, kept in plan.kept.items()}
