"""Random models' worth of proof: random weights, a random plan, and masked ≡ pruned.

Usable by any test module::

    from tests.graph.oracle import assert_masked_equals_pruned

    assert_masked_equals_pruned(model, prunable={"conv", "dense"})
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from tfprune.graph import analyse
from tfprune.graph.plan import PruningPlan
from tfprune.surgery import apply, verify

TOLERANCE = 1e-5
"""Relative: a float32 sum in another order is off by about 1e-7 of its terms, and the test models
have up to some ten layers of some ten terms each, with cancellation."""


def randomise(model: Any, seed: int = 0) -> None:
    """Normal weights, positive variances; nothing is left at zero or one, where errors hide."""
    random = np.random.default_rng(seed)
    for variable in model.variables:
        value = np.asarray(variable)
        if value.dtype.kind != "f":
            continue
        name = str(getattr(variable, "path", variable.name))
        new = random.normal(0.0, 0.5, value.shape)
        positive = "variance" in name or "stddev" in name
        variable.assign((np.abs(new) + 0.3 if positive else new).astype(value.dtype))


def random_plan(model: Any, seed: int = 0, pruning_ratio: float = 0.5) -> PruningPlan:
    """A plan that removes random channels, ``pruning_ratio`` of every prunable group."""
    random = np.random.default_rng(seed)
    graph = analyse(model)
    kept = {}
    for group in graph.prunable:
        count = max(1, round(group.width * (1 - pruning_ratio)))
        kept[group.name] = sorted(random.choice(group.width, count, replace=False).tolist())
    return PruningPlan.of(graph, kept)


def assert_masked_equals_pruned(
    model: Any,
    prunable: Collection[str] | None = None,
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    inputs: Any = None,
    random_weights: bool = True,
) -> Any:
    """Prunes half of everything at random and proves it; returns the smaller model.

    Args:
        model: its weights are replaced by random ones, unless ``random_weights`` is false.
        prunable: the names of the groups that must be prunable, and no others.
        seed: of weights, plan and inputs.
        tolerance: relative, see :data:`TOLERANCE`.
        inputs: a batch; by default a random one.
    """
    if random_weights:
        randomise(model, seed)
    graph = analyse(model)
    if prunable is not None:
        assert {group.name for group in graph.prunable} == set(prunable), [
            (group.name, group.reason) for group in graph.groups
        ]
    plan = random_plan(model, seed)
    small = apply(model, plan)
    result = verify(model, plan, pruned=small, inputs=inputs, tolerance=tolerance, seed=seed)
    assert result.passed, str(result)
    # Outputs that are all zero would agree whatever the surgery did.
    assert result.magnitude > 0
    after = analyse(small)
    for name, indices in plan.kept.items():
        assert after[name].width == len(indices), name
    return small


def chain(framework: Any, shape: tuple[int | None, ...], *layers: Any) -> Any:
    """A functional model of layers (or functions of one tensor) one after the other."""
    inputs = outputs = framework.Input(shape)
    for layer in layers:
        outputs = layer(outputs)
    return framework.Model(inputs, outputs)
