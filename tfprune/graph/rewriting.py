"""Makes a model again with some layers replaced, and gives it the weights of those that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tfprune.graph.remake import remake
from tfprune.graph.replay import replay
from tfprune.graph.trace import Ref, Trace, is_model, trace

Replace = Callable[[Any, Callable[..., Any]], Any]
"""``replace(op, copied)`` makes what stands in the place of a layer or operation: mostly
``copied(op)``, the same anew with the same weights, or ``copied(op, kind)``, of another class."""


def rewritten(model: Any, replacing: Callable[[Trace], Replace]) -> Any:
    """A copy of a model with other layers in the place of some.

    Args:
        model: a functional or sequential model; models nested in it are rewritten, too.
        replacing: from the trace of a model to how its operations are replaced. Each is asked for
            once, however often it is called.

    Raises:
        ModelError: a layer cannot be made from its configuration, or the model is not one that can
            be traced.
    """
    made: dict[int, Any] = {}
    pairs: list[tuple[Any, Any]] = []

    def copied(op: Any, kind: Any = None) -> Any:
        new = remake(op, kind=kind)
        pairs.append((op, new))
        return new

    def whole(source: Any) -> Any:
        traced = trace(source)
        replace = replacing(traced)

        def make(op: Any) -> Any:
            if id(op) not in made:
                made[id(op)] = whole(op) if is_model(op) else replace(op, copied)
            return made[id(op)]

        def make_input(ref: Ref, layer: Any) -> Any:
            return remake(layer)

        return replay(traced, make=make, make_input=make_input)

    result = whole(model)
    for old, new in pairs:
        for before, after in zip(
            getattr(old, "variables", ()), getattr(new, "variables", ()), strict=True
        ):
            after.assign(np.asarray(before))
    result.trainable = model.trainable
    return result
