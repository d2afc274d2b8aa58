"""Which weights of which layers are pruned: kernels, that is, and what stands in for them.

tfmot keeps a registry of Keras 2 classes; this is its counterpart for Keras 3, with the layers that
Keras added since. As in tfmot, depthwise kernels, biases and normalisation are never pruned: they
are few, and the network is sensitive to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras

from tfprune.errors import ModelError
from tfprune.graph.trace import all_layers, framework_of, is_model

_layers = keras.layers

KERNELS: dict[type, tuple[str, ...]] = {
    _layers.Conv1D: ("kernel",),
    _layers.Conv2D: ("kernel",),
    _layers.Conv3D: ("kernel",),
    _layers.Conv1DTranspose: ("kernel",),
    _layers.Conv2DTranspose: ("kernel",),
    _layers.Conv3DTranspose: ("kernel",),
    _layers.SeparableConv1D: ("pointwise_kernel",),
    _layers.SeparableConv2D: ("pointwise_kernel",),
    _layers.Dense: ("kernel",),
    _layers.EinsumDense: ("kernel",),
    _layers.Embedding: ("embeddings",),
    _layers.SimpleRNNCell: ("kernel", "recurrent_kernel"),
    _layers.LSTMCell: ("kernel", "recurrent_kernel"),
    _layers.GRUCell: ("kernel", "recurrent_kernel"),
    # The cell of ConvLSTM1D, 2D and 3D has no public name.
    type(_layers.ConvLSTM2D(1, 1).cell): ("kernel", "recurrent_kernel"),
}
"""Layer class -> the attributes that hold its prunable weights."""

DENSE_ONLY: dict[type, str] = {
    _layers.DepthwiseConv1D: "one small kernel per channel",
    _layers.DepthwiseConv2D: "one small kernel per channel",
    _layers.BatchNormalization: "normalisation",
    _layers.LayerNormalization: "normalisation",
    _layers.GroupNormalization: "normalisation",
    _layers.RMSNormalization: "normalisation",
    _layers.Normalization: "statistics of the data",
    _layers.STFTSpectrogram: "a fixed transform",
    _layers.PReLU: "one slope per channel",
    _layers.Attention: "one scale",
    _layers.AdditiveAttention: "one scale per feature",
}
"""Layers with weights that stay dense, and why."""

OPAQUE: tuple[type, ...] = (
    _layers.JaxLayer,
    _layers.FlaxLayer,
    _layers.TorchModuleWrapper,
    _layers.TFSMLayer,
)
"""Layers of foreign code."""

_BASES = (_layers.Layer, _layers.Wrapper, keras.Operation)


@dataclass(frozen=True)
class Prunable:
    """A weight that masks apply to.

    Attributes:
        name: inside its layer, such as ``"kernel"`` or ``"query/kernel"``.
        variable: the live Keras variable.
    """

    name: str
    variable: Any


def is_wrapper(layer: Any) -> bool:
    """Whether ``layer`` is a pruning wrapper."""
    return bool(getattr(layer, "is_pruning_wrapper", False))


def wrappers_of(model: Any) -> list[Any]:
    """Every pruning wrapper in a model, those in nested models and inside other layers too."""
    return [layer for layer in all_layers(model) if is_wrapper(layer)]


def may_be_pruned(layer: Any) -> bool:
    """Whether a layer, built or not, has weights that masks apply to, as far as can be told.

    Of an unbuilt layer with a ``build`` of its own it cannot: the wrapper then sees when it is
    built.
    """
    return any(
        hasattr(leaf, "get_prunable_weights")
        or _kernel_names(leaf)
        or (not leaf.built and not _is_of_keras(leaf))
        for leaf in _leaves(layer)
    )


def prunable_of(layer: Any, path: str | None = None) -> list[Prunable]:
    """The weights of a built layer that masks apply to, in a fixed order.

    A layer that has other layers inside (attention, recurrence, ``Bidirectional``, a custom block)
    is walked; one that has weights of its own and is not of ``keras.layers`` must say which of
    them can be pruned, with a method ``get_prunable_weights``.

    Args:
        layer: a Keras 3 layer, no pruning wrapper.
        path: of the layer, for messages.

    Raises:
        ModelError: an unknown layer; weights that are computed (low-rank adapters, quantised
            kernels) and so cannot be masked.
    """
    path = path or layer.name
    found: list[tuple[str, Any]] = []
    for leaf in _leaves(layer):
        place = path if leaf is layer else f"{path}/{leaf.name}"
        _require_known(leaf, place)
        for name, value in _kernels(leaf):
            _require_variable(value, name, leaf, place)
            found.append((name if leaf is layer else f"{leaf.name}/{name}", value))
    order = {id(variable): number for number, variable in enumerate(layer.weights)}
    found.sort(key=lambda item: order[id(item[1])])
    return [Prunable(name, value) for name, value in _distinct(found)]


def _leaves(layer: Any) -> Iterator[Any]:
    """The layer and those inside it, but not those inside a layer that answers for itself."""
    answered: set[int] = set()
    for inner in [layer, *all_layers(layer)]:
        if id(inner) in answered:
            continue
        yield inner
        if hasattr(inner, "get_prunable_weights") or isinstance(inner, (*KERNELS, *DENSE_ONLY)):
            answered.update(id(covered) for covered in all_layers(inner))


def _kernel_names(layer: Any) -> tuple[str, ...]:
    if isinstance(layer, tuple(DENSE_ONLY)):
        return ()
    return next((names for cls, names in KERNELS.items() if isinstance(layer, cls)), ())


def _kernels(layer: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of the prunable weights of one layer, those of layers inside left out."""
    if hasattr(layer, "get_prunable_weights"):
        for variable in layer.get_prunable_weights():
            yield getattr(variable, "name", "weight"), variable
        return
    for name in _kernel_names(layer):
        yield name, getattr(layer, name)
    reverse = getattr(layer, "reverse_embeddings", None)
    if reverse is not None and _kernel_names(layer):  # ReversibleEmbedding with untied weights
        yield "reverse_embeddings", reverse


