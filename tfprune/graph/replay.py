"""Makes a model again with other operations: its calls are repeated on new symbolic inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from tfprune.graph.evaluate import flatten
from tfprune.graph.trace import (
    Call,
    Ref,
    Trace,
    framework_module,
    framework_of,
    is_model,
    is_of_framework,
    is_sequential,
    map_leaves,
)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def replay(
    traced: Trace,
    *,
    make: Callable[[Any], Any],
    make_input: Callable[[Ref, Any], Any],
    arguments: Callable[[Call], Arguments] = lambda call: (call.args, call.kwargs),
    skipped: Mapping[int, Ref | None] | None = None,
) -> Any:
    """A model with the same graph and new operations, uncompiled.

    Args:
        traced: the model to repeat.
        make: from an operation (layer, ``keras.ops`` operation or nested model) to the one in its
            place; the same one every time it is asked for the same.
        make_input: from an input and its layer to the new input layer.
        arguments: from a call to its positional and keyword arguments, with
            :class:`~tfprune.graph.trace.Ref` in the place of tensors.
        skipped: ``id`` of a call that is not made -> the tensor that stands for its output;
            ``None`` where nobody reads that. A sequential model has none such.

    Returns:
        A functional model, or a sequential one where the source is one, of the same framework and
        name. A class derived from these (with a ``train_step`` of its own, say) is kept unless it
        has a constructor of its own.
    """
    keras = framework_module(traced.framework)
    source = traced.model
    if is_sequential(source):
        result = _class_of(source, keras.Sequential)(name=source.name)
        result.add(make_input(traced.inputs[0], traced.input_layers[0]))
        # Its calls may contain more: what Keras computes masks of time steps with.
        for layer in source.layers:
            result.add(make(layer))
        return _with_policy(source, result)
    known: dict[tuple[int, int, int], Any] = {}

    def tensor_of(leaf: Any) -> Any:
        return known[leaf.key] if isinstance(leaf, Ref) else leaf

    for ref, layer in zip(traced.inputs, traced.input_layers, strict=True):
        known[ref.key] = flatten(make_input(ref, layer).output)[0]
    skipped = skipped or {}
    for call in traced.calls:
        if id(call) in skipped:
            instead = skipped[id(call)]
            if instead is not None:
                known[call.outputs[0].key] = known[instead.key]
            continue
        args, kwargs = arguments(call)
        # Keras fills in masks by itself when it repeats a call.
        given = {key: value for key, value in kwargs.items() if value is not None}
        outputs = make(call.op)(*map_leaves(tensor_of, args), **map_leaves(tensor_of, given))
        for ref, tensor in zip(call.outputs, flatten(outputs), strict=True):
            known[ref.key] = tensor
    result = _class_of(source, keras.Model)(
        map_leaves(tensor_of, traced.input_structure),
        map_leaves(tensor_of, traced.output_structure),
        name=source.name,
    )
    return _with_policy(source, result)


def _with_policy(source: Any, result: Any) -> Any:
    """The model with the source's own dtype policy, by which Keras 3 scales the loss of float16.

    Keras gives a new model the policy of the moment, whatever its layers have.
    """
    if framework_of(source) == "keras":
        result.dtype_policy = source.dtype_policy
    return result


def _class_of(source: Any, base: Any) -> Any:
    """The class of a model if it is made like ``base``; else ``base``."""
    kind = type(source)
    own = list(itertools.takewhile(lambda cls: not is_of_framework(cls), kind.__mro__))
    return kind if own and not any("__init__" in vars(cls) for cls in own) else base


def copy_trainable(source: Any, target: Any, partner: Callable[[Any], Any] | None = None) -> None:
    """Trainable flags, outermost first: setting one on a model sets it on all its layers.

    Args:
        source, target: models or layers.
        partner: from a layer to the one in its place, or ``None`` if there is none. By default the
            models have the same layers in the same order.
    """
    if source.trainable != target.trainable:
        target.trainable = source.trainable
    if not is_model(source):
        return
    if partner is None:
        pairs = list(zip(source.layers, target.layers, strict=True))
    else:
        pairs = [(old, partner(old)) for old in source.layers]
    for old, new in pairs:
        if new is not None:
            copy_trainable(old, new, partner)
