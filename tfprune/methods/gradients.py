"""Gradients of a loss in a model's weights, and products with its second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from tfprune.graph.trace import raw_variable
from tfprune.losses import resolve_loss

Objective = Callable[[Any, Any], Any]
Batches = Iterable[tuple[Any, Any]]


def objective_of(
    model: Any, loss: Any, batches: Iterator[tuple[Any, Any]]
) -> tuple[Objective, Iterator[tuple[Any, Any]]]:
    """The loss for a model and its data, and the batches, of which the first was looked at.

    Raises:
        ArgumentError: ``loss`` is ``None`` and cannot be inferred.
        DataError: what reading the first batch raises.
    """
    first = next(batches)
    return resolve_loss(model, loss, first[1]), chain([first], batches)


def mean_gradient(
    model: Any, variables: Sequence[Any], batches: Batches, objective: Objective, training: bool
) -> list[Any]:
    """The gradient of the mean loss over all examples.

    Args:
        model: of Keras 3 on TensorFlow.
        variables: Keras variables of it.
        batches: pairs (x, y).
        objective: from (labels, outputs) to losses; their mean is the batch's loss.
        training: the mode in which the model is called.

    Returns:
        One float64 array per variable. Every batch counts by its number of examples, so that in
        inference mode the result does not depend on how the data are cut.
    """
    import tensorflow as tf

    raw = [raw_variable(variable) for variable in variables]

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator,unused-ignore]
    def gradient(x: Any, y: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(raw)
            loss = tf.reduce_mean(objective(y, model(x, training=training)))
        return _dense(tape.gradient(loss, raw, unconnected_gradients="zero"))

    return _mean(gradient, batches)


def hessian_product(
    model: Any,
    variables: Sequence[Any],
    batches: Batches,
    objective: Objective,
    training: bool,
    vector: Sequence[Any],
) -> list[Any]:
    """The Hessian of the mean loss times a vector, without forming the Hessian.

    It is the gradient of the scalar product of the gradient with the vector, which is held
    constant (two nested tapes).

    Args:
        vector: one array per variable.

    The other arguments and the result are as for :func:`mean_gradient`.
    """
    import tensorflow as tf

    raw = [raw_variable(variable) for variable in variables]
    constants = [
        tf.constant(part, variable.dtype) for part, variable in zip(vector, raw, strict=True)
    ]

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator,unused-ignore]
    def product(x: Any, y: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as outer:
            outer.watch(raw)
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(raw)
                loss = tf.reduce_mean(objective(y, model(x, training=training)))
            gradient = _dense(inner.gradient(loss, raw, unconnected_gradients="zero"))
            along = tf.add_n(
                [
                    tf.reduce_sum(part * constant)
                    for part, constant in zip(gradient, constants, strict=True)
                ]
            )
        return _dense(outer.gradient(along, raw, unconnected_gradients="zero"))

    return _mean(product, batches)


def _dense(gradients: Sequence[Any]) -> list[Any]:
    """Those of embeddings come as slices."""
    import tensorflow as tf

    return [tf.convert_to_tensor(gradient) for gradient in gradients]


def _mean(function: Any, batches: Batches) -> list[Any]:
    import tensorflow as tf

    total: list[Any] = []
    examples = 0
    for x, y in batches:
        size = len(y)
        tensors = tf.nest.map_structure(tf.convert_to_tensor, x), tf.convert_to_tensor(y)
        parts = [np.asarray(part).astype(np.float64) * size for part in function(*tensors)]
        total = parts if not total else [a + b for a, b in zip(total, parts, strict=True)]
        examples += size
    return [part / examples for part in total]