def _require_known(layer: Any, path: str) -> None:
    if hasattr(layer, "get_prunable_weights") or is_model(layer):
        return
    if not isinstance(layer, OPAQUE):
        if _is_of_keras(layer):
            return
        inside = {id(variable) for inner in all_layers(layer) for variable in inner.weights}
        if all(id(variable) in inside for variable in layer.weights):
            return
    raise ModelError(
        f"Expected layers of keras.layers, or layers that say what to prune. Received: "
        f"{type(layer).__name__} at {path!r}, which has weights of its own. Give it a method "
        "get_prunable_weights() (as tfprune.PrunableLayer asks for) that returns the list of its "
        "kernels, or [] to leave it dense; or wrap only the other layers: "
        "keras.models.clone_model with a clone_function that calls tfprune.prune_low_magnitude "
        "on those."
    )


def _is_of_keras(layer: Any) -> bool:
    """Whether a layer is one of ``keras.layers``, or descends from one that is not abstract."""
    return any(
        cls.__module__.startswith("keras.") and cls not in _BASES
        for cls in type(layer).__mro__
        if issubclass(cls, keras.Operation)
    )


def _require_variable(value: Any, name: str, layer: Any, path: str) -> None:
    if not isinstance(value, keras.Variable):
        raise ModelError(
            f"Expected {name!r} of {type(layer).__name__} at {path!r} to be a variable. "
            f"Received: {type(value).__name__}, as low-rank adapters have it. Merge the adapter "
            "into the kernel first."
        )
    if not keras.backend.is_float_dtype(value.dtype):
        raise ModelError(
            f"Expected {name!r} of {type(layer).__name__} at {path!r} to hold floats. "
            f"Received: {value.dtype}. Prune before quantising."
        )


def _distinct(found: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Without repetitions of a variable, and with a number behind names that repeat."""
    result: dict[str, Any] = {}
    for name, value in found:
        if any(value is known for known in result.values()):
            continue
        unique, number = name, 1
        while unique in result:
            unique, number = f"{name}_{number}", number + 1
        result[unique] = value
    return list(result.items())


def walk(model: Any) -> Iterator[tuple[str, Any]]:
    """Path and layer of every layer of a model, nested models walked in place.

    Pruning wrappers come as they are, under the path of the layer that they wrap. A layer that
    stands in several places comes once, under its first path.
    """
    seen: set[int] = set()

    def walked(model: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for layer in model.layers:
            if is_model(layer):
                yield from walked(layer, f"{prefix}{layer.name}/")
            elif id(layer) not in seen:
                seen.add(id(layer))
                yield f"{prefix}{(layer.layer if is_wrapper(layer) else layer).name}", layer

    yield from walked(model, "")


def prunable_weights(model: Any) -> dict[str, Any]:
    """Every weight of a built model that masks apply to.

    Args:
        model: a Keras 3 functional or sequential model, with or without pruning wrappers.

    Returns:
        Path -> live ``keras.Variable``, in the order of the model's layers. A path is the names of
        the nested models, of the layer and of the weight: ``"block/conv1/kernel"``. Wrappers do
        not show in it.

    Raises:
        ModelError: an unknown layer, or a model that is not built.
    """
    require_built(model)
    return {
        f"{path}/{weight.name}": weight.variable
        for path, layer in walk(model)
        for weight in prunable_of(layer.layer if is_wrapper(layer) else layer, path)
    }


def require_built(model: Any) -> None:
    """Refuses what is no Keras 3 model, and models whose weights do not exist yet.

    Raises:
        ModelError: with what to do.
    """
    if framework_of(model) != "keras" or not is_model(model):
        raise ModelError(
            f"Expected a Keras 3 model. Received: {type(model).__name__}. "
            "For tf_keras models use tensorflow_model_optimization itself."
        )
    if not model.built:
        raise ModelError(
            f"Expected a built model. Received: {model.name!r}, which does not know its input "
            "shape. Call model.build(input_shape), or put a keras.Input first."
        )
