r"""Greedy selection of channels, by the gradient at the kernels that read them.

Zhuang et al., "Discrimination-aware Channel Pruning for Deep Neural Networks", NeurIPS 2018,
Algorithm 2, generalised to groups that several layers read; see :mod:`tfprune.methods.dcp`.

The part of the network in front of a group's readers does not change while its channels are
chosen. What the rest takes from there is computed once for every batch, and held in memory on the
host: the activations that cross the boundary and the unpruned network's outputs at the readers, for
``batches * batch_size`` examples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.criteria.reconstruction.readers import Reader, owners_of
from tfprune.errors import DataError
from tfprune.graph import ChannelGraph, ChannelGroup
from tfprune.graph.evaluate import run_call
from tfprune.graph.trace import Call, is_model, raw_variable

Array = NDArray[Any]
Indices = NDArray[np.int64]
Vector = NDArray[np.float64]


# -- the rules -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How channels are chosen.

    Attributes:
        weight: lambda, of the discrimination-aware loss beside the reconstruction error.
        per_pick: channels that are added at once.
        steps: of SGD after every pick.
        learning_rate, momentum: of these; Nesterov's momentum, zero after every pick.
        epsilon: ends the growth where the loss falls by less, as a fraction of the first; ``None``
            where the number of channels is given.
    """

    weight: float
    per_pick: int
    steps: int
    learning_rate: float
    momentum: float
    epsilon: float | None = None


@dataclass(frozen=True)
class Aim:
    """How many channels of one group may stay, and which of them in any case.

    Attributes:
        widths: rising; the growth ends at one of them, at the last of them in any case.
        protected: sorted indices of channels that are added before any other.
    """

    widths: tuple[int, ...]
    protected: Indices


