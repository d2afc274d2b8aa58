r"""Products with the Hessian of the loss, and linear equations solved with them alone.

A product :math:`H v` is the derivative of the gradient along v: forward mode over reverse mode,
for two to three times the work of a gradient, without the matrix. :math:`(H + \lambda I) x = b` is
solved by conjugate gradients (Hestenes and Stiefel, 1952), which need products only. Away from a
minimum H is indefinite: a direction of negative curvature ends the iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.batches import iterate
from tfprune.criteria.gates import (
    PerExample,
    gated_calls,
    readings_of,
    require_tensorflow,
)
from tfprune.criteria.scores import Vector
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph, ChannelGroup
from tfprune.graph.evaluate import evaluate, flatten
from tfprune.graph.trace import raw_variable

# Relative residual at which conjugate gradients stop.
_RESIDUAL = 1e-3


def response_of_parameters(
    graph: ChannelGraph,
    data: Any,
    train: Any,
    loss: Any,
    *,
    batches: int | None,
    batch_size: int,
    damping: float,
    iterations: int,
    residual: float = _RESIDUAL,
) -> dict[str, Vector]:
    r"""What the validation loss gains when the parameters follow a gate, to first order.

    :math:`\partial / \partial m_c \, (s^\top \nabla_\theta L_\mathrm{train})` with
    :math:`s = (H + \lambda I)^{-1} \nabla_\theta L_\mathrm{val}`, over the trainable parameters
    that do not scale a channel of c's group; see :mod:`tfprune.criteria.influence`.

    Args:
        graph: the analysed model.
        data, train: labelled data for the validation and for the training loss.
        loss, batches, batch_size: as for :func:`tfprune.criteria.gates.phi`, for either data.
        damping: :math:`\lambda`.
        iterations: at most so many steps of conjugate gradients.
        residual: relative, at which they stop before.

    Returns:
        Group name -> float64 array, shape ``(width,)``, for every prunable group.

    Raises:
        ArgumentError: another backend than TensorFlow, a loss without a value per example, or
            channels that are read inside a layer, where no gate can be set.
        DataError: no labels, or no examples.
    """
    require_tensorflow(graph, "Hessian products")
    _, inside = readings_of(graph)
    if inside:
        name, members = next(iter(inside.items()))
        raise ArgumentError(
            "Expected channels that are read at the inputs of layers, with mode='koh_liang'. "
            f"Received: group {name!r}, which {members[0]} reads inside its layer. Use another "
            "mode."
        )
    curvature = Curvature(graph, train, loss, batches=batches, batch_size=batch_size)
    target = Curvature(graph, data, loss, batches=batches, batch_size=batch_size).gradient()
    result: dict[str, Vector] = {}
    for group in graph.prunable:
        free = _free(group, curvature.variables)

        def product(v: Vector, free: Vector = free) -> Vector:
            return free * curvature.product(v) + damping * v

        solution = conjugate_gradients(
            product, free * target, iterations=iterations, residual=residual
        )
        result[group.name] = curvature.by_gates(solution, group.name)
    return result


def _free(group: ChannelGroup, variables: Sequence[Any]) -> Vector:
    """1 for parameters that may move, 0 for those that make, scale or read the group's channels."""
    masks = {id(v): np.ones(tuple(v.shape)) for v in variables}
    for member in group.members:
        if id(member.variable) in masks:
            index: list[Any] = [slice(None)] * len(member.variable.shape)
            index[member.axis] = member.positions
            masks[id(member.variable)][tuple(index)] = 0
    return np.concatenate([masks[id(v)].ravel() for v in variables])


def conjugate_gradients(
    product: Callable[[Vector], Vector], target: Vector, *, iterations: int, residual: float
) -> Vector:
    """An approximate solution of ``A x = target``, from ``x = 0``.

    Args:
        product: from v to A v, for a symmetric A.
        target: shape ``(n,)``.
        iterations: at most so many.
        residual: stop once the residual's norm is that part of the target's.

    Returns:
        The iterate before a direction of negative or no curvature, if there is one: that still
        lowers the quadratic form. Where the first direction is one, zeros.
    """
    x = np.zeros_like(target)
    rest = target.copy()
    direction = rest.copy()
    square = float(rest @ rest)
    goal = residual**2 * square
    for _ in range(iterations):
        if square <= goal:
            break
        image = product(direction)
        bend = float(direction @ image)
        if not bend > 0:
            break
        step = square / bend
        x += step * direction
        rest -= step * image
        before, square = square, float(rest @ rest)
        direction = rest + square / before * direction
    return x


