"""Keras 3 and tf_keras models behind what both have in common."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.errors import ArgumentError, ModelError

InputShape = Sequence[int] | Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class InputPort:
    """One input of a model.

    Attributes:
        name: Its stable name.
        shape: Its static shape, the batch size first.
        dtype: Such as ``"float32"``.
        aliases: What data may call it as well: its name in Keras, its key in a dictionary.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class KerasModel:
    """A model of either Keras with flat, named, static inputs and flat, named outputs.

    Attributes:
        model: The model itself, untouched.
        inputs: In the order of ``model.inputs``.
        output_names: In the order of ``model.outputs``.
    """

    model: Any
    inputs: tuple[InputPort, ...]
    output_names: tuple[str, ...]

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Calls the model for inference on one tensor per input, and returns one per output."""
        import keras

        structure = _structure(self.model, "input")
        packed = inputs[0] if len(inputs) == 1 and structure is None else list(inputs)
        if structure is not None:
            packed = keras.tree.pack_sequence_as(structure, list(inputs))
        return list(keras.tree.flatten(self.model(packed, training=False)))

    def variables(self) -> list[Any]:
        """The model's variables as ``tf.Variable`` objects."""
        return [
            getattr(v, "value", v) if is_keras3(self.model) else v for v in self.model.variables
        ]


