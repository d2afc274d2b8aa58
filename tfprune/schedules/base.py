"""What all schedules share: the call, configuration, equality and a picture."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfprune.errors import ArgumentError
from tfprune.schedules.arguments import check_count, check_steps
from tfprune.schedules.tfmot import load

PruningSchedule = load().sparsity.keras.PruningSchedule


class Schedule(PruningSchedule):  # type: ignore[misc, valid-type]
    """Base of the schedules: which sparsity at which training step, and when masks are updated.

    ``schedule(step)`` returns ``(should_prune, sparsity)``, a bool and a float32 tensor, as tfmot's
    wrapper expects. It depends on the step alone, and works on a Python or numpy integer, a tensor,
    a variable, or a whole array of steps; eagerly, in a ``tf.function`` and compiled by XLA.

    A step is a training batch, and the first batch is step 1: the wrappers of tfmot and tfprune
    count up before they ask. An update at step 0 therefore never happens.

    Subclasses give :meth:`sparsity_at` and :meth:`updates_at`, and keep every argument of their
    constructor in an attribute of the same name; :meth:`get_config` reads them there. Curves from
    one sparsity to another are shorter to write on :class:`tfprune.schedules.Ramp`.
    """

    @abc.abstractmethod
    def sparsity_at(self, step: Any) -> Any:
        """The sparsity (float32) at each of the steps (an int64 tensor of any shape)."""

    @abc.abstractmethod
    def updates_at(self, step: Any) -> Any:
        """Whether masks are updated (bool) at each of the steps (an int64 tensor of any shape)."""

    def __call__(self, step: Any) -> tuple[Any, Any]:
        """Whether masks are updated at a step, and the sparsity there.

        Args:
            step: training batches so far, this one included: a whole number of any kind, or an
                array of them.

        Returns:
            A bool and a float32 tensor of the shape of ``step``.

        Raises:
            ArgumentError: ``step`` is not made of whole numbers.
        """
        steps = _whole_steps(step)
        return self.updates_at(steps), self.sparsity_at(steps)

    def curve(self, steps: Any) -> tuple[Any, Any]:
        """The schedule at many steps at once, as numpy arrays (updates, sparsities)."""
        updates, sparsities = self(np.asarray(steps))
        return updates.numpy(), sparsities.numpy()

    def plot(self, steps: int | Sequence[int] | None = None) -> Any:
        """The curve, with a mark at every step at which masks are updated.

        Args:
            steps: how many training steps to show, or the very steps; by default a little more
                than the schedule takes.

        Returns:
            A ``matplotlib.figure.Figure``; ``tfprune.reports.figures.save`` writes it.

        Raises:
            ArgumentError: ``steps`` is not a positive whole number.
        """
        from tfprune.reports.figures import schedule_figure

        if steps is None:
            steps = self.shown_steps()
        if not isinstance(steps, Sequence | np.ndarray):
            steps = range(check_count(steps, "steps") + 1)
        shown = np.asarray(steps)
        updates, sparsities = self.curve(shown)
        return schedule_figure({type(self).__name__: (shown, sparsities, updates)})

    def shown_steps(self) -> int:
        """How many steps :meth:`plot` shows by default."""
        return 100

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, by name."""
        config = {}
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if name == "self" or variadic:
                continue
            if not hasattr(self, name):
                raise ArgumentError(
                    f"Expected {type(self).__name__} to keep its argument {name!r} in an attribute "
                    f"of that name. Received: none. Add self.{name} = {name} to its constructor, "
                    "or give it a get_config() of its own."
                )
            config[name] = getattr(self, name)
        return config

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return bool(self.get_config() == other.get_config())

    def __hash__(self) -> int:
        return hash((type(self), _hashable(self.get_config())))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


class Periodic(Schedule):
    """Base of the schedules that update masks every ``frequency`` steps, from begin to end.

    Masks are updated at ``step`` if ``begin_step <= step <= end_step`` (or there is no end) and
    ``(step - begin_step) % frequency == 0``, as in tfmot, and at ``end_step`` whatever the
    frequency. tfmot leaves the last one out, and then never reaches the final sparsity where the
    frequency does not divide ``end_step - begin_step``.

    Args:
        begin_step: first step at which masks may be updated.
        end_step: last one; -1, where the schedule allows it, for no end.
        frequency: steps from one update to the next.

    Raises:
        ArgumentError: steps that are negative, not whole, or in the wrong order.
    """

    #: Whether -1 is allowed as the end.
    endless = False

    def __init__(self, begin_step: int, end_step: int, frequency: int = 100) -> None:
        self.begin_step, self.end_step = check_steps(begin_step, end_step, endless=self.endless)
        self.frequency = check_count(frequency, "frequency")

    def updates_at(self, step: Any) -> Any:
        turn = tf.equal(tf.math.floormod(step - self.begin_step, self.frequency), 0)
        due = tf.logical_and(step >= self.begin_step, turn)
        if self.end_step < 0:
            return due
        return tf.logical_or(
            tf.logical_and(due, step <= self.end_step), tf.equal(step, self.end_step)
        )

    def shown_steps(self) -> int:
        """A tenth more than the schedule takes, or ten updates of one without end."""
        if self.end_step < 0:
            return self.begin_step + 10 * self.frequency
        return self.end_step + max(1, (self.end_step - self.begin_step) // 10)


def progress(step: Any, begin_step: int, end_step: int) -> Any:
    """How far between begin and end a step is: float32 in [0, 1], rounded as in tfmot."""
    elapsed = tf.cast(step - begin_step, tf.float32)
    return tf.clip_by_value(elapsed / max(end_step - begin_step, 1), 0.0, 1.0)


def mix(first: float, second: float, fraction: Any) -> Any:
    """``first`` at 0, ``second`` at 1, exactly at both, and never outside the two."""
    fraction = tf.cast(fraction, tf.float32)
    return within(first * (1 - fraction) + second * fraction, first, second)


def within(value: Any, first: float, second: float) -> Any:
    """``value``, cut to the range between the two, in whichever order they come."""
    return tf.clip_by_value(value, min(first, second), max(first, second))


def _whole_steps(step: Any) -> Any:
    if isinstance(step, int | np.generic | np.ndarray | Sequence):
        # tf.convert_to_tensor would make int32 of a Python integer.
        step = np.asarray(step)
        steps = tf.constant(step, tf.int64) if np.issubdtype(step.dtype, np.integer) else None
    elif step is None or isinstance(step, float):
        steps = None
    else:
        tensor = tf.convert_to_tensor(step)
        steps = tf.cast(tensor, tf.int64) if tensor.dtype.is_integer else None
    if steps is None:
        raise ArgumentError(
            f"Expected the step to be a whole number (of training batches). Received: {step!r}."
        )
    return steps


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple(sorted((key, _hashable(inner)) for key, inner in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    return value
