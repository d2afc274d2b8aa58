"""Copies of a model, layer by layer: nothing is shared with the source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tfprune.graph.remake import remake
from tfprune.graph.replay import copy_trainable, replay
from tfprune.graph.trace import Ref, is_model, require_unwrapped, trace


def copy_model(model: Any) -> Any:
    """A copy with the same architecture, names and weights, uncompiled.

    Args:
        model: a functional, sequential or nested model of Keras 3 or tf_keras. It stays as it is.

    Raises:
        ModelError: a subclassed or unbuilt model, one with pruning wrappers, or a layer that cannot
            be made from its configuration.
    """
    result, made = made_again(model, lambda op: remake(op, unbuilt))
    for source, copy in made:
        old, new = getattr(source, "variables", ()), getattr(copy, "variables", ())
        for before, after in zip(old, new, strict=True):
            after.assign(np.asarray(before))
    return result


def made_again(model: Any, make_op: Callable[[Any], Any]) -> tuple[Any, list[tuple[Any, Any]]]:
    """The same graph with other layers and operations, each made once.

    Args:
        model: the model to repeat.
        make_op: from a layer (an input's among them) or operation to the one in its place.

    Returns:
        The new model, with the trainable flags of the source, and the pairs of (source, new) layers
        and operations, without nested models and inputs.

    Raises:
        ModelError: a subclassed or unbuilt model, or one with pruning wrappers.
    """
    traced = trace(model)
    require_unwrapped(model)
    made: dict[int, tuple[Any, Any]] = {}

    def make(op: Any) -> Any:
        if id(op) not in made:
            made[id(op)] = op, whole(op) if is_model(op) else make_op(op)
        return made[id(op)][1]

    def make_input(ref: Ref, layer: Any) -> Any:
        return make_op(layer)

    def whole(source: Any) -> Any:
        return replay(
            traced if source is model else trace(source), make=make, make_input=make_input
        )

    result = whole(model)
    copy_trainable(model, result)
    return result, [pair for pair in made.values() if not is_model(pair[0])]


def unbuilt(config: Any) -> Any:
    """A configuration without the shapes that contained layers were built for."""
    if isinstance(config, list | tuple):
        items = [unbuilt(item) for item in config]
        return tuple(items) if isinstance(config, tuple) else items
    if isinstance(config, Mapping):
        return {key: unbuilt(value) for key, value in config.items() if key != "build_config"}
    return config
