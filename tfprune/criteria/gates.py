r"""Gradients of every example's loss with respect to gates on the channels.

A gate :math:`m_c = 1` multiplies channel c wherever it is read; at 0 the channel is removed. For
example n and loss :math:`\ell_n`,

.. math:: \phi_{n,c} = \partial \ell_n / \partial m_c.

The first order of what a removal does to the loss is :math:`-\operatorname{mean}_n \phi_{n,c}`, and
:math:`F = \frac 1 N \Phi^\top \Phi` is the empirical Fisher matrix of the gates, which stands for
their Hessian. The influence criterion and collaborative channel pruning are functions of both.

Where a gate stands. Papers put it behind the activation of the layer that makes the channel; in
front of a batch normalisation would be wrong, as its offset revives the channel. Here it stands at
the inputs of the layers that read the channel, as in :mod:`tfprune.criteria.taylor`: that is where
a removed channel is masked, and one gate serves all readers of a residual stream. So what the
members of a group contribute is added up before anything is squared. For a convolution, batch
normalisation and ReLU both places are the same. Normalisations across channels read them without
a weight; as in the Taylor criterion that is not counted.

How. A tensor of ones, one row per example, is multiplied onto what such a layer takes in; one
backward pass through the sum of all losses gives :math:`\phi` for all groups, in inference mode.
Inside some layers (attention heads, states of recurrent cells, layers in wrappers or in a nested
model that is called again) the channels stand in no tensor that can be reached. There the gate
scales the slices of the weights that read them, :math:`\phi_{n,c} = \sum_w w \, \partial \ell_n /
\partial w`, which takes one backward pass per example: slower, but it works for any layer.

Memory: the model's activations for one batch, as in training, and one number per example, channel
and reading layer. A smaller ``batch_size`` takes less. Batches are summed up as they come.

Source: derived (a gate's gradient is a sum over activations times their gradients); the tests
compare with finite differences, and with Taylor's sum over weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tfprune.batches import iterate
from tfprune.criteria.scores import Vector, check_choice, over_other_axes
from tfprune.errors import ArgumentError, DataError, ModelError
from tfprune.graph import ChannelGraph, ChannelGroup, Member
from tfprune.graph.evaluate import Override, evaluate, flatten, run_call
from tfprune.graph.labels import Labels
from tfprune.graph.trace import Call, framework_module, is_model, map_leaves, raw_variable
from tfprune.losses import resolve_loss

Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """Averages of gate gradients over examples.

    Attributes:
        examples: how many there were.
        mean: group name -> mean of phi, shape ``(width,)``.
        second: group name -> the empirical Fisher matrix, mean of phi_c phi_d, shape
            ``(width, width)``; or its diagonal, mean of phi_c^2, shape ``(width,)``.
    """

    examples: int
    mean: Mapping[str, Vector]
    second: Mapping[str, Matrix]


class Remembered:
    """What was last found for a graph, until it is taken or the graph is gone.

    A criterion that scores and then chooses needs the same pass over the data for both.
    """

    def __init__(self) -> None:
        self._found: tuple[weakref.ref[ChannelGraph], Any] | None = None

    def put(self, graph: ChannelGraph, found: Any) -> None:
        """Remembers it for this graph, and forgets everything else."""
        self._found = weakref.ref(graph), found

    def take(self, graph: ChannelGraph) -> Any:
        """What was put for this very graph, and forgets it; else ``None``."""
        found, self._found = self._found, None
        return found[1] if found is not None and found[0]() is graph else None


def phi(
    graph: ChannelGraph,
    data: Any,
    loss: Any = None,
    *,
    batches: int | None = None,
    batch_size: int = 64,
) -> dict[str, Matrix]:
    """The gate gradients of every example at once; see :func:`moments` for averages.

    Args:
        graph: the analysed model.
        data: labelled data, see :func:`tfprune.batches.iterate`.
        loss: a function of (labels, outputs) with one value per example (or per example and
            position: their mean is taken), or a Keras loss or its name; by default cross-entropy
            as the model's last activation and the labels suggest.
        batches: how many batches to use; ``None`` for all.
        batch_size: for arrays.

    Returns:
        Group name -> float64 array, shape ``(examples, width)``, for every prunable group.

    Raises:
        ArgumentError: another backend than TensorFlow, or a loss that has no value per example.
        DataError: no labels, no examples, or gradients that are not finite.
        ModelError: a tensor whose first axis is not the examples'.
    """
    parts = list(gate_gradients(graph, data, loss, batches=batches, batch_size=batch_size))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def moments(
    graph: ChannelGraph,
    data: Any,
    loss: Any = None,
    *,
    batches: int | None = None,
    batch_size: int = 64,
    second: Literal["diagonal", "full"] = "full",
) -> Moments:
    """Averages of the gate gradients, batch after batch; arguments and errors as :func:`phi`.

    Args:
        second: the whole matrix of second moments within each group, or its diagonal.
    """
    check_choice("second", second, ("diagonal", "full"))
    mean = {group.name: np.zeros(group.width) for group in graph.prunable}
    squares: dict[str, Matrix] = {}
    count = 0
    for part in gate_gradients(graph, data, loss, batches=batches, batch_size=batch_size):
        for name, values in part.items():
            mean[name] += values.sum(0)
            product = values.T @ values if second == "full" else (values**2).sum(0)
            squares[name] = squares[name] + product if name in squares else product
        count += len(next(iter(part.values()), ()))
    return Moments(
        count,
        {name: value / max(count, 1) for name, value in mean.items()},
        {name: value / max(count, 1) for name, value in squares.items()},
    )


def gate_gradients(
    graph: ChannelGraph,
    data: Any,
    loss: Any = None,
    *,
    batches: int | None = None,
    batch_size: int = 64,
) -> Iterator[dict[str, Matrix]]:
    """What :func:`phi` returns, batch after batch; arguments and errors are the same."""
    require_tensorflow(graph, "gate gradients")
    shape = getattr(graph.model, "input_shape", None)
    pairs = iterate(data, batch_size=batch_size, limit=batches, labels=True, input_shape=shape)
    readings, inside = readings_of(graph)
    objective: Any = None
    outside: Any = None
    within: Any = None
    size = 0
    for x, y in pairs:
        if objective is None:
            objective = PerExample(graph, loss, y)
            outside = _outside(graph, readings, objective)
            within = _within(graph, inside, objective)
        inputs = [np.asarray(part) for part in flatten(x)]
        count = len(inputs[0])
        # A last, smaller batch is filled up: the model is compiled for one size.
        size = max(size, count)
        rows = np.arange(size) % count
        found = outside([part[rows] for part in inputs], map_leaves(itemgetter(rows), y))
        result = {
            group.name: found[group.name][:count].astype(np.float64)
            if group.name in found
            else np.zeros((count, group.width))
            for group in graph.prunable
        }
        if inside:
            for row in range(count):
                one = slice(row, row + 1)
                example = within([part[one] for part in inputs], map_leaves(itemgetter(one), y))
                for name, value in example.items():
                    result[name][row] += value
        for name, values in result.items():
            if not np.isfinite(values).all():
                raise DataError(
                    f"Expected finite gradients of the loss. Received: NaN or infinity for {name!r}"
                    ". Look at the data, and at the model's outputs and loss for them."
                )
        yield result


def require_tensorflow(graph: ChannelGraph, what: str) -> None:
    """Raises :class:`ArgumentError` unless the model computes with TensorFlow."""
    backend = framework_module(graph.framework).backend.backend()
    if backend != "tensorflow":
        raise ArgumentError(
            f"Expected a model on TensorFlow, whose gradients {what} are taken with. Received: a "
            f"model on the Keras backend {backend!r}. Set KERAS_BACKEND to tensorflow, or use a "
            "criterion without gradients, such as 'l1'."
        )


class PerExample:
    """The loss of every example, shape ``(examples,)``, as a function of (labels, outputs).

    Args:
        graph: the analysed model.
        loss: see :func:`phi`.
        labels: a batch of them, from which the loss may be inferred.
    """

    def __init__(self, graph: ChannelGraph, loss: Any, labels: Any) -> None:
        self._graph = graph
        self._loss = resolve_loss(graph.model, loss, labels)

    def __call__(self, labels: Any, outputs: Sequence[Any]) -> Any:
        """Losses from tensors: labels, and the model's outputs, flattened."""
        import tensorflow as tf

        loss, count = self._loss, outputs[0].shape[0]
        if len(outputs) == 1:
            structure = outputs[0]
        else:
            refs = (ref.key for ref in self._graph.trace.outputs)
            known = dict(zip(refs, outputs, strict=True))
            structure = map_leaves(lambda ref: known[ref.key], self._graph.trace.output_structure)
        # Loss objects average over the batch, which their method call does not.
        is_object = hasattr(loss, "reduction") and hasattr(loss, "call")
        if is_object and len(outputs) == 1:
            if self._graph.framework == "keras":
                # As the object does when it is called.
                labels, structure = (tf.cast(part, loss.dtype) for part in (labels, structure))
            if len(labels.shape) == len(structure.shape) - 1 and structure.shape[-1] == 1:
                labels = labels[..., None]
        values = loss.call(labels, structure) if is_object else loss(labels, structure)
        shape = values.shape
        if len(shape) == 0 or shape[0] != count:
            raise ArgumentError(
                "Expected a loss with one value per example, whose gradients are needed one by "
                f"one. Received: {type(loss).__name__} with values of shape {tuple(shape)} for "
                f"{count} examples. Leave the average over the batch out of the function."
            )
        return tf.reduce_mean(values, axis=list(range(1, len(shape)))) if len(shape) > 1 else values