@dataclass(frozen=True, eq=False)
class Growth:
    """What was chosen.

    Attributes:
        order: the channels in the order in which they were added, the protected ones first.
        losses: the loss over all batches without any channel, then after every pick.
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]


def slice_norms(gradients: Sequence[tuple[Array, int, Indices]], width: int) -> Vector:
    """The Frobenius norm of every channel's part of the gradient: float64, shape ``(width,)``.

    Args:
        gradients: of each reader: the gradient at the kernel, the axis that reads, and for each
            position along it the group's channel, or -1.
        width: of the group.
    """
    total = np.zeros(width)
    for gradient, axis, owners in gradients:
        others = tuple(i for i in range(gradient.ndim) if i != axis)
        squares = np.square(gradient.astype(np.float64)).sum(others)
        mine = owners >= 0
        total += np.bincount(owners[mine], squares[mine], minlength=width)
    return np.sqrt(total)


def next_channels(norms: Vector, chosen: Sequence[int], count: int) -> list[int]:
    """The ``count`` channels of largest norm that are not chosen; of equal ones the lower index."""
    ranking = np.array(norms, np.float64)
    ranking[list(chosen)] = -np.inf
    order = np.argsort(-ranking, kind="stable")
    return [int(i) for i in order[: min(count, len(norms) - len(chosen))]]


def converged(losses: Sequence[float], epsilon: float) -> bool:
    """Whether ``|L_{t-1} - L_t| <= epsilon L_0``, for the last two of the losses."""
    return len(losses) > 1 and abs(losses[-2] - losses[-1]) <= epsilon * abs(losses[0])


def kappa(width: int, ratio: float) -> int:
    """How many of ``width`` channels stay: ``width - floor(width * ratio)``, as in the code."""
    return width - math.floor(width * ratio + 1e-9)


def grow(problem: Problem, width: int, aim: Aim, settings: Settings) -> Growth:
    """Algorithm 2: adds the channels of largest gradient, and trains the slices that read them.

    Args:
        problem: whose kernels it changes.
        width: of the group.
        aim: how many channels, and which in any case.
        settings: how.

    Raises:
        DataError: activations, or the loss after a pick, are not finite.
    """
    chosen: list[int] = []
    problem.clear()
    loss, gradients = problem.measure()
    if not np.isfinite(loss):
        raise DataError(
            "Expected finite activations. Received: NaN or infinity. Training may have come off "
            "course; look at the data, and at the model's outputs for them."
        )
    losses = [loss]
    new = [int(i) for i in aim.protected]
    while len(chosen) < aim.widths[-1]:
        if not new:
            # An allowed width is not jumped over.
            ends = next(size for size in aim.widths if size > len(chosen)) - len(chosen)
            norms = slice_norms(gradients, width)
            new = next_channels(norms, chosen, min(settings.per_pick, ends))
        chosen += new
        problem.add(new)
        problem.train(chosen, settings)
        loss, gradients = problem.measure()
        losses.append(loss)
        if not np.isfinite(loss):
            raise DataError(
                "Expected a finite loss while channels are chosen. Received: NaN or infinity after "
                f"{len(chosen)} channels. Lower selection_rate, {settings.learning_rate:g}."
            )
        new = []
        if (
            settings.epsilon is not None
            and len(chosen) in aim.widths
            and converged(losses, settings.epsilon)
        ):
            break
    return Growth(tuple(chosen), tuple(losses))


# -- the network as a list of calls ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Step:
    """One call, and the numbers of the tensors that it takes and makes."""

    call: Call
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A model's calls in their order; those of nested models as often as these are called.

    Attributes:
        steps: the calls, those of nested models themselves left out.
        inputs, outputs: numbers of the model's tensors.
        numbers: ``key`` of a tensor of the outermost model -> its number.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    numbers: Mapping[tuple[int, int, int], int]

    def run(
        self,
        batch: Sequence[Any],
        wanted: Sequence[int],
        observe: Callable[[Call, Sequence[Any]], None] | None = None,
    ) -> dict[int, Any]:
        """Tensors by their number, in inference mode; nothing is computed in vain.

        Args:
            batch: one array per input.
            wanted: the numbers.
            observe: sees every call with its input tensors.
        """
        known = dict(zip(self.inputs, batch, strict=True))
        for step in needed(self.steps, wanted):
            tensors = [known[number] for number in step.inputs]
            if observe is not None:
                observe(step.call, tensors)
            known.update(zip(step.outputs, run_call(step.call, tensors), strict=True))
        return {number: known[number] for number in wanted}


def program_of(graph: ChannelGraph) -> Program:
    """The calls of an analysed model, one after another."""
    count = itertools.count()
    steps: list[Step] = []

    def walk(model: Any, given: Sequence[int]) -> tuple[list[int], dict[Any, int]]:
        traced = graph.record.traces[id(model)]
        known = {ref.key: number for ref, number in zip(traced.inputs, given, strict=True)}
        for call in traced.calls:
            inputs = tuple(known[ref.key] for ref in call.inputs)
            if is_model(call.op):
                outputs = tuple(walk(call.op, inputs)[0])
            else:
                outputs = tuple(next(count) for _ in call.outputs)
                steps.append(Step(call, inputs, outputs))
            known.update(zip((ref.key for ref in call.outputs), outputs, strict=True))
        return [known[ref.key] for ref in traced.outputs], known

    inputs = tuple(next(count) for _ in graph.record.traces[id(graph.model)].inputs)
    outputs, numbers = walk(graph.model, inputs)
    return Program(tuple(steps), inputs, tuple(outputs), numbers)


def needed(steps: Sequence[Step], wanted: Sequence[int]) -> list[Step]:
    """The steps without which the wanted tensors cannot be made."""
    open_, found = set(wanted), []
    for step in reversed(steps):
        if open_ & set(step.outputs):
            open_ |= set(step.inputs)
            found.append(step)
    return found[::-1]


def behind(steps: Sequence[Step], calls: set[int]) -> set[int]:
    """The numbers of all tensors that depend on the outputs of these calls (``id``)."""
    found: set[int] = set()
    for step in steps:
        if id(step.call) in calls or found & set(step.inputs):
            found |= set(step.outputs)
    return found


def first_behind(program: Program, sites: Sequence[int], readers: Sequence[Reader]) -> int:
    """The place of the first of these tensors that depends on all readers, or their number."""
    reached = [behind(program.steps, set(reader.calls)) for reader in readers]
    for place, number in enumerate(sites):
        if all(number in numbers for numbers in reached):
            return place
    return len(sites)


def linear_output(call: Call, tensors: Sequence[Any]) -> Any:
    """What a convolution or dense layer puts out before its activation."""
    activation = call.op.activation
    # Not through Keras's __setattr__, which would track it, or refuse to.
    object.__setattr__(call.op, "activation", None)
    try:
        return run_call(call, tensors)[0]
    finally:
        object.__setattr__(call.op, "activation", activation)


# -- the loss of one group -------------------------------------------------------------------------

Head = Callable[[Sequence[Any], Any], Any]
"""From the tensors of a site and a batch's labels to the discrimination-aware loss, a scalar."""