class Curvature:
    """Derivatives of the mean loss over some data, with respect to the trainable parameters.

    Attributes:
        variables: the trainable variables; vectors are their values one after the other, flattened.

    Args:
        graph: the analysed model; it stays as it is, and runs in inference mode.
        data, loss, batches, batch_size: as for :func:`tfprune.criteria.gates.phi`. The data are
            read once and held, as every product needs all of them.

    Raises:
        ArgumentError, DataError: as :func:`tfprune.criteria.gates.phi`.
    """

    def __init__(
        self, graph: ChannelGraph, data: Any, loss: Any, *, batches: int | None, batch_size: int
    ) -> None:
        shape = getattr(graph.model, "input_shape", None)
        self._data = [
            ([np.asarray(part) for part in flatten(x)], y)
            for x, y in iterate(
                data, batch_size=batch_size, limit=batches, labels=True, input_shape=shape
            )
        ]
        self.variables = list(graph.model.trainable_variables)
        self._raw = [raw_variable(v) if graph.framework == "keras" else v for v in self.variables]
        self._graph = graph
        self._objective = PerExample(graph, loss, self._data[0][1])
        self._readings, _ = readings_of(graph)
        self._compiled: dict[str, Any] = {}

    def gradient(self) -> Vector:
        """The gradient, shape ``(parameters,)``."""
        import tensorflow as tf

        def make() -> Any:
            def function(inputs: Any, labels: Any) -> Any:
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(self._raw)
                    loss = self._loss(inputs, labels)
                return _dense(tape.gradient(loss, self._raw, unconnected_gradients="zero"))

            return function

        return self._sum("gradient", make)

    def product(self, vector: Vector) -> Vector:
        """The Hessian times a vector, shape ``(parameters,)``."""
        import tensorflow as tf

        def make() -> Any:
            def function(inputs: Any, labels: Any, tangents: Any) -> Any:
                with tf.autodiff.ForwardAccumulator(self._raw, tangents) as forward:
                    with tf.GradientTape(watch_accessed_variables=False) as tape:
                        tape.watch(self._raw)
                        loss = self._loss(inputs, labels)
                    gradient = _dense(tape.gradient(loss, self._raw, unconnected_gradients="zero"))
                return [
                    tf.convert_to_tensor(part)
                    for part in forward.jvp(gradient, unconnected_gradients="zero")
                ]

            return function

        return self._sum("product", make, self._split(vector))

    def by_gates(self, vector: Vector, name: str) -> Vector:
        """The gates' gradient of the gradient's scalar product with a vector, shape ``(width,)``.

        Args:
            vector: shape ``(parameters,)``, held constant.
            name: of the group whose gates they are.
        """
        import tensorflow as tf

        def make() -> Any:
            readings = [reading for reading in self._readings if name in reading.groups]

            def function(inputs: Any, labels: Any, tangents: Any) -> Any:
                names = {other for reading in readings for other in reading.groups}
                gates = {other: tf.ones((1, self._graph[other].width)) for other in names}
                with tf.GradientTape(watch_accessed_variables=False) as outer:
                    outer.watch(gates[name])
                    with tf.GradientTape(watch_accessed_variables=False) as tape:
                        tape.watch(self._raw)
                        loss = self._loss(inputs, labels, gated_calls(readings, gates))
                    gradient = _dense(tape.gradient(loss, self._raw, unconnected_gradients="zero"))
                    along = tf.add_n(
                        [tf.reduce_sum(a * b) for a, b in zip(gradient, tangents, strict=True)]
                    )
                return [outer.gradient(along, gates[name], unconnected_gradients="zero")]

            return function

        return self._sum(f"gates of {name}", make, self._split(vector))

    def _loss(self, inputs: Any, labels: Any, override: Any = None) -> Any:
        import tensorflow as tf

        outputs = evaluate(self._graph, inputs, override=override)
        return tf.reduce_sum(self._objective(labels, outputs))

    def _split(self, vector: Vector) -> list[Any]:
        import tensorflow as tf

        sizes = [int(np.prod(v.shape)) for v in self._raw]
        parts = np.split(vector, np.cumsum(sizes)[:-1])
        return [
            tf.constant(part.reshape(tuple(v.shape)), v.dtype)
            for part, v in zip(parts, self._raw, strict=True)
        ]

    def _sum(self, key: str, make: Callable[[], Any], *extra: Any) -> Vector:
        """The mean over all examples of what a function, made and compiled once, gives."""
        import tensorflow as tf

        if key not in self._compiled:
            self._compiled[key] = tf.function(make(), autograph=False)
        total: NDArray[np.float64] | float = 0.0
        examples = 0
        for inputs, labels in self._data:
            tensors = tf.nest.map_structure(tf.convert_to_tensor, (inputs, labels))
            parts = self._compiled[key](*tensors, *extra)
            total = total + np.concatenate([np.asarray(p, np.float64).ravel() for p in parts])
            examples += len(inputs[0])
        return np.asarray(total / examples)


def _dense(gradients: Sequence[Any]) -> list[Any]:
    """Those of embeddings come as slices."""
    import tensorflow as tf

    return [tf.convert_to_tensor(gradient) for gradient in gradients]
