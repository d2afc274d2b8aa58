"""Copies of a model in which activations or the type of numbers differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from tfprune.graph.remake import remake
from tfprune.graph.replay import replay
from tfprune.graph.trace import all_layers, is_model, trace
from tfprune.methods.method import plain_copy

FLOATS = ("float16", "bfloat16", "float32", "float64")


def altered_copy(model: Any, change: Callable[[Any], Any], dtype: str | None = None) -> Any:
    """A copy of a model, variables included, in which some layers or operations are others.

    Args:
        model: a built Keras 3 model without pruning wrappers. It stays as it is.
        change: from a layer or operation of the model to a new one in its place, or ``None`` for
            a copy. A new one must have the same variables.
        dtype: of floating-point numbers everywhere in the copy; ``None`` as they are.

    Raises:
        ModelError: a layer cannot be made from its configuration.
    """
    made: dict[int, tuple[Any, Any]] = {}

    def make(op: Any) -> Any:
        if id(op) not in made:
            made[id(op)] = op, made_anew(op)
        return made[id(op)][1]

    def made_anew(op: Any) -> Any:
        if is_model(op):
            return whole(op)
        changed = change(op)
        return remade(op, {}, dtype) if changed is None else changed

    def whole(source: Any) -> Any:
        return replay(
            trace(source), make=make, make_input=lambda ref, layer: remade(layer, {}, dtype)
        )

    result = whole(model)
    for source, copy in made.values():
        if source is copy or is_model(source):
            continue
        old, new = getattr(source, "variables", []), getattr(copy, "variables", [])
        for before, after in zip(old, new, strict=True):
            after.assign(np.asarray(before).astype(after.dtype))
    return result


def scoring_copy(model: Any) -> Any:
    """A plain copy of a model to take gradients of, without half precision.

    Small gradients vanish in float16, where training would scale the loss.

    Raises:
        ModelError: no built Keras 3 model, or an unknown layer in it.
    """
    plain = plain_copy(model)
    if any(layer.compute_dtype in ("float16", "bfloat16") for layer in all_layers(plain)):
        return altered_copy(plain, lambda op: None, "float32")
    return plain


def remade(op: Any, entries: Mapping[str, Any], dtype: str | None = None) -> Any:
    """A layer or operation made again from its configuration, with some entries replaced.

    Args:
        op: of Keras 3.
        entries: of the configuration.
        dtype: of every floating-point dtype in the configuration; ``None`` as they are.

    Raises:
        ModelError: it cannot be made from its configuration.
    """

    def changed(config: dict[str, Any]) -> dict[str, Any]:
        config = {**config, **entries}
        return config if dtype is None else _with_dtype(config, dtype)

    return remake(op, changed)


def _with_dtype(config: Any, dtype: str) -> Any:
    """The configuration, those of layers inside included, with another floating-point dtype."""
    if isinstance(config, list | tuple):
        return type(config)(_with_dtype(item, dtype) for item in config)
    if not isinstance(config, dict):
        return config
    result = {}
    for key, value in config.items():
        if key == "dtype" and (isinstance(value, dict) or _is_float(value)):
            result[key] = dtype
        else:
            result[key] = _with_dtype(value, dtype)
    return result


def _is_float(dtype: Any) -> bool:
    return dtype in FLOATS or (isinstance(dtype, str) and dtype.startswith("mixed_"))


def linear_form(op: Any, dtype: str | None = None) -> Any:
    """A layer or operation without its activation: the identity, if it is nothing else."""
    if isinstance(op, keras.layers.Layer) and not isinstance(op, keras.layers.Softmax):
        return remade(op, {"activation": "linear"}, dtype)
    return keras.layers.Activation("linear", name=op.name, dtype=dtype)


def head_of(model: Any) -> Any:
    """The operation that makes the output of a model, as ``final_activation`` finds it."""
    last = (getattr(model, "operations", None) or model.layers)[-1]
    return head_of(last) if hasattr(last, "layers") else last
