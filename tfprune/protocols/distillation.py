"""Knowledge distillation: a student learns a teacher's probabilities beside the labels."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.errors import ArgumentError, ModelError
from tfprune.graph.trace import framework_of, is_model
from tfprune.losses import final_activation
from tfprune.protocols.checkpoint import read_variables
from tfprune.protocols.framework import framework, is_keras_3

SMALLEST = 1e-37
"""Probabilities are raised to this before their logarithm, just above float32's smallest."""


@dataclass(frozen=True)
class Distillation:
    r"""How a student learns from a teacher's logits.

    The loss of an example with label :math:`y` and logits :math:`z_s` and :math:`z_t` is

    .. math::

        L = (1 - a)\, H(y, z_s)
            + a\, T^2\, KL(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T))

    where :math:`H` is the loss that the student is trained with anyway, :math:`a` the ``weight``
    and :math:`T` the ``temperature``. A higher temperature shows more of what the teacher thinks
    of the wrong classes; :math:`T^2` keeps the gradient's size about the same. Its soft part is
    :math:`a T (\mathrm{softmax}(z_s / T) - \mathrm{softmax}(z_t / T))` by the student's logits.

    Attributes:
        temperature: positive.
        weight: from 0, labels alone, to 1, the teacher alone.

    Raises:
        ArgumentError: a value out of range.

    References:
        Hinton, Vinyals, Dean, arXiv:1503.02531, section 2 (recalled; the text was not at hand).
        Both defaults and the form of the sum were read in later official codes (TAS, attention
        transfer, RepDistiller).

        ``keras.distillation`` of Keras 3.15 is not used: its default, the string
        "kl_divergence", compares raw logits as if they were probabilities.
    """

    temperature: float = 4.0
    weight: float = 0.9

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ArgumentError(f"Expected a positive temperature; received {self.temperature}.")
        if not 0 <= self.weight <= 1:
            raise ArgumentError(f"Expected a weight from 0 to 1; received {self.weight}.")


def check_teacher(student: Any, teacher: Any) -> None:
    """Refuses a pair of models of which one cannot teach the other.

    Raises:
        ArgumentError: outputs that are not logits or probabilities of the same classes, other
            inputs, shared weights, or a backend other than TensorFlow.
        ModelError: the teacher is not a built Keras model of the student's framework.
    """
    keras = framework(student)
    if not is_model(teacher) or framework_of(teacher) != keras.__name__:
        raise ModelError(
            f"Expected as the teacher a model of {keras.__name__}, as the student is; received "
            f"{type(teacher).__name__} of {framework_of(teacher) or 'no Keras'}."
        )
    framework(teacher)
    if is_keras_3(keras) and keras.backend.backend() != "tensorflow":
        raise ArgumentError(
            "Distillation works on Keras's TensorFlow backend; the backend is "
            f"{keras.backend.backend()!r}."
        )
    if {id(v) for v in teacher.weights} & {id(v) for v in student.weights}:
        raise ArgumentError(
            "The teacher has weights that the student trains. Give a copy as the student, such as "
            "tfprune.prune returns, or as the teacher."
        )
    for role, model in (("student", student), ("teacher", teacher)):
        _check_outputs(role, model)
    for what, ours, theirs in (
        ("outputs", student.output_shape, teacher.output_shape),
        ("inputs", getattr(student, "input_shape", None), getattr(teacher, "input_shape", None)),
    ):
        if not _agree(ours, theirs):
            raise ArgumentError(
                f"Expected a teacher with the student's {what}; received {theirs}, and the "
                f"student's are {ours}."
            )


def _agree(first: Any, second: Any) -> bool:
    """Whether shapes can be the same; those of several inputs are left to Keras."""
    if not isinstance(first, tuple) or not isinstance(second, tuple):
        return True
    return len(first) == len(second) and all(
        a is None or b is None or a == b for a, b in zip(first, second, strict=True)
    )


def _check_outputs(role: str, model: Any) -> None:
    shape = getattr(model, "output_shape", None)
    if not isinstance(shape, tuple) or shape[-1] is None:
        raise ArgumentError(
            f"Distillation needs one output with a known number of classes; the {role} "
            f"{model.name!r} has {shape}."
        )
    activation = final_activation(model)
    if shape[-1] == 1 or activation not in ("linear", "softmax"):
        raise ArgumentError(
            f"Distillation needs logits, or probabilities of a softmax, over two classes or more; "
            f"the {role} {model.name!r} ends in {shape[-1]} unit(s) with activation "
            f"{activation!r}. If these are logits, end it in keras.layers.Activation('linear'); "
            "write a sigmoid of one unit as a softmax of two."
        )
    dtype = model.outputs[0].dtype
    if activation == "softmax" and getattr(dtype, "name", dtype) in ("float16", "bfloat16"):
        raise ArgumentError(
            f"The {role} {model.name!r} ends in a softmax in half precision, from which logits "
            "cannot be recovered. Give its last layer dtype='float32', or let it return logits."
        )