def is_keras3(model: Any) -> bool:
    """Whether ``model`` is a Keras 3 model; does not import Keras for the question."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(model, keras.Model)


def is_tf_keras(model: Any) -> bool:
    """Whether ``model`` is a tf_keras model; does not import tf_keras for the question."""
    tf_keras = sys.modules.get("tf_keras")
    return tf_keras is not None and isinstance(model, tf_keras.Model)


def keras_model(
    model: Any, *, batch_size: int = 1, input_shape: InputShape | None = None
) -> KerasModel:
    """Looks at a model and makes its inputs static and its names stable.

    An input or output that carries a name which Keras numbered by itself (``keras_tensor_12``,
    ``dense_3``) would be called differently in the next process; it becomes ``input`` or
    ``output``, with ``_0``, ``_1``, ... where there are several.

    Args:
        model: A built functional or sequential model of Keras 3 or tf_keras.
        batch_size: The batch size of the static inputs.
        input_shape: For a model with inputs of open size, their shapes without the batch size: one
            shape for a single input, otherwise a mapping from input names.

    Raises:
        ModelError: Not a functional or sequential model, not built, not on the TensorFlow backend,
            not in float32, or with weights that are not finite.
        ArgumentError: A wrong batch size or input shape, or an input of open size without one.
    """
    _check_kind(model)
    _check_numbers(model)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ArgumentError(f"Expected a batch_size of 1 or more. Received: {batch_size!r}.")
    tensors = list(model.inputs)
    names = _stable_names(_input_names(model), "input")
    shapes = _static_shapes(names, [tuple(t.shape) for t in tensors], batch_size, input_shape)
    ports = tuple(
        InputPort(name, shape, _dtype_name(tensor.dtype), aliases)
        for name, shape, tensor, aliases in zip(
            names, shapes, tensors, _aliases(model), strict=True
        )
    )
    return KerasModel(model, ports, tuple(_stable_names(_output_names(model), "output")))


def _check_kind(model: Any) -> None:
    if not (is_keras3(model) or is_tf_keras(model)):
        raise ModelError(
            "Expected a Keras 3 or tf_keras model. "
            f"Received an object of type {type(model).__module__}.{type(model).__qualname__}."
        )
    if is_keras3(model):
        import keras

        if keras.backend.backend() != "tensorflow":
            raise ModelError(
                "Expected a model on the TensorFlow backend, which the LiteRT converter reads. "
                f"Received one on {keras.backend.backend()!r}. Save it, set KERAS_BACKEND to "
                "tensorflow in a new process, and load it there."
            )
    name = getattr(model, "name", "?")
    try:
        built = bool(model.built and model.inputs and model.outputs)
    except (AttributeError, ValueError):
        built = False
    if built:
        return
    if type(model).__name__ == "Sequential":
        raise ModelError(
            f"Expected a model with known inputs. {name!r} has not been built. "
            "Begin it with keras.Input(shape) or call model.build((None, *shape))."
        )
    raise ModelError(
        f"Expected a functional or sequential model. Received {name!r} of the subclass "
        f"{type(model).__qualname__}. Wrap it: x = keras.Input(shape); keras.Model(x, model(x))."
    )


def _check_numbers(model: Any) -> None:
    for variable in model.weights:
        path = getattr(variable, "path", None) or variable.name
        dtype = _dtype_name(variable.dtype)
        if dtype not in ("float32", "float16", "bfloat16", "float64"):
            continue
        values = np.asarray(variable.numpy(), dtype=np.float32)
        wrong = values.size - int(np.isfinite(values).sum())
        if wrong:
            raise ModelError(
                f"Expected finite weights. {path!r} has {wrong} of {values.size} values that are "
                "NaN or infinite. Load an earlier checkpoint; training has diverged."
            )
    for layer in _all_layers(model):
        policy = getattr(layer, "dtype_policy", None)
        compute = getattr(policy, "compute_dtype", None) or getattr(layer, "compute_dtype", None)
        if compute in ("float16", "bfloat16", "float64"):
            raise ModelError(
                f"Expected layers that compute in float32, the type of LiteRT's kernels. "
                f"{layer.name!r} computes in {compute}. Rebuild the model after "
                "keras.config.set_dtype_policy('float32') and load these weights into it; "
                "quantize='float16' halves the file without that."
            )


def _all_layers(model: Any) -> Iterator[Any]:
    for layer in model.layers:
        yield layer
        if hasattr(layer, "layers"):
            yield from _all_layers(layer)


def _input_names(model: Any) -> list[str | None]:
    """The names of the input layers, unless Keras numbered them."""
    if is_tf_keras(model):
        names = [str(name) for name in model.input_names]
        automatic = r"input(_\d+)?|.+_input"
    else:
        names = [str(tensor.name) for tensor in model.inputs]
        automatic = r"(keras_tensor|input_layer)(_\d+)?(CLONE)?"
    return [None if re.fullmatch(automatic, name) else name for name in names]


def _aliases(model: Any) -> list[tuple[str, ...]]:
    import keras

    tensors = list(model.inputs)
    names = model.input_names if is_tf_keras(model) else [tensor.name for tensor in tensors]
    structure = _structure(model, "input")
    if not isinstance(structure, Mapping):
        return [(str(name),) for name in names]
    paths = [path for path, _ in keras.tree.flatten_with_path(structure)]
    return [(str(n), "_".join(map(str, p))) for n, p in zip(names, paths, strict=True)]


def _output_names(model: Any) -> list[str | None]:
    """Keys of a dictionary of outputs, otherwise names of layers unless Keras numbered them."""
    import keras

    structure = _structure(model, "output")
    if isinstance(structure, Mapping):
        paths = keras.tree.flatten_with_path(structure)
        return ["_".join(str(part) for part in path) for path, _ in paths]
    names = getattr(model, "output_names", None)
    if not names:
        names = [model.layers[-1].name]
    layers = {layer.name: layer for layer in model.layers}
    if is_tf_keras(model):  # it numbers the outputs that come from one layer
        names = [n if n in layers else re.sub(r"_\d+$", "", n) for n in names]
    # an operation such as `a + b` is no layer, and only Keras names it
    return [_given_name(layers[name]) if name in layers else None for name in names]


def _given_name(layer: Any) -> str | None:
    words = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", type(layer).__name__)
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()
    return None if re.fullmatch(rf"{re.escape(words)}(_\d+)?", layer.name) else str(layer.name)


def _stable_names(given: Sequence[str | None], word: str) -> list[str]:
    """Fills the gaps with numbered words and makes every name an identifier of its own."""
    names: list[str] = []
    for index, name in enumerate(given):
        plain = word if len(given) == 1 else f"{word}_{index}"
        wanted = re.sub(r"\W", "_", name) if name else plain
        if wanted[0].isdigit():
            wanted = f"{word}_{wanted}"
        taken, number = wanted, 0
        while taken in names:
            number += 1
            taken = f"{wanted}_{number}"
        names.append(taken)
    return names


def _static_shapes(
    names: Sequence[str],
    shapes: Sequence[tuple[int | None, ...]],
    batch_size: int,
    input_shape: InputShape | None,
) -> list[tuple[int, ...]]:
    wanted: dict[str, Sequence[int]] = {}
    if isinstance(input_shape, Mapping):
        wanted = dict(input_shape)
    elif input_shape is not None:
        if len(names) > 1:
            raise ArgumentError(
                f"Expected input_shape to be a mapping from the inputs {list(names)} to shapes. "
                f"Received: {input_shape!r}."
            )
        wanted = {names[0]: input_shape}
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise ArgumentError(
            f"Expected names among {list(names)} in input_shape. Received: {unknown}."
        )

    static: list[tuple[int, ...]] = []
    for name, shape in zip(names, shapes, strict=True):
        inner = shape[1:]
        chosen = tuple(wanted.get(name, inner))
        fits = len(chosen) == len(inner) and all(
            have is None or have == want for have, want in zip(inner, chosen, strict=True)
        )
        if not fits:
            raise ArgumentError(
                f"Expected input_shape of {name!r} to agree with the model's {inner}. "
                f"Received: {chosen}."
            )
        if any(not isinstance(size, int) or size < 1 for size in chosen):
            raise ArgumentError(
                f"Expected a fixed size for every axis of {name!r}, because GPU delegates refuse "
                f"open ones. The model leaves {inner} open. Pass input_shape, for example "
                f"input_shape={tuple(size or 224 for size in inner)}."
            )
        if shape[0] not in (None, batch_size):
            raise ArgumentError(
                f"Expected batch_size={shape[0]}, which the model fixes for {name!r}. "
                f"Received: {batch_size}."
            )
        static.append((batch_size, *(int(size or 0) for size in chosen)))
    return static


def _structure(model: Any, side: str) -> Any:
    """The nesting of a functional model's inputs or outputs; None where it is a plain tensor."""
    import keras

    try:
        structure = getattr(model, side)
    except (AttributeError, ValueError):  # a sequential model has only plain ones
        return None
    return structure if keras.tree.is_nested(structure) else None


def _dtype_name(dtype: Any) -> str:
    return str(getattr(dtype, "name", dtype))
