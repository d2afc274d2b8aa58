"""What every criterion and every rule must satisfy, as functions that raise AssertionError."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfprune.cost import measure
from tfprune.criteria.scores import Criterion
from tfprune.graph import analyse
from tfprune.graph.plan import PruningPlan
from tfprune.graph.trace import node_counts
from tfprune.surgery import apply, verify
from tfprune.testing.models import random_plan


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def check_criterion(criterion: Criterion, model: Any) -> None:
    """Scores have the right shape, are finite, and come out the same twice.

    Args:
        criterion: a callable from a graph to scores.
        model: any model with prunable groups.

    Raises:
        AssertionError: naming the group.
    """
    graph = analyse(model)
    first, second = criterion(graph), criterion(graph)
    _require(
        set(first) == {group.name for group in graph.prunable},
        f"Expected scores for every prunable group. Received: {sorted(first)}.",
    )
    for group in graph.prunable:
        scores = first[group.name]
        _require(
            scores.shape == (group.width,) and scores.dtype == np.float64,
            f"Expected float64 scores of shape ({group.width},) for {group.name!r}. Received: "
            f"{scores.dtype} of shape {scores.shape}.",
        )
        _require(bool(np.isfinite(scores).all()), f"Expected finite scores for {group.name!r}.")
        _require(
            bool(np.array_equal(scores, second[group.name])),
            f"Expected the same scores for {group.name!r} when asked twice.",
        )


def check_surgery(
    model: Any,
    *,
    ratio: float = 0.5,
    seed: int = 0,
    tolerance: float = 1e-5,
    inputs: Any = None,
) -> PruningPlan:
    """Masked ≡ pruned for a random plan, costs foretold, and the source left as it was.

    Args:
        model: the model to prune.
        ratio: about which part of every group goes.
        seed: of the plan and the inputs.
        tolerance: largest difference, relative to the largest output.
        inputs: see :func:`tfprune.verify`.

    Returns:
        The plan that was tried.

    Raises:
        AssertionError: saying what differs.
    """
    before = [np.asarray(weight).copy() for weight in model.weights]
    names = [layer.name for layer in model.layers]
    nodes = node_counts(model)
    plan = random_plan(model, ratio=ratio, seed=seed)
    small = apply(model, plan)
    found = verify(model, plan, pruned=small, inputs=inputs, tolerance=tolerance, seed=seed)
    _require(bool(found), str(found))
    foretold, real = measure(model, plan), measure(small)
    for field in ("parameters", "trainable_parameters", "size_bytes", "macs", "activation_bytes"):
        _require(
            getattr(foretold, field) == getattr(real, field),
            f"Expected {field} {getattr(real, field)} of the pruned model to be foretold. "
            f"Received: {getattr(foretold, field)}.",
        )
    _require([layer.name for layer in small.layers] == names, "Expected the same layer names.")
    _require(node_counts(model) == nodes, "Expected the source's graph to be left as it was.")
    for old, weight in zip(before, model.weights, strict=True):
        _require(
            bool(np.array_equal(old, np.asarray(weight))),
            f"Expected the source's weights to be left as they were: {weight.name}.",
        )
    return plan
