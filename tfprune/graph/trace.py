"""Reads the graph of a functional model: the only file that touches private Keras attributes.

Keras 3 and tf_keras (Keras 2) record a model alike, as nodes (applications of a layer or
operation to symbolic tensors) sorted by depth. :func:`trace` turns either into the same plain
records, so that nothing else needs to know which framework a model comes from.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tfprune.errors import ModelError


@dataclass(frozen=True)
class Ref:
    """A symbolic tensor inside a traced model.

    Attributes:
        key: identity: (id of the operation, index of the node, index of the output).
        shape: static shape with ``None`` for free axes; the first axis is the batch.
        dtype: name of the element type, such as ``"float32"``.
    """

    key: tuple[int, int, int]
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Call:
    """One application of an operation.

    Attributes:
        op: the live layer, ``keras.ops`` operation or nested model.
        args, kwargs: the call's arguments, with :class:`Ref` in place of symbolic tensors.
        inputs: the symbolic tensors among the arguments, in order.
        outputs: the symbolic tensors that came out, flattened.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]


@dataclass(frozen=True)
class Trace:
    """A functional or sequential model as plain records.

    Attributes:
        model: the live model.
        framework: ``"keras"`` (Keras 3) or ``"tf_keras"`` (Keras 2).
        calls: in an order in which every tensor is made before it is read; input layers left out.
        inputs, outputs: flattened.
        input_structure, output_structure: nested lists and dicts of :class:`Ref` as the model
            takes and returns them.
        input_layers: the input layers, in the order of ``inputs``.
    """

    model: Any
    framework: str
    calls: tuple[Call, ...]
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]
    input_structure: Any
    output_structure: Any
    input_layers: tuple[Any, ...]


def map_leaves(function: Callable[[Any], Any], structure: Any) -> Any:
    """Applies ``function`` to the leaves of nested lists, tuples and dicts."""
    if isinstance(structure, list):
        return [map_leaves(function, item) for item in structure]
    if isinstance(structure, tuple):
        items = [map_leaves(function, item) for item in structure]
        return type(structure)(*items) if hasattr(structure, "_fields") else tuple(items)
    if isinstance(structure, Mapping):
        return {key: map_leaves(function, value) for key, value in structure.items()}
    return function(structure)


def leaves(structure: Any) -> list[Any]:
    """The leaves of nested lists, tuples and dicts, in order (dicts in sorted order of keys)."""
    if isinstance(structure, list | tuple):
        return [leaf for item in structure for leaf in leaves(item)]
    if isinstance(structure, Mapping):
        return [leaf for key in sorted(structure) for leaf in leaves(structure[key])]
    return [structure]


def framework_of(obj: Any) -> str | None:
    """``"keras"``, ``"tf_keras"`` or ``None``: the framework whose class ``obj`` descends from.

    Looks at class names only and imports nothing.
    """
    for cls in type(obj).__mro__:
        if is_of_framework(cls):
            return cls.__module__.partition(".")[0]
    return None


def is_of_framework(cls: type) -> bool:
    """Whether a class is one of Keras 3 or tf_keras itself."""
    return cls.__module__.partition(".")[0] in ("keras", "tf_keras")


def is_model(op: Any) -> bool:
    """Whether ``op`` is a model (functional, sequential or subclassed) of either framework."""
    return any(
        cls.__name__ == "Model" and cls.__module__.partition(".")[0] in ("keras", "tf_keras")
        for cls in type(op).__mro__
    )


def is_sequential(model: Any) -> bool:
    """Whether ``model`` is a ``Sequential``."""
    return any(
        cls.__name__ == "Sequential" and cls.__module__.partition(".")[0] in ("keras", "tf_keras")
        for cls in type(model).__mro__
    )


def all_layers(model: Any) -> list[Any]:
    """Every layer in a model, those inside nested models and wrappers included."""
    return list(model._flatten_layers(include_self=False))


@dataclass(frozen=True)
class AttentionParts:
    """The projections inside an attention layer with heads, and the axes that it attends over."""

    query: Any
    key: Any
    value: Any
    output: Any
    gate: Any
    axes: tuple[int, ...]


def attention_parts(layer: Any) -> AttentionParts:
    """What a built multi-head or grouped-query attention layer of either framework contains."""
    return AttentionParts(
        query=layer._query_dense,
        key=layer._key_dense,
        value=layer._value_dense,
        output=layer._output_dense,
        gate=getattr(layer, "_gate_dense", None),
        axes=tuple(getattr(layer, "_attention_axes", None) or ()),
    )