@dataclass(frozen=True, eq=False)
class Reading:
    """An axis of a call's input whose channels the call reads.

    Attributes:
        call: the call.
        number: the number of the input.
        axis: the axis, counted from the front.
        groups: names of the groups that are read there.
        index: int array, shape ``(size of the axis,)``: for each position the place of its channel
            in the channels of all ``groups``, one after the other, counted from 1; 0 for others.
    """

    call: Call
    number: int
    axis: int
    groups: tuple[str, ...]
    index: Labels


def readings_of(graph: ChannelGraph) -> tuple[list[Reading], dict[str, list[Member]]]:
    """Where the channels of all prunable groups are read.

    Returns:
        The axes of calls' inputs on which channels are read; and for every group that is (also)
        read elsewhere, the members that do so: axes of weights inside layers.
    """
    seen_from: dict[tuple[str, str], set[tuple[int, int]]] = {}
    inside: dict[str, list[Member]] = {}
    calls = [
        call
        for traced in graph.record.traces.values()
        for call in traced.calls
        if not is_model(call.op)
    ]
    by_path: dict[str, list[Call]] = {}
    for call in calls:
        by_path.setdefault(graph.record.paths.get(id(call.op), ""), []).append(call)
    for group in graph.prunable:
        members: dict[str, list[Member]] = {}
        for member in group.members:
            if member.masked:
                members.setdefault(member.path, []).append(member)
        for path, readers in members.items():
            places = _places(graph, by_path.get(path, []), readers)
            if places is None:
                inside.setdefault(group.name, []).extend(readers)
            else:
                seen_from[path, group.name] = places
    readings: list[Reading] = []
    for path, mine in by_path.items():
        for call in mine:
            wanted: dict[tuple[int, int], list[ChannelGroup]] = {}
            for group in graph.prunable:
                for place in sorted(seen_from.get((path, group.name), ())):
                    wanted.setdefault(place, []).append(group)
            for (number, axis), groups in wanted.items():
                readings.append(_reading(graph, call, number, axis, groups))
    return readings, inside


