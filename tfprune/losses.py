"""The loss that fits a classifier, read off its last layer and its labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfprune.errors import ArgumentError
from tfprune.graph.trace import framework_module, framework_of

_ADVICE = "Give the loss explicitly, such as loss=keras.losses.MeanSquaredError()."


def classification_loss(keras: Any, model: Any, label_shape: tuple[int | None, ...] | None) -> Any:
    """Cross-entropy from logits or from probabilities, for integer or one-hot labels.

    Args:
        keras: the module that the model belongs to.
        model: one output, ending in a softmax, in a sigmoid of one unit, or linearly.
        label_shape: of a batch of labels.

    Returns:
        A loss object of ``keras``.

    Raises:
        ArgumentError: the model does not tell, or several losses are possible.
    """
    shape = getattr(model, "output_shape", None)
    if not isinstance(shape, tuple) or label_shape is None:
        raise ArgumentError(f"The model has not one output with one kind of label. {_ADVICE}")
    activation = final_activation(model)
    if shape[-1] == 1:
        if activation != "sigmoid":
            raise ArgumentError(
                f"The model ends in one unit with activation {activation!r}; it may be a "
                f"regression. {_ADVICE}"
            )
        return keras.losses.BinaryCrossentropy()
    if activation not in ("softmax", "linear"):
        raise ArgumentError(
            f"The model ends in activation {activation!r}, and a classifier was expected to end "
            f"in a softmax or linearly, in logits. {_ADVICE}"
        )
    one_hot = len(label_shape) == len(shape) and label_shape[-1] == shape[-1]
    kind = (
        keras.losses.CategoricalCrossentropy
        if one_hot
        else (keras.losses.SparseCategoricalCrossentropy)
    )
    return kind(from_logits=activation == "linear")


def final_activation(model: Any) -> str | None:
    """The name of the activation that makes the model's output; ``None`` if it is not clear."""
    operations = getattr(model, "operations", None) or model.layers
    last = operations[-1]
    if hasattr(last, "layers"):
        return final_activation(last)
    # Wrappers of one layer: their output is the layer's.
    last = getattr(last, "layer", last)
    if type(last).__name__ in ("Softmax", "Sigmoid"):
        return type(last).__name__.lower()
    if not hasattr(last, "activation"):
        return None
    return getattr(last.activation, "__name__", None)


def resolve_loss(model: Any, loss: Any, labels: Any) -> Any:
    """A function of (labels, outputs): ``loss``, or the one that model and labels suggest.

    Args:
        model: of Keras 3 or tf_keras.
        loss: a Keras loss, its name, a function, or ``None``.
        labels: a batch of labels, shape ``(batch,)``, ``(batch, 1)`` or ``(batch, classes)``.

    Raises:
        ArgumentError: ``loss`` is ``None`` and cannot be inferred.
    """
    keras = framework_module(framework_of(model) or "keras")
    if loss is not None:
        return keras.losses.get(loss) if isinstance(loss, str) else loss
    several = isinstance(labels, dict | list | tuple)
    return classification_loss(keras, model, None if several else np.shape(labels))
