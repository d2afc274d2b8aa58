"""Optimizer, learning rates and weight decay of a fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tfprune.errors import ArgumentError
from tfprune.protocols.framework import is_keras_3

Schedule = str | Callable[[float], float]


def learning_rate_at(learning_rate: float, schedule: Schedule, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch.

    With p = epoch / epochs: "constant" keeps it, "cosine" is lr (1 + cos(pi p)) / 2, "step" divides
    it by 10 at p = 0.5 and again at p = 0.75 (the CIFAR schedule of Liu et al. 2019,
    arXiv:1810.05270); a function is called with p and returns the factor.

    Raises:
        ArgumentError: an unknown schedule, or a factor that is negative or not finite.
    """
    progress = epoch / epochs
    if callable(schedule):
        factor = float(schedule(progress))
    elif schedule == "constant":
        factor = 1.0
    elif schedule == "cosine":
        factor = (1 + math.cos(math.pi * progress)) / 2
    elif schedule == "step":
        factor = 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    else:
        raise ArgumentError(
            "Expected a schedule 'constant', 'cosine', 'step', or a function of the progress in "
            f"[0, 1); received {schedule!r}."
        )
    if not math.isfinite(factor) or factor < 0:
        raise ArgumentError(f"The schedule returned the factor {factor} at {progress:.3f}.")
    return learning_rate * factor


def make_optimizer(
    keras: Any,
    optimizer: Any,
    learning_rate: float,
    decoupled_decay: float,
    variables: list[Any],
) -> Any:
    """A fresh optimizer: SGD with momentum 0.9, Adam, or one with a given one's settings.

    Args:
        keras: the module that the model belongs to.
        optimizer: "sgd", "adam", or an optimizer, of which only the configuration is taken.
        learning_rate: of the first epoch; it replaces a given optimizer's own.
        decoupled_decay: weight decay outside the gradient, for kernels only; 0 for none.
        variables: the trainable variables.

    Raises:
        ArgumentError: an unknown name, or decoupled decay asked of a given optimizer.
    """
    options: dict[str, Any] = {"learning_rate": learning_rate}
    if decoupled_decay:
        options["weight_decay"] = decoupled_decay
    if optimizer == "sgd":
        made = keras.optimizers.SGD(momentum=0.9, **options)
    elif optimizer == "adam":
        made = keras.optimizers.Adam(**options)
    elif isinstance(optimizer, keras.optimizers.Optimizer):
        if decoupled_decay:
            raise ArgumentError(
                "Decoupled weight decay is part of the optimizer: give it there, and leave "
                "weight_decay at 0 here."
            )
        config = {**optimizer.get_config(), "learning_rate": learning_rate}
        made = type(optimizer).from_config(config)
    else:
        raise ArgumentError(
            f"Expected optimizer 'sgd', 'adam', or one of {keras.__name__}.optimizers; received "
            f"{optimizer!r}."
        )
    if decoupled_decay:
        made.exclude_from_weight_decay(var_list=[v for v in variables if len(v.shape) < 2])
    return made


@contextmanager
def l2_penalty(keras: Any, model: Any, weight_decay: float) -> Iterator[None]:
    """Adds ``weight_decay / 2 * sum w^2`` over all trainable variables to the model's loss.

    Its gradient is ``weight_decay * w``, the weight decay of the papers, which comes before
    momentum and covers batch normalisation and biases. Layers and their configuration stay as
    they are: the penalty sits on the variables, and is taken off at the end.

    Raises:
        ArgumentError: a tf_keras model, whose variables cannot carry a penalty.
    """
    if not weight_decay:
        yield
        return
    if not is_keras_3(keras):
        raise ArgumentError(
            "decay='l2' works on Keras 3 models only. For a tf_keras model choose "
            "decay='decoupled', or put the penalty on its layers (kernel_regularizer)."
        )
    penalty = keras.regularizers.L2(weight_decay / 2)
    # Weights that a method updates by its own rule have no weight decay (tfprune.layers.updates).
    own = {id(variable) for variable in getattr(getattr(model, "update", None), "owned", ())}
    before = [(v, v.regularizer) for v in model.trainable_variables if id(v) not in own]
    try:
        for variable, present in before:
            variable.regularizer = penalty if present is None else _sum_of(present, penalty)
        yield
    finally:
        for variable, present in before:
            variable.regularizer = present
        # What was traced has the penalty in it, and must not serve a later fit().
        model.train_function = model.test_function = None


def _sum_of(first: Any, second: Any) -> Callable[[Any], Any]:
    return lambda variable: first(variable) + second(variable)
