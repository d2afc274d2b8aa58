"""Random weights and random plans."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfprune.graph import analyse
from tfprune.graph.plan import PruningPlan


def randomize(model: Any, seed: int = 0) -> Any:
    """Gives every weight of one axis a random value, statistics included; returns the model.

    Initial values hide mistakes: biases and offsets are zero, scales and variances one.
    """
    random = np.random.default_rng(seed)
    for variable in model.weights:
        if len(variable.shape) != 1 or not str(variable.dtype).count("float"):
            continue
        name = getattr(variable, "path", variable.name)
        positive = any(part in name for part in ("variance", "gamma", "scale"))
        low, high = (0.5, 1.5) if positive else (-0.5, 0.5)
        variable.assign(random.uniform(low, high, variable.shape))
    return model


def random_plan(model: Any, *, ratio: float = 0.5, seed: int = 0) -> PruningPlan:
    """A plan that drops a random part of every prunable group, about ``ratio`` of it."""
    from tfprune.pruning import plan

    graph = analyse(model)
    if not graph.prunable:
        return PruningPlan.of(graph, {})
    from tfprune.criteria import Random

    return plan(graph, ratio, criterion=Random(seed), round_to=1)
