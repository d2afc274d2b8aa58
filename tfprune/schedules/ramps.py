"""Curves from one sparsity to another."""

from __future__ import annotations

import abc
import math
from typing import Any

import keras
import tensorflow as tf

from tfprune.errors import ArgumentError
from tfprune.schedules.arguments import check_positive, check_sparsity
from tfprune.schedules.base import Periodic, mix, progress, within


class Ramp(Periodic):
    """Base of the curves: sparsity from an initial to a final value, between two steps.

    With ``p = clip((step - begin_step) / (end_step - begin_step), 0, 1)`` the sparsity is
    ``initial + (final - initial) * fraction(p)``. It is cut to the range between the two, and from
    ``end_step`` on it is the final one exactly (in float32). With ``begin_step == end_step`` it
    jumps at that step. The final sparsity may be below the initial one: then masks open again.

    Your own curve is a subclass with one method; registered, it is saved and loaded with models::

        @keras.saving.register_keras_serializable(package="mine")
        class Square(tfprune.schedules.Ramp):
            def fraction(self, p):
                return p * p

    Args:
        initial_sparsity: fraction of zeros up to ``begin_step``.
        final_sparsity: fraction of zeros from ``end_step`` on.
        begin_step: first step (training batch) at which masks may be updated. The first batch is
            step 1: with 0 the first update comes at step ``frequency``.
        end_step: step at which the final sparsity is reached; masks are updated there in any case,
            and never after it.
        frequency: steps from one update of the masks to the next. Zhu and Gupta found no
            difference between 100 and 1000.

    Raises:
        ArgumentError: an argument has a value that is not allowed; the message says what is.
    """

    def __init__(
        self,
        initial_sparsity: float,
        final_sparsity: float,
        begin_step: int,
        end_step: int,
        frequency: int = 100,
    ) -> None:
        super().__init__(begin_step, end_step, frequency)
        self.initial_sparsity = check_sparsity(initial_sparsity, "initial_sparsity")
        self.final_sparsity = check_sparsity(final_sparsity, "final_sparsity")

    @abc.abstractmethod
    def fraction(self, p: Any) -> Any:
        """The part of the way from initial to final sparsity at progress p (float32, 0 to 1)."""

    def sparsity_at(self, step: Any) -> Any:
        p = progress(step, self.begin_step, self.end_step)
        return self._ended(step, mix(self.initial_sparsity, self.final_sparsity, self.fraction(p)))

    def _ended(self, step: Any, sparsity: Any) -> Any:
        return tf.where(step >= self.end_step, self.final_sparsity, sparsity)


@keras.saving.register_keras_serializable(package="tfprune")
class Polynomial(Ramp):
    """``s = final + (initial - final) (1 - p)^power``: fast at first, then slower and slower.

    With power 3 the gradual pruning (AGP) of Zhu and Gupta, "To prune, or not to prune",
    arXiv:1710.01878; formula checked against the paper and tfmot. After ``begin_step`` the same
    float32 values as tfmot's ``PolynomialDecay``; up to it exactly the initial sparsity, where
    tfmot's may be off by 1e-7 (and over more than ten million steps a little longer).

    Args:
        initial_sparsity: fraction of zeros up to ``begin_step``.
        final_sparsity: fraction of zeros from ``end_step`` on.
        begin_step: first step at which masks may be updated; the first batch is step 1.
        end_step: step at which the final sparsity is reached.
        power: exponent, above 0; 1 is a line.
        frequency: steps from one update of the masks to the next.

    Raises:
        ArgumentError: an argument has a value that is not allowed.
    """

    def __init__(
        self,
        initial_sparsity: float,
        final_sparsity: float,
        begin_step: int,
        end_step: int,
        power: float = 3,
        frequency: int = 100,
    ) -> None:
        super().__init__(initial_sparsity, final_sparsity, begin_step, end_step, frequency)
        self.power = check_positive(power, "power")

    def fraction(self, p: Any) -> Any:
        return 1 - tf.pow(1 - p, self.power)

    def sparsity_at(self, step: Any) -> Any:
        # Operation by operation as in tfmot: masks keep round(N (1 - s)) weights, in float32.
        first, last = self.initial_sparsity, self.final_sparsity
        p = progress(step, self.begin_step, self.end_step)
        sparsity = within((first - last) * tf.pow(1 - p, self.power) + last, first, last)
        return self._ended(step, tf.where(p > 0, sparsity, first))