def _places(
    graph: ChannelGraph, calls: Sequence[Call], readers: Sequence[Member]
) -> set[tuple[int, int]] | None:
    """(input, axis) where the channels come in that all these members of a layer read.

    ``None`` if a member reads channels that come from within the layer, if the layer is not linear
    in what it reads (a vector that scales and is summed up), or has several outputs.
    """
    if not calls or any(len(call.outputs) != 1 for call in calls):
        return None
    found: set[tuple[int, int]] = set()
    for member in readers:
        site = graph.record.sites[id(member.variable)]
        # A weight's labels are those that its first call gave, before any are found equal: those
        # of an input, or ones of the layer's own.
        labels = site.labels[member.axis]
        mine = {
            (number, axis)
            for number, ref in enumerate(calls[0].inputs)
            for axis, known in enumerate(graph.record.tensors.get(ref.key, ()))
            if labels is not None and known is not None and np.isin(labels, known).all()
        }
        if not mine or len(site.labels) < 2:
            return None
        found |= mine
    return found


def _reading(
    graph: ChannelGraph, call: Call, number: int, axis: int, groups: Sequence[ChannelGroup]
) -> Reading:
    labels: Any = graph.record.tensors[call.inputs[number].key][axis]
    channels = graph.channels(labels)
    place = np.zeros(len(graph.solution.frozen), np.int64)
    start = 1
    for group in groups:
        place[group.channel_ids] = np.arange(start, start + group.width)
        start += group.width
    return Reading(call, number, axis, tuple(group.name for group in groups), place[channels])