class Problem:
    r"""The loss that decides about one group, as a function of the kernels that read it.

    .. math:: L = \sum_r \frac{1}{2 Q_r} \lVert O_r^{base} - O_r \rVert_F^2 + \lambda L_S

    with the outputs O of every reader r before its activation, :math:`Q_r` numbers each, those of
    channels that are removed already left out.

    Args:
        base, work: the unpruned network and the present one, its copy, whose kernels change.
        readers: of the group, in ``work``.
        group: the group, in ``work``.
        outputs: path of a reader -> which of its outputs stay, bool, shape (filters,).
        wanted: numbers of the tensors that ``head`` takes; none without it.
        head: L_S; ``None`` where lambda is 0.
        weight: lambda.
        batches: (inputs, labels); inputs are one array per input of the model.
    """

    def __init__(
        self,
        base: Program,
        work: Program,
        readers: Sequence[Reader],
        group: ChannelGroup,
        outputs: Mapping[str, NDArray[np.bool_]],
        wanted: Sequence[int],
        head: Head | None,
        weight: float,
        batches: Sequence[tuple[Sequence[Any], Any]],
    ) -> None:
        import tensorflow as tf

        self._readers = readers
        self._owners = [owners_of(reader, group) for reader in readers]
        self._variables = [raw_variable(reader.site.variable) for reader in readers]
        self._trained = [np.asarray(variable) for variable in self._variables]
        self._speeds = [tf.Variable(tf.zeros_like(variable)) for variable in self._variables]
        self._outputs = [outputs[reader.path] for reader in readers]
        self._by_call = {id_: i for i, reader in enumerate(readers) for id_ in reader.calls}
        self._wanted = tuple(wanted)
        self._head, self._weight = head, weight
        reading = [step for step in work.steps if id(step.call) in self._by_call]
        ends = [number for step in reading for number in step.outputs]
        moving = behind(work.steps, set(self._by_call))
        self._steps = [
            step
            for step in needed(work.steps, [*ends, *wanted])
            if id(step.call) in self._by_call or moving & set(step.outputs)
        ]
        made = {number for step in self._steps for number in step.outputs}
        taken = [*(number for step in self._steps for number in step.inputs), *wanted]
        self._frontier = tuple(dict.fromkeys(n for n in taken if n not in made))
        # Both networks are copies of one model: their calls come in the same order.
        answering = {
            id(step.call)
            for step, other in zip(base.steps, work.steps, strict=True)
            if id(other.call) in self._by_call
        }
        self._batches = []
        for x, y in batches:
            targets: list[Any] = []

            def observe(call: Call, tensors: Sequence[Any], targets: Any = targets) -> None:
                if id(call) in answering:
                    targets.append(np.asarray(linear_output(call, tensors), np.float32))

            # The calls of readers are among those that their outputs need.
            base.run(x, ends, observe)
            front = work.run(x, self._frontier)
            tensors = [np.asarray(front[number]) for number in self._frontier]
            self._batches.append((tensors, targets, y))
        self._next = 0
        self._gradient = tf.function(self._gradient_of, autograph=False, reduce_retracing=True)

    def clear(self) -> None:
        """No channel is read: the slices of all of the group's are zero."""
        self._set(lambda value, owners: owners >= 0, 0.0)

    def add(self, channels: Sequence[int]) -> None:
        """Reads these channels with the trained slices (the warm start)."""
        self._set(lambda value, owners: np.isin(owners, channels), None)

    def restore(self) -> None:
        """Reads all channels with the trained slices."""
        for variable, trained in zip(self._variables, self._trained, strict=True):
            variable.assign(trained)

    def measure(self) -> tuple[float, list[tuple[Array, int, Indices]]]:
        """The loss over all batches, and its gradient at every reader's kernel."""
        total, count = 0.0, 0
        sums: list[Array] = [np.zeros(trained.shape) for trained in self._trained]
        for tensors, targets, y in self._batches:
            loss, gradients = self._gradient(tensors, targets, y)
            size = len(tensors[0])
            total += float(loss) * size
            sums = [
                a + size * np.asarray(b, np.float64) for a, b in zip(sums, gradients, strict=True)
            ]
            count += size
        found = [
            (value / count, reader.input_axis, owners)
            for value, reader, owners in zip(sums, self._readers, self._owners, strict=True)
        ]
        return total / count, found

    def train(self, chosen: Sequence[int], settings: Settings) -> None:
        """SGD on the slices that read the chosen channels, over the batches in turn."""
        for speed in self._speeds:
            speed.assign(speed * 0)
        masks = [
            np.isin(owners, chosen).astype(np.float32).reshape(_along(reader))
            for owners, reader in zip(self._owners, self._readers, strict=True)
        ]
        for _ in range(settings.steps):
            batch = self._batches[self._next % len(self._batches)]
            self._next += 1
            _, gradients = self._gradient(*batch)
            for variable, speed, gradient, mask in zip(
                self._variables, self._speeds, gradients, masks, strict=True
            ):
                pull = settings.learning_rate * mask * gradient
                speed.assign(settings.momentum * speed - pull)
                variable.assign_add(settings.momentum * speed - pull)

    def _set(self, which: Callable[[Array, Indices], Any], value: float | None) -> None:
        for variable, trained, owners, reader in zip(
            self._variables, self._trained, self._owners, self._readers, strict=True
        ):
            present = np.asarray(variable)
            here = np.asarray(which(present, owners)).reshape(_along(reader))
            new = trained if value is None else np.full_like(present, value)
            variable.assign(np.where(here, new, present))

    def _gradient_of(self, tensors: Any, targets: Any, y: Any) -> Any:
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self._variables)
            loss = self._loss(tensors, targets, y)
        return loss, tape.gradient(loss, self._variables, unconnected_gradients="zero")

    def _loss(self, tensors: Any, targets: Any, y: Any) -> Any:
        import tensorflow as tf

        known = dict(zip(self._frontier, tensors, strict=True))
        left = iter(targets)
        total = tf.zeros(())
        for step in self._steps:
            given = [known[number] for number in step.inputs]
            number = self._by_call.get(id(step.call))
            if number is None:
                made = run_call(step.call, given)
            else:
                value = linear_output(step.call, given)
                total += self._error(number, value, next(left))
                activation = step.call.op.activation
                made = [value if activation is None else activation(value)]
            known.update(zip(step.outputs, made, strict=True))
        if self._head is not None:
            total += self._weight * self._head([known[n] for n in self._wanted], y)
        return total

    def _error(self, number: int, value: Any, target: Any) -> Any:
        import tensorflow as tf

        kept = self._outputs[number]
        shape = [1] * len(value.shape)
        shape[1 if self._readers[number].channels_first else -1] = len(kept)
        squares = tf.square(target - tf.cast(value, tf.float32))
        # The mean over the outputs that stay.
        return tf.reduce_mean(squares * kept.reshape(shape).astype(np.float32)) / (2 * kept.mean())


def _along(reader: Reader) -> list[int]:
    """The shape in which a value per position of the kernel's input axis meets the kernel."""
    shape = [1] * len(reader.site.variable.shape)
    shape[reader.input_axis] = -1
    return shape
