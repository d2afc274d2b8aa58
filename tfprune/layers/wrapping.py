"""Wraps whole models for magnitude pruning, and takes the wrappers off again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from tfprune.errors import ModelError
from tfprune.graph.remake import remake
from tfprune.graph.replay import copy_trainable, replay
from tfprune.graph.trace import (
    framework_of,
    functional_of,
    is_model,
    is_sequential,
    trace,
)
from tfprune.layers.keras2 import for_keras2, keras2_scope
from tfprune.layers.magnitude import DEFAULT_SCHEDULE, PruneLowMagnitude, check_arguments
from tfprune.layers.prunable import is_wrapper, may_be_pruned, prunable_of, walk, wrappers_of
from tfprune.schedules.tfmot import load


def prune_low_magnitude(
    to_prune: Any,
    pruning_schedule: Any = DEFAULT_SCHEDULE,
    block_size: Sequence[int] = (1, 1),
    block_pooling_type: str = "AVG",
    pruning_policy: Any = None,
    sparsity_m_by_n: Sequence[int] | None = None,
    **kwargs: Any,
) -> Any:
    """Wraps a model, a layer or a list of layers, so that training prunes small weights.

    The arguments, their order and defaults are those of
    ``tensorflow_model_optimization.sparsity.keras.prune_low_magnitude``, which takes Keras 2 models
    only. Given a model or layer of tf_keras (Keras 2), this function calls that one.

    Args:
        to_prune: a functional, sequential or nested Keras 3 model; a single layer; a list of
            layers. Layers inside nested models are wrapped where they stand.
        pruning_schedule: which sparsity at which step: see ``tfprune.schedules``.
        block_size: (height, width) of the blocks in kernels of two axes that are pruned as one.
        block_pooling_type: "AVG" or "MAX": how the magnitudes in a block become one.
        pruning_policy: an object with ``allow_pruning(layer)`` and
            ``ensure_model_supports_pruning(model)``; layers that it does not allow are not wrapped.
            For models only, as in tfmot.
        sparsity_m_by_n: ``(m, n)``: m zeros in every n consecutive weights along the inputs.
        **kwargs: further arguments of the wrappers, which are Keras layers.

    Returns:
        For a model a new one, uncompiled, with the same weights; the source stays as it is, and
        only layers with weights to prune are wrapped (tfmot wraps all, and shares their weights
        with the source). As with tfmot, an output is named after its wrapper: a dictionary of
        losses has "prune_low_magnitude_head" where it had "head". For a layer the wrapper, which
        takes it over. For a list the list of wrappers, with layers that have nothing to prune as
        they were.

    Raises:
        ArgumentError: an argument is not allowed, or does not fit a layer's weights.
        ModelError: a subclassed model; a layer of which nobody knows what to prune, with its path;
            something that is neither model nor layer.

    Example:
        >>> schedule = tfprune.schedules.Polynomial(0.0, 0.8, 0, 1000)  # doctest: +SKIP
        >>> pruned = tfprune.prune_low_magnitude(model, schedule)  # doctest: +SKIP
        >>> pruned.compile("adam", "mse")  # doctest: +SKIP
        >>> pruned.fit(x, y, callbacks=[tfprune.UpdatePruningStep()])  # doctest: +SKIP
        >>> sparse = tfprune.strip_pruning(pruned)  # doctest: +SKIP
    """
    options: dict[str, Any] = {
        "pruning_schedule": pruning_schedule,
        "block_size": block_size,
        "block_pooling_type": block_pooling_type,
        "sparsity_m_by_n": sparsity_m_by_n,
    }
    if _is_keras2(to_prune):
        options["pruning_schedule"] = for_keras2(pruning_schedule)
        return load().sparsity.keras.prune_low_magnitude(
            to_prune, pruning_policy=pruning_policy, **options, **kwargs
        )
    check_arguments(**options)
    options |= kwargs
    if isinstance(to_prune, list | tuple):
        return [_wrapped(layer, options) for layer in to_prune]
    if is_model(to_prune):
        _check_model(to_prune)
        if pruning_policy is not None:
            pruning_policy.ensure_model_supports_pruning(to_prune)
        wrapped = wrap_layers(
            to_prune,
            lambda layer: pruning_policy is None or bool(pruning_policy.allow_pruning(layer)),
            options,
        )
        if not any(is_wrapper(layer) for _, layer in walk(wrapped)):
            raise ModelError(
                f"Expected a model with weights to prune. Received: {to_prune.name!r}, of which "
                + ("the policy allows no layer." if pruning_policy else "no layer has any.")
            )
        return wrapped
    if isinstance(to_prune, keras.layers.Layer):
        return PruneLowMagnitude(to_prune, **options)
    raise ModelError(
        "Expected a functional or sequential model, a layer, or a list of layers. "
        f"Received: {type(to_prune).__name__}."
    )


def strip_pruning(model: Any) -> Any:
    """The model without pruning wrappers, its weights multiplied by their masks.

    Args:
        model: a wrapped model of Keras 3, or one of tf_keras, which goes to tfmot.

    Returns:
        A new, uncompiled model of ordinary layers, with the names they had; the source stays as it
        is. It loads anywhere without tfprune.

    Raises:
        ModelError: not a functional or sequential model; a wrapper inside another layer.
    """
    if _is_keras2(model):
        return load().sparsity.keras.strip_pruning(model)
    _check_model(model)
    masked: list[tuple[Any, Any]] = []

    def bare(path: str, layer: Any) -> tuple[Any, Change] | None:
        def remember(copy: Any) -> Any:
            masked.append((layer, copy))
            return copy

        return (layer.layer, remember) if is_wrapper(layer) else None

    result = _rebuilt(model, bare)
    hidden = [layer.layer.name for layer in wrappers_of(result)]
    if hidden:
        raise ModelError(
            f"Expected pruning wrappers around the layers of {model.name!r}. Received: some inside "
            f"other layers, around {hidden}, where they cannot be taken off. Wrap the outer layers "
            "instead: prune_low_magnitude(TimeDistributed(layer)) prunes what is inside."
        )
    for wrapper, copy in masked:
        for (_, mask, _), weight in zip(wrapper.pruning_vars, prunable_of(copy), strict=True):
            weight.variable.assign(np.asarray(weight.variable) * np.asarray(mask))
    return result


@contextlib.contextmanager
def prune_scope() -> Iterator[None]:
    """A scope in which wrapped models load: files of Keras 3 and of tf_keras.

    With Keras 3, ``import tfprune.layers`` alone is enough, because the wrapper is registered; the
    scope says so in the words of tfmot, and makes old code run.

    Example:
        >>> with tfprune.prune_scope():  # doctest: +SKIP
        ...     model = keras.models.load_model("pruned.keras")
    """
    with load().sparsity.keras.prune_scope(), keras2_scope():
        yield


def wrap_layers(model: Any, allowed: Callable[[Any], bool], options: dict[str, Any]) -> Any:
    """A copy of ``model`` with a wrapper around every prunable layer for which ``allowed(layer)``.

    Layers that are wrapped already keep their wrapper, their masks and their step.
    """

    def wrapper(path: str, layer: Any) -> tuple[Any, Change] | None:
        if is_wrapper(layer) or not allowed(layer):
            return None
        if layer.built:
            prunable_of(layer, path)  # refuses unknown layers, with their path
        if not may_be_pruned(layer):
            return None
        return layer, lambda copy: PruneLowMagnitude(copy, **options)

    return _rebuilt(model, wrapper)


def _wrapped(layer: Any, options: dict[str, Any]) -> Any:
    if isinstance(layer, keras.layers.InputLayer) or is_wrapper(layer):
        return layer
    if isinstance(layer, keras.layers.Layer) and not is_model(layer):
        if layer.built:
            prunable_of(layer)
        if not may_be_pruned(layer):
            return layer
    return PruneLowMagnitude(layer, **options)


Change = Callable[[Any], Any]
"""From the copy of a layer to what stands in its place."""


def _rebuilt(model: Any, change: Callable[[str, Any], tuple[Any, Change] | None]) -> Any:
    """A copy of a model, variables included, in which some layers are replaced.

    ``change(path, layer)`` returns ``None`` for a plain copy, or the layer to copy and what to make
    of the copy.
    """
    paths = {id(layer): path for path, layer in walk(model)}
    made: dict[int, Any] = {}
    copied: list[tuple[Any, Any]] = []

    def make(op: Any) -> Any:
        if id(op) not in made:
            made[id(op)] = made_anew(op)
        return made[id(op)]

    def made_anew(op: Any) -> Any:
        if is_model(op):
            return whole(op)
        decided = change(paths[id(op)], op) if id(op) in paths else None
        source, finish = decided or (op, lambda copy: copy)
        copy = _copy(source)
        copied.append((source, copy))
        return finish(copy)

    def whole(source: Any) -> Any:
        if is_sequential(source) and not source.built:
            return keras.Sequential([make(layer) for layer in source.layers], name=source.name)
        return replay(
            trace(source), make=make, make_input=lambda ref, layer: _copy(layer)
        )  # fmt: skip

    result = whole(model)
    for source, copy in copied:
        _copy_state(source, copy)
    copy_trainable(model, result)
    return result


def _copy(op: Any) -> Any:
    """The same layer or operation anew.

    A wrapper is made without its configuration, for which it would look up the layer's class and
    the schedule's by name, and know only registered ones.
    """
    return op.around(_copy(op.layer)) if is_wrapper(op) else remake(op)


def _copy_state(source: Any, copy: Any) -> None:
    """Every variable: weights, statistics, seeds, and for wrappers masks and step."""
    if copy is source or not getattr(source, "built", True):
        return
    old, new = getattr(source, "variables", []), getattr(copy, "variables", [])
    if len(old) != len(new):
        raise ModelError(
            f"Expected {type(source).__name__} {source.name!r} to have {len(old)} variables again "
            f"when it is copied. Received: {len(new)}. Its constructor or build method makes "
            "variables that its configuration does not describe."
        )
    for before, after in zip(old, new, strict=True):
        after.assign(before)


def _check_model(model: Any) -> None:
    """Refuses subclassed models; sequential ones need not be built."""
    if not is_model(model) or framework_of(model) != "keras":
        raise ModelError(
            f"Expected a Keras model (functional or sequential). Received: {type(model).__name__}."
        )
    if not is_sequential(model):
        functional_of(model)


def _is_keras2(value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return any(framework_of(item) == "tf_keras" for item in items)