def gated_calls(readings: Sequence[Reading], gates: Mapping[str, Any]) -> dict[int, Override]:
    """Calls that multiply gates onto what they read, for :func:`~tfprune.graph.evaluate.evaluate`.

    Args:
        readings: from :func:`readings_of`.
        gates: group name -> tensor, shape ``(examples, width)`` or ``(1, width)``.
    """
    by_call: dict[int, list[Reading]] = {}
    for reading in readings:
        by_call.setdefault(id(reading.call), []).append(reading)

    def gated(mine: Sequence[Reading]) -> Override:
        def run(*tensors: Any) -> Any:
            values = list(tensors)
            for reading in mine:
                values[reading.number] = _multiplied(values[reading.number], reading, gates)
            return run_call(mine[0].call, values)[0]

        return run

    return {key: gated(mine) for key, mine in by_call.items()}


def _multiplied(tensor: Any, reading: Reading, gates: Mapping[str, Any]) -> Any:
    import tensorflow as tf

    mine = [gates[name] for name in reading.groups]
    rows = int(mine[0].shape[0])
    if rows not in (1, tensor.shape[0]):
        raise ModelError(
            f"Expected tensors whose first axis is the examples'. Received: shape "
            f"{tuple(tensor.shape)} for {rows} examples at the input of {reading.call.op.name!r}. "
            "A reshape before it joins examples with another axis; keep them apart."
        )
    factors = tf.concat([tf.ones((rows, 1), mine[0].dtype), *mine], axis=1)
    shape = [1] * len(tensor.shape)
    shape[0], shape[reading.axis] = rows, len(reading.index)
    factor = tf.reshape(tf.gather(factors, reading.index, axis=1), shape)
    return tensor * tf.cast(factor, tensor.dtype)


def _outside(graph: ChannelGraph, readings: Sequence[Reading], objective: PerExample) -> Any:
    """A compiled function from a batch to the gradients of gates at the inputs of calls."""
    import tensorflow as tf

    names = tuple(dict.fromkeys(name for reading in readings for name in reading.groups))

    @tf.function(autograph=False)  # type: ignore[untyped-decorator,unused-ignore]
    def gradients(inputs: Any, labels: Any) -> Any:
        count = inputs[0].shape[0]
        gates = {name: tf.ones((count, graph[name].width)) for name in names}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(gates)
            outputs = evaluate(graph, inputs, override=gated_calls(readings, gates))
            total = tf.reduce_sum(objective(labels, outputs))
        return tape.gradient(total, gates, unconnected_gradients="zero")

    def run(inputs: Any, labels: Any) -> dict[str, NDArray[Any]]:
        if not names:
            return {}
        found = gradients(_tensors(inputs), _tensors(labels))
        return {name: np.asarray(value) for name, value in found.items()}

    return run


def _within(
    graph: ChannelGraph, inside: Mapping[str, Sequence[Member]], objective: PerExample
) -> Any:
    """A function from one example to the gradients of gates on slices of weights."""
    import tensorflow as tf

    members = [member for several in inside.values() for member in several]
    variables = list({id(member.variable): member.variable for member in members}.values())
    raw = [raw_variable(v) if graph.framework == "keras" else v for v in variables]
    values = {id(v): np.asarray(v).astype(np.float64) for v in variables}

    @tf.function(autograph=False)  # type: ignore[untyped-decorator,unused-ignore]
    def gradients(inputs: Any, labels: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(raw)
            total = tf.reduce_sum(objective(labels, evaluate(graph, inputs)))
        found = tape.gradient(total, raw, unconnected_gradients="zero")
        return [tf.convert_to_tensor(gradient) for gradient in found]

    def run(inputs: Any, labels: Any) -> dict[str, Vector]:
        found = gradients(_tensors(inputs), _tensors(labels))
        products = {
            id(variable): np.asarray(gradient, np.float64) * values[id(variable)]
            for variable, gradient in zip(variables, found, strict=True)
        }
        result: dict[str, Vector] = {}
        for name, several in inside.items():
            change = np.zeros(graph[name].width)
            for member in several:
                product = products[id(member.variable)]
                per_position = product.sum(over_other_axes(product, member.axis))
                np.add.at(change, member.channels, per_position[member.positions])
            result[name] = change
        return result

    return run


def _tensors(structure: Any) -> Any:
    import tensorflow as tf

    return tf.nest.map_structure(tf.convert_to_tensor, structure)
