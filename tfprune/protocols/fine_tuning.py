"""Fine-tuning that can be watched, interrupted and resumed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tfprune.batches import is_dataset
from tfprune.errors import ArgumentError, DataError
from tfprune.losses import classification_loss
from tfprune.protocols.checkpoint import TrainingState, load
from tfprune.protocols.distillation import Distillation, check_teacher, distilled, settings_of
from tfprune.protocols.framework import framework
from tfprune.protocols.optimizers import Schedule, l2_penalty, learning_rate_at, make_optimizer
from tfprune.protocols.record import FineTuneRecord, best_epoch
from tfprune.protocols.session import Session
from tfprune.protocols.training_data import fixed_order, training_data


def fine_tune(
    model: Any,
    train: Any,
    validation: Any = None,
    *,
    epochs: int,
    learning_rate: float = 1e-3,
    schedule: Schedule = "constant",
    optimizer: Any = "sgd",
    weight_decay: float = 0.0,
    decay: str = "l2",
    loss: Any = None,
    metrics: Sequence[Any] | None = None,
    batch_size: int = 64,
    patience: int | None = None,
    restore_best: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    seed: int = 0,
    verbose: int = 1,
    callbacks: Sequence[Any] = (),
    on_epoch_end: Callable[[int, Mapping[str, float]], None] | None = None,
    teacher: Any = None,
    distillation: Distillation | None = None,
) -> FineTuneRecord:
    """Trains a model in place, after pruning or from scratch, and says how it went.

    The defaults are the retraining of Li et al. 2017: SGD with momentum 0.9 at a constant learning
    rate of 1e-3. Which epoch is best, and when to stop early, is decided on the validation data;
    give no test data here.

    *Interruptions.* With ``checkpoint`` the whole state (weights, optimizer, history) is on disk
    after every epoch, and the initial state before the first. The file is replaced in one step, so
    that Ctrl-C or a crash leaves the last whole epoch; the interruption itself is passed on. The
    same call then goes on from there, and ends in the very weights that it would have had
    without the interruption, on the same machine and software, where these are deterministic (a
    CPU is; for a GPU see ``tf.config.experimental.enable_op_determinism``). For that the order of
    the data and the seeds of dropout and the like are made from (seed, epoch):

    - arrays, and a function from the epoch's number to its dataset (such as
      ``tfprune.data.Splits.train_epoch``) satisfy this by themselves;
    - a ``tf.data.Dataset`` does if all its randomness is in seeded ``shuffle`` and
      ``Dataset.random``, and if it is made anew for the resumed call, as a new process does;
    - layers of tf_keras draw from TensorFlow's generator, which is not restored: with dropout, a
      resumed run of a tf_keras model differs;
    - the state of ``callbacks`` is not on file; their training begins again.

    Args:
        model: a built Keras 3 or tf_keras model. It is left compiled with what was used here.
        train: batches ``(x, y)`` as a ``tf.data.Dataset``, a pair of arrays, or a function from
            the epoch's number (from 0) to its dataset.
        validation: a ``tf.data.Dataset`` or a pair of arrays, or ``None``.
        epochs: passes over the training data, those on file included.
        learning_rate: of the first epoch.
        schedule: "constant", "cosine" (to 0), "step" (a tenth at 50 % and at 75 % of the epochs),
            or a function from the progress in [0, 1) to a factor. Changes at every epoch.
        optimizer: "sgd", "adam", or an optimizer of the model's Keras, whose configuration is
            copied, except for its learning rate.
        weight_decay: coefficient of the gradient's term ``weight_decay * w``.
        decay: "l2" adds it to the gradients of *all* trainable variables, batch normalisation
            and biases included, before momentum, as the papers' codes do (the reported loss then
            includes the penalty); "decoupled" subtracts ``learning rate * weight_decay * w``
            from kernels only (variables of two or more axes).
        loss: a Keras loss; ``None`` infers the cross-entropy from the last layer (softmax,
            sigmoid of one unit, or logits) and from the labels (integers or one-hot).
        metrics: as in ``compile``; ``None`` is the accuracy where the loss is inferred.
        batch_size: of the batches cut from arrays.
        patience: stop after so many epochs in a row without a better validation result.
        restore_best: end with the weights of the best epoch instead of the last.
        checkpoint: file for the state; written over.
        resume: go on from ``checkpoint`` if it is there.
        seed: of everything random here.
        verbose: 0 silent, 1 a progress bar, 2 a line per epoch, as in ``fit``.
        callbacks: of the model's Keras.
        on_epoch_end: called with the epoch's number and its history values, after its checkpoint.
        teacher: a model from whose outputs this one learns as well as from the labels, such as the
            one before pruning. It sees the same batches, in inference mode, and stays as it is.
            Both models return logits or the probabilities of a softmax. Validation figures are
            those of the model alone.
        distillation: temperature and weight of the teacher's part; ``None`` with a teacher is
            :class:`tfprune.protocols.Distillation` as it comes. With weight 0 the teacher is not
            asked at all.

    Returns:
        :class:`tfprune.protocols.FineTuneRecord`.

    Raises:
        ArgumentError: a value out of range, a loss that cannot be inferred, a checkpoint of
            another run, a teacher that does not fit.
        DataError: no examples, no labels, no end, or shapes that do not fit the model.
        ModelError: not a Keras model, or not built.

    References:
        Li et al., arXiv:1608.08710: 40 epochs on CIFAR-10, 20 on ImageNet, at 1e-3. Liu et al.,
        arXiv:1810.05270, for "step" and for weight decay 1e-4 on everything.
    """
    keras = framework(model)
    _check(epochs, learning_rate, weight_decay, decay, batch_size, patience, seed)
    if validation is None and (patience is not None or restore_best):
        raise DataError("patience and restore_best choose by validation data, and none were given.")
    distillation = _check_distillation(model, teacher, distillation)
    rates = [learning_rate_at(learning_rate, schedule, epoch, epochs) for epoch in range(epochs)]
    settings = {
        "seed": seed,
        # One number for a constant rate, so that a finished run can be given more epochs.
        "learning rate": rates if len(set(rates)) > 1 else rates[0],
        "optimizer": optimizer if isinstance(optimizer, str) else type(optimizer).__name__,
        "weight decay": [weight_decay, decay] if weight_decay else 0,
        "batch size": None if is_dataset(train) or callable(train) else batch_size,
        "restore best": restore_best,
        "shapes of the weights": [list(variable.shape) for variable in model.weights],
    }
    path = None if checkpoint is None else Path(checkpoint)
    if distillation is not None and path is not None:
        settings |= settings_of(keras, teacher, distillation)
    state = TrainingState()
    if path is not None and resume and path.exists():
        state = load(path, settings)
    resumed_from = state.epochs

    input_shape = getattr(model, "input_shape", None)
    data = training_data(
        train, batch_size=batch_size, seed=seed, finished=resumed_from, input_shape=input_shape
    )
    if validation is not None:
        validation = fixed_order(validation, batch_size=batch_size, input_shape=input_shape)
    if loss is None:
        loss = classification_loss(keras, model, data.label_shape)
        metrics = ["accuracy"] if metrics is None else metrics
    decoupled = weight_decay if decay == "decoupled" else 0.0
    made = make_optimizer(
        keras, optimizer, learning_rate, decoupled, list(model.trainable_variables)
    )
    with (
        l2_penalty(keras, model, weight_decay if decay == "l2" else 0.0),
        distilled(keras, model, loss, teacher, distillation) as (loss, first),
    ):
        model.compile(optimizer=made, loss=loss, metrics=None if metrics is None else [*metrics])
        model.optimizer.build(model.trainable_variables)
        session = Session(
            keras,
            model,
            seed=seed,
            path=path,
            settings=settings,
            state=state,
            keep_best=restore_best,
        )
        watchers = keras.callbacks.CallbackList(
            [*first, *callbacks],
            add_history=True,
            add_progbar=verbose != 0,
            model=model,
            verbose=verbose,
            epochs=epochs,
            steps=data.steps,
        )
        begin, end = watchers.on_train_begin, watchers.on_train_end
        # fit() is called for one epoch at a time; for the callbacks it is one training.
        watchers.on_train_begin = watchers.on_train_end = _ignore
        begin()
        while not session.is_over(epochs, patience):
            epoch = state.epochs
            values = session.run_epoch(data.epoch(epoch), validation, rates[epoch], watchers)
            if on_epoch_end is not None:
                on_epoch_end(epoch, values)
        end()
    if restore_best:
        session.restore_best()
    return FineTuneRecord(
        epochs=state.epochs,
        history=MappingProxyType({key: tuple(series) for key, series in state.history.items()}),
        best_epoch=best_epoch(state.history),
        seed=seed,
        seconds=state.seconds,
        resumed_from=resumed_from,
        stopped_early=state.epochs < epochs,
        restored_best=restore_best,
    )


def _ignore(logs: Any = None) -> None:
    """In the place of a callback list's method."""


def _check_distillation(
    model: Any, teacher: Any, distillation: Distillation | None
) -> Distillation | None:
    """What to distil with; ``None`` for not at all."""
    if teacher is None:
        if distillation is not None:
            raise ArgumentError("Expected a teacher to distil from; received distillation alone.")
        return None
    check_teacher(model, teacher)
    distillation = Distillation() if distillation is None else distillation
    return distillation if distillation.weight else None


def _check(
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    decay: str,
    batch_size: int,
    patience: int | None,
    seed: int,
) -> None:
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        if value is not None and value < 1:
            raise ArgumentError(f"Expected {name} of at least 1; received {value}.")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ArgumentError(f"Expected a positive learning_rate; received {learning_rate}.")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ArgumentError(f"Expected a weight_decay from 0; received {weight_decay}.")
    if decay not in ("l2", "decoupled"):
        raise ArgumentError(f"Expected decay 'l2' or 'decoupled'; received {decay!r}.")
    if seed < 0:
        raise ArgumentError(f"Expected a seed from 0; received {seed}.")
