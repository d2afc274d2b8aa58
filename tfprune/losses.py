"""The loss that a classifier's outputs and labels suggest."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfprune.errors import ArgumentError
from tfprune.graph.trace import framework_module, framework_of


def resolve_loss(model: Any, loss: Any, labels: Any) -> Any:
    """A function of (labels, outputs) that returns the loss per example.

    Args:
        model: a classifier of Keras 3 or tf_keras with one output.
        loss: a Keras loss, its name, a function, or ``None``: cross-entropy, from logits unless
            the model ends in softmax or sigmoid; sparse for integer labels, categorical for
            one-hot ones, binary for a single output.
        labels: a batch of labels, shape ``(batch,)``, ``(batch, 1)`` or ``(batch, classes)``.

    Raises:
        ArgumentError: several outputs, or labels that suggest no loss.
    """
    framework = framework_of(model) or "keras"
    keras = framework_module(framework)
    if loss is not None:
        return keras.losses.get(loss) if isinstance(loss, str) else loss
    if isinstance(labels, dict | list | tuple) or len(model.outputs) != 1:
        raise ArgumentError(
            "Expected a loss for a model with several outputs. Received: none. "
            "Pass loss=, a function of (labels, outputs)."
        )
    labels = np.asarray(labels)
    width = model.outputs[0].shape[-1]
    ending = last_activation(model)
    logits = ending not in ("softmax", "sigmoid")
    if width == 1:
        return keras.losses.BinaryCrossentropy(from_logits=logits)
    if labels.dtype.kind in "iub" and (labels.ndim == 1 or labels.shape[-1] == 1):
        return keras.losses.SparseCategoricalCrossentropy(from_logits=logits)
    if labels.ndim == 2 and labels.shape[-1] == width:
        return keras.losses.CategoricalCrossentropy(from_logits=logits)
    raise ArgumentError(
        f"Expected class numbers or one-hot labels for {width} classes. Received: labels of shape "
        f"{labels.shape} and type {labels.dtype}. Pass loss=, a Keras loss or a function of "
        "(labels, outputs)."
    )


def last_activation(model: Any) -> str:
    """Name of the activation that the model ends with, such as ``"softmax"``; else ``""``."""
    layer = model.layers[-1]
    while hasattr(layer, "layers") and layer.layers:
        layer = layer.layers[-1]
    name = type(layer).__name__.lower()
    if name in ("softmax", "sigmoid"):
        return name
    activation = getattr(layer, "activation", None)
    return getattr(activation, "__name__", "") if activation is not None else ""