def lambda_output_shape(layer: Any) -> Any:
    """The output shape that a Lambda layer was given, or ``None``."""
    return layer._output_shape


def constants_of(layer: Any) -> int:
    """How many constants a recurrent layer was called with."""
    return int(getattr(layer, "_num_constants", 0) or 0)


def node_counts(model: Any) -> list[int]:
    """For each layer, how often it was called on symbolic tensors."""
    return [len(getattr(layer, "_inbound_nodes", ())) for layer in model.layers]


def is_compiled(model: Any) -> bool:
    """Whether ``compile`` was called (tf_keras keeps that to itself)."""
    return bool(getattr(model, "compiled", getattr(model, "_is_compiled", False)))


def framework_module(framework: str) -> Any:
    """The imported framework: ``keras`` or ``tf_keras`` (already imported: it made the model)."""
    return sys.modules[framework]


def image_data_format(op: Any) -> str:
    """The user's default data format in the framework of ``op``."""
    framework = framework_module(framework_of(op) or "keras")
    return str(framework.backend.image_data_format())


def functional_of(model: Any) -> Any:
    """The functional graph behind ``model``.

    Raises:
        ModelError: no Keras model; a subclassed model; a sequential model that was never built.
    """
    framework = framework_of(model)
    if framework is None or not is_model(model):
        raise ModelError(
            "Expected a Keras model (functional or sequential, of Keras 3 or tf_keras). "
            f"Received: {type(model).__name__}."
        )
    if is_sequential(model):
        graph = model._functional if framework == "keras" else model
        if graph is None or not hasattr(graph, "_nodes_by_depth"):
            raise ModelError(
                f"Expected a built model. Received: sequential model {model.name!r} that does not "
                "know its input shape. Call model.build(input_shape), or put a keras.Input first."
            )
        return graph
    if not hasattr(model, "_nodes_by_depth"):
        raise ModelError(
            "Expected a functional or sequential model. "
            f"Received: subclassed model {type(model).__name__!r}, whose layers are called from "
            "Python code that cannot be rebuilt. Write it with keras.Input and keras.Model("
            "inputs, outputs): calling the same layers on a keras.Input once is often enough."
        )
    return model


def ends_of(model: Any) -> tuple[Any, Any]:
    """The symbolic inputs and outputs of a functional or sequential model, as it takes them."""
    graph = functional_of(model)
    if is_sequential(model):
        return graph.inputs[0], graph.outputs[0]
    return _structures_of(graph)


def _structures_of(graph: Any) -> tuple[Any, Any]:
    if framework_of(graph) == "keras":
        return graph._inputs_struct, graph._outputs_struct
    return graph._nested_inputs, graph._nested_outputs


def is_plain(model: Any) -> bool:
    """Whether a functional or sequential model is of a class of the framework, not of the user."""
    return is_of_framework(type(model))


def trace(model: Any) -> Trace:
    """Reads the graph of a functional or sequential model.

    Raises:
        ModelError: the model is subclassed, unbuilt or no Keras model.
    """
    framework = framework_of(model) or ""
    graph = functional_of(model)
    keras3 = framework == "keras"
    nodes = [
        node
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
    ]
    refs: dict[int, Ref] = {}

    def ref(tensor: Any) -> Any:
        """Symbolic tensors become refs; everything else stays."""
        history = getattr(tensor, "_keras_history", None)
        if history is None:
            return tensor
        known = refs.get(id(tensor))
        if known is None:
            op = history.operation if keras3 else history.layer
            key = (id(op), int(history.node_index), int(history.tensor_index))
            shape = tuple(None if size is None else int(size) for size in tensor.shape)
            dtype = tensor.dtype if isinstance(tensor.dtype, str) else tensor.dtype.name
            known = refs[id(tensor)] = Ref(key, shape, dtype)
        return known

    calls = []
    for node in nodes:
        if node.is_input:
            continue
        if keras3:
            op, raw_args, raw_kwargs = node.operation, node.arguments.args, node.arguments.kwargs
        else:
            op, raw_args, raw_kwargs = node.layer, node.call_args, node.call_kwargs
        args = tuple(map_leaves(ref, tuple(raw_args)))
        kwargs = map_leaves(ref, dict(raw_kwargs))
        inputs = tuple(leaf for leaf in [*leaves(args), *leaves(kwargs)] if isinstance(leaf, Ref))
        calls.append(Call(op, args, kwargs, inputs, tuple(ref(t) for t in _flat(node.outputs))))

    structures = _structures_of(graph)
    history_op = "operation" if keras3 else "layer"
    return Trace(
        model=model,
        framework=framework,
        calls=tuple(calls),
        inputs=tuple(ref(t) for t in graph.inputs),
        outputs=tuple(ref(t) for t in graph.outputs),
        input_structure=map_leaves(ref, structures[0]),
        output_structure=map_leaves(ref, structures[1]),
        input_layers=tuple(getattr(t._keras_history, history_op) for t in graph.inputs),
    )