def settings_of(keras: Any, teacher: Any, distillation: Distillation) -> dict[str, Any]:
    """What must agree for a checkpoint to be of a run with this teacher, whose weights count."""
    digest = hashlib.sha256()
    for array in read_variables(keras, teacher.weights):
        digest.update(np.ascontiguousarray(array).tobytes())
    return {
        "distillation": [float(distillation.temperature), float(distillation.weight)],
        "teacher": digest.hexdigest()[:16],
    }


@contextmanager
def distilled(
    keras: Any, model: Any, loss: Any, teacher: Any, distillation: Distillation | None
) -> Iterator[tuple[Any, list[Any]]]:
    """Lets a model's training steps learn from a teacher as well, until the block ends.

    While it trains, the loss has the teacher's part in it; what Keras does with a loss (precision,
    reduction, distribution, penalties) stays Keras's. Validation sees the loss alone, and in the
    end the model is compiled with it as if there had been no teacher. Without ``distillation``
    nothing happens.

    Yields:
        The loss to compile the model with, and callbacks that come before others.

    Raises:
        ArgumentError: the loss is not an object of the model's Keras.
        ModelError: (while training) a training step of the model's own that does not use the loss.
    """
    if distillation is None:
        yield loss, []
        return
    if not isinstance(loss, keras.losses.Loss):
        raise ArgumentError(
            f"With a teacher the loss must be an object of {keras.__name__}.losses, such as "
            f"CategoricalCrossentropy(from_logits=True); received {loss!r}."
        )
    # A copy, so that the caller's object is not changed.
    loss = copy.copy(loss)
    step = _Step(keras, model, loss, teacher, distillation)
    # Not through Keras's __setattr__, which would track what is set.
    object.__setattr__(model, "train_step", step.train)
    object.__setattr__(loss, "call", step.loss)
    try:
        yield loss, [keras.callbacks.LambdaCallback(on_epoch_begin=step.reset)]
    finally:
        object.__delattr__(model, "train_step")
        object.__delattr__(loss, "call")
        # What was traced has the teacher in it.
        model.train_function = model.test_function = None


class _Step:
    """A training step with a teacher: the model's own, with another loss while it runs."""

    def __init__(
        self, keras: Any, model: Any, loss: Any, teacher: Any, distillation: Distillation
    ) -> None:
        # Here, for the package it is in imports Keras 3, whatever the models are of.
        from tfprune.layers.distribution import strategy_scope

        self._keras = keras
        self._teacher = teacher
        self._temperature = distillation.temperature
        self._weight = distillation.weight
        self._own_step, self._hard = model.train_step, loss.call
        self._from_softmax = final_activation(model) == "softmax"
        self._teacher_from_softmax = final_activation(teacher) == "softmax"
        with strategy_scope(model):
            self._means = {
                name: keras.metrics.Mean(name=name)
                for name in ("student_loss", "distillation_loss")
            }
        self._targets: Any = None  # the teacher's logits, during a training step
        self._parts: tuple[Any, Any] | None = None

    def reset(self, epoch: int, logs: Any = None) -> None:
        for mean in self._means.values():
            mean.reset_state()

    def train(self, data: Any) -> dict[str, Any]:
        """In the place of ``model.train_step``."""
        import tensorflow as tf

        x, _, _ = self._keras.utils.unpack_x_y_sample_weight(data)
        outputs = self._teacher(x, training=False)
        self._targets = tf.stop_gradient(logits(outputs, self._teacher_from_softmax))
        self._parts = None
        try:
            results = self._own_step(data)
            if self._parts is None:
                raise ModelError(
                    "The model has a train_step of its own that does not use the compiled loss, "
                    "so that a teacher has no way in. Let it call self.compute_loss."
                )
            for mean, values in zip(self._means.values(), self._parts, strict=True):
                mean.update_state(values)
        finally:
            self._targets = self._parts = None
        return {**results, **{name: mean.result() for name, mean in self._means.items()}}

    def loss(self, y_true: Any, y_pred: Any) -> Any:
        """In the place of ``loss.call``: a value per example, or per position of it."""
        hard = self._hard(y_true, y_pred)
        if self._targets is None:
            return hard
        soft = divergence(
            self._targets, logits(y_pred, self._from_softmax), temperature=self._temperature
        )
        self._parts = hard, soft
        return (1 - self._weight) * hard + self._weight * soft


def logits(outputs: Any, from_softmax: bool) -> Any:
    """Logits in float32, shape ``(..., classes)``.

    Those of probabilities are their logarithms, which differ from the layer's by a constant that
    no softmax sees. Below 1e-37, or 85 less than the largest logit, they end, and so does their
    gradient.
    """
    import tensorflow as tf

    outputs = tf.cast(outputs, tf.float32)
    return tf.math.log(tf.maximum(outputs, SMALLEST)) if from_softmax else outputs


def divergence(teacher: Any, student: Any, *, temperature: float) -> Any:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))`` along the last axis, in float32.

    Args:
        teacher: logits, shape ``(..., classes)``.
        student: the same.
        temperature: T.
    """
    import tensorflow as tf

    log_p = tf.nn.log_softmax(teacher / temperature)
    log_q = tf.nn.log_softmax(student / temperature)
    return temperature**2 * tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), axis=-1)