@keras.saving.register_keras_serializable(package="tfprune")
class Linear(Ramp):
    """``s = initial + (final - initial) p``: the same number of weights at every update.

    Arguments and errors are those of :class:`Ramp`.
    """

    def fraction(self, p: Any) -> Any:
        return p


@keras.saving.register_keras_serializable(package="tfprune")
class Cosine(Ramp):
    """``s = initial + (final - initial) (1 - cos(pi p)) / 2``: slow at both ends.

    The "cos" schedule of fasterai; formula checked against its code. Arguments and errors are those
    of :class:`Ramp`.
    """

    def fraction(self, p: Any) -> Any:
        # The same by the half-angle formula, without cancellation near 0.
        return tf.square(tf.sin(p * (math.pi / 2)))


@keras.saving.register_keras_serializable(package="tfprune")
class Exponential(Ramp):
    """``s = 1 - (1 - initial) ((1 - final) / (1 - initial))^p``: density decays geometrically.

    Every update removes the same fraction of the weights that are left. The "exponential" schedule
    of NNCF; formula checked against its code. Arguments and errors are those of :class:`Ramp`.
    """

    def fraction(self, p: Any) -> Any:
        """The curve as a part of the way (where initial and final differ)."""
        whole = self.final_sparsity - self.initial_sparsity
        return (self._sparsity(p) - self.initial_sparsity) / whole if whole else p

    def sparsity_at(self, step: Any) -> Any:
        p = progress(step, self.begin_step, self.end_step)
        sparsity = within(self._sparsity(p), self.initial_sparsity, self.final_sparsity)
        return self._ended(step, tf.where(p > 0, sparsity, self.initial_sparsity))

    def _sparsity(self, p: Any) -> Any:
        density = 1 - self.initial_sparsity
        return 1 - density * tf.pow((1 - self.final_sparsity) / density, p)


@keras.saving.register_keras_serializable(package="tfprune")
class OneCycle(Ramp):
    """``s = initial + (final - initial) (1 + e^(beta - alpha)) / (1 + e^(beta - alpha p))``.

    A single rise, steepest at ``p = beta / alpha``, with time to train before and after it: Hubens
    et al., "One-Cycle Pruning", ICIP 2022. Formula and defaults checked against fasterai, whose
    author wrote the paper; that the paper has the same constants is recalled, not checked.

    At ``begin_step`` the sparsity is the curve's, not the initial one: .0022 instead of 0 on the
    way to .9. At ``end_step`` it is exactly the final one.

    Args:
        initial_sparsity: fraction of zeros that the curve starts from.
        final_sparsity: fraction of zeros from ``end_step`` on.
        begin_step: first step at which masks may be updated; the first batch is step 1.
        end_step: step at which the final sparsity is reached.
        alpha: steepness, above 0.
        beta: place of the rise, above 0 and below ``alpha``.
        frequency: steps from one update of the masks to the next.

    Raises:
        ArgumentError: an argument has a value that is not allowed.
    """

    def __init__(
        self,
        initial_sparsity: float,
        final_sparsity: float,
        begin_step: int,
        end_step: int,
        alpha: float = 14,
        beta: float = 6,
        frequency: int = 100,
    ) -> None:
        super().__init__(initial_sparsity, final_sparsity, begin_step, end_step, frequency)
        self.alpha = check_positive(alpha, "alpha")
        self.beta = check_positive(beta, "beta")
        if self.beta >= self.alpha:
            raise ArgumentError(
                "Expected beta to be below alpha: the rise is at beta / alpha of the way. "
                f"Received: alpha {alpha!r}, beta {beta!r}. The paper's are 14 and 6."
            )

    def fraction(self, p: Any) -> Any:
        return (1 + math.exp(self.beta - self.alpha)) / (1 + tf.exp(self.beta - self.alpha * p))