def with_shapes(traced: Trace, shapes: Mapping[tuple[int, int, int], tuple[int, ...]]) -> Trace:
    """The same trace with free sizes (but the batch's) replaced by those in ``shapes``."""

    def settle(leaf: Any) -> Any:
        if not isinstance(leaf, Ref) or leaf.key not in shapes:
            return leaf
        return replace(leaf, shape=(leaf.shape[0], *shapes[leaf.key][1:]))

    def all_of(refs: tuple[Ref, ...]) -> tuple[Ref, ...]:
        return tuple(settle(ref) for ref in refs)

    calls = tuple(
        Call(
            call.op,
            map_leaves(settle, call.args),
            map_leaves(settle, call.kwargs),
            all_of(call.inputs),
            all_of(call.outputs),
        )
        for call in traced.calls
    )
    return replace(
        traced,
        calls=calls,
        inputs=all_of(traced.inputs),
        outputs=all_of(traced.outputs),
        input_structure=map_leaves(settle, traced.input_structure),
        output_structure=map_leaves(settle, traced.output_structure),
    )


def _flat(outputs: Any) -> list[Any]:
    return [t for t in leaves(outputs) if hasattr(t, "_keras_history")]


def with_values(variables: Iterable[Any]) -> list[Any]:
    """Without the tables that lookup layers of tf_keras list among their weights."""
    return [variable for variable in variables if hasattr(variable, "shape")]


def symbol_of(op: Any) -> str | None:
    """The canonical TensorFlow name behind a tf_keras ``TFOpLambda``, such as ``"nn.relu"``."""
    return getattr(op, "symbol", None) if framework_of(op) == "tf_keras" else None


def raw_variable(variable: Any) -> Any:
    """The ``tf.Variable`` behind a Keras 3 variable on TensorFlow.

    ``variable.value`` is that too, except under mixed precision, where it is a cast copy.
    """
    return variable._value


def take_call_signature(wrapper: Any, layer: Any) -> None:
    """Lets a Keras 3 wrapper be called with the arguments of its layer, and with ``training``.

    Keras sorts a call's tensors, time masks and options by the names in a layer's signature; with
    ``*args`` and ``**kwargs`` there it refuses calls that have both tensors and options by name.
    """
    signature = inspect.signature(layer.call)
    parameters = list(signature.parameters.values())
    if "training" not in signature.parameters:
        option = inspect.Parameter("training", inspect.Parameter.KEYWORD_ONLY, default=None)
        last = parameters[-1:] if parameters and parameters[-1].kind == option.VAR_KEYWORD else []
        parameters = [*parameters[: len(parameters) - len(last)], option, *last]
    wrapper._call_signature = signature.replace(parameters=parameters)
    wrapper.call_signature_parameters = [parameter.name for parameter in parameters]
    wrapper._call_has_mask_arg = "mask" in wrapper.call_signature_parameters


def in_stateless_scope() -> bool:
    """Whether Keras 3 only derives shapes at the moment: no variable may change."""
    from keras.src.backend.common.stateless_scope import in_stateless_scope as inside

    return bool(inside())


def seed_source(framework: str) -> Any:
    """The generator from which unseeded initialisers of a framework take their seeds.

    It has ``seed``, ``getstate`` and ``setstate``, as the module ``random``, which is what Keras 3
    uses; tf_keras has its own once its ``set_random_seed`` was called.
    """
    if framework == "tf_keras":
        from tf_keras.src import backend

        return getattr(backend._SEED_GENERATOR, "generator", None) or random
    return random


def require_unwrapped(model: Any) -> None:
    """Refuses a model that still has pruning wrappers.

    Raises:
        ModelError: naming one, and the remedy.
    """
    # tfprune's wrapper, or tfmot's
    wrapped = [
        layer.name for layer in all_layers(model) if type(layer).__name__ == "PruneLowMagnitude"
    ]
    if wrapped:
        raise ModelError(
            "Expected a model without pruning wrappers. Received: one with "
            f"{len(wrapped)}, such as {wrapped[0]!r}. Take them off with "
            "tfprune.strip_pruning(model)."
        )
