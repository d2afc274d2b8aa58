"""The pruned structure trained from random weights: Scratch-E and Scratch-B."""

from __future__ import annotations

import math
from typing import Any

from tfprune.cost import liu_flops
from tfprune.errors import ArgumentError
from tfprune.graph.fresh import reinitialise
from tfprune.protocols.fine_tuning import fine_tune
from tfprune.protocols.framework import framework
from tfprune.protocols.record import ScratchRecord


def scratch_e(
    model: Any,
    train: Any,
    validation: Any = None,
    *,
    epochs: int,
    learning_rate: float = 0.1,
    schedule: Any = "step",
    weight_decay: float = 1e-4,
    seed: int = 0,
    **options: Any,
) -> ScratchRecord:
    """Scratch-E: trains a pruned structure from random weights for as many epochs as the dense net.

    The baseline of every pruning method: if the same structure does as well without the dense
    network's weights, pruning has found an architecture, and the weights were not worth keeping.

    The defaults are the paper's for CIFAR: SGD with momentum 0.9 at 0.1, a tenth of it from 50 %
    and again from 75 % of the epochs, weight decay 1e-4 in the gradient of everything, batches of
    64 (there with 160 epochs). Give what the dense network was trained with. A tf_keras model
    needs ``decay="decoupled"`` or ``weight_decay=0``: see :func:`tfprune.fine_tune`.

    Args:
        model: the pruned model, of Keras 3 or tf_keras. It stays as it is; its weights do not
            matter. See :func:`tfprune.protocols.reinitialise` for the weights of the copy.
        train: as for :func:`tfprune.fine_tune`.
        validation: as there.
        epochs: those that the dense network was trained for.
        learning_rate: of the first epoch.
        schedule: as in :func:`tfprune.fine_tune`: of the progress, and so stretched with the
            epochs.
        weight_decay: as there.
        seed: of the initial weights, and of everything random in the training.
        **options: all others of :func:`tfprune.fine_tune`, ``checkpoint`` among them: an
            interrupted run goes on when it is called again.

    Returns:
        :class:`tfprune.protocols.ScratchRecord`, with the trained model.

    Raises:
        ArgumentError: see :func:`tfprune.fine_tune`.
        DataError: see there.
        ModelError: the model cannot be made anew: it is subclassed, not built, or has wrappers.

    References:
        Liu, Sun, Zhou, Huang, Darrell, *Rethinking the Value of Network Pruning*,
        arXiv:1810.05270, section 3. The settings were read in the official code; the section is
        recalled, the text was not at hand. Departure: the paper's scripts note the best test
        accuracy of all epochs; here the last epoch counts, or the best by validation data
        (``restore_best``).
    """
    return _trained(
        model,
        train,
        validation,
        epochs=epochs,
        flops_ratio=1.0,
        learning_rate=learning_rate,
        schedule=schedule,
        weight_decay=weight_decay,
        seed=seed,
        **options,
    )


def scratch_b(
    model: Any,
    train: Any,
    validation: Any = None,
    *,
    dense: Any,
    epochs: int,
    max_ratio: float | None = None,
    input_shape: Any = None,
    learning_rate: float = 0.1,
    schedule: Any = "step",
    weight_decay: float = 1e-4,
    seed: int = 0,
    **options: Any,
) -> ScratchRecord:
    """Scratch-B: trains a pruned structure from random weights for the dense net's computation.

    As :func:`scratch_e`, for ``epochs * flops(dense) / flops(model)`` epochs, with
    :func:`tfprune.cost.liu_flops` as the count: the smaller network has a cheaper epoch, and gets
    more of them for the same budget. The learning rates keep their fractions of the whole.

    Args:
        model: the pruned model, of Keras 3 or tf_keras. It stays as it is.
        train: as for :func:`tfprune.fine_tune`.
        validation: as there.
        dense: the model before pruning, for its FLOPs only.
        epochs: those that the dense network was trained for.
        max_ratio: the epochs grow by no more than this factor. The paper's code has no limit on
            CIFAR (``None``), and 2 on ImageNet, where 90 epochs become at most 180.
        input_shape: shape of one example, to count FLOPs of models that leave sizes free.
        learning_rate: see :func:`scratch_e`.
        schedule: see there.
        weight_decay: see there.
        seed: see there.
        **options: see there.

    Returns:
        :class:`tfprune.protocols.ScratchRecord`, with the trained model.

    Raises:
        ArgumentError: ``dense`` counts fewer FLOPs than ``model``; see also :func:`scratch_e`.
        DataError: see :func:`tfprune.fine_tune`.
        ModelError: as for :func:`scratch_e`, or FLOPs that are not a number.

    References:
        See :func:`scratch_e`. On ImageNet the paper's code lowers the rate every 30 of 90 epochs:
        ``schedule=lambda progress: 0.1 ** int(3 * progress)``.
    """
    framework(model)
    large = liu_flops(dense, input_shape=input_shape)
    small = liu_flops(model, input_shape=input_shape)
    return _trained(
        model,
        train,
        validation,
        epochs=scratch_b_epochs(epochs, large, small, max_ratio=max_ratio),
        flops_ratio=large / small,
        learning_rate=learning_rate,
        schedule=schedule,
        weight_decay=weight_decay,
        seed=seed,
        **options,
    )


def scratch_b_epochs(
    epochs: int, dense_flops: int, pruned_flops: int, *, max_ratio: float | None = None
) -> int:
    """The epochs of Scratch-B: ``epochs * dense / pruned``, rounded down.

    Args:
        epochs: of the dense network's training.
        dense_flops: of one example, by :func:`tfprune.cost.liu_flops`.
        pruned_flops: the same of the pruned network.
        max_ratio: the ratio of FLOPs is cut to it; ``None`` for no limit. A whole number here
            gives the paper's rule for ImageNet: 180 epochs from a ratio of 2 on.

    Raises:
        ArgumentError: no epochs, no FLOPs, a ratio below 1, or a limit below 1.
    """
    if epochs < 1:
        raise ArgumentError(f"Expected epochs of at least 1; received {epochs}.")
    if pruned_flops < 1 or dense_flops < pruned_flops:
        raise ArgumentError(
            f"Expected a pruned network of fewer FLOPs than the dense one, and of some; received "
            f"{pruned_flops:,} and {dense_flops:,} (dense). Are the two models swapped?"
        )
    if max_ratio is not None and not (math.isfinite(max_ratio) and max_ratio >= 1):
        raise ArgumentError(
            f"Expected a max_ratio of at least 1, or None for no limit; received {max_ratio}."
        )
    # In whole numbers: no rounding error may cost an epoch.
    count = epochs * dense_flops // pruned_flops
    return count if max_ratio is None else min(count, int(epochs * max_ratio))


def _trained(
    model: Any,
    train: Any,
    validation: Any,
    *,
    epochs: int,
    flops_ratio: float,
    seed: int,
    **options: Any,
) -> ScratchRecord:
    framework(model)
    fresh = reinitialise(model, seed=seed)
    record = fine_tune(fresh, train, validation, epochs=epochs, seed=seed, **options)
    return ScratchRecord(model=fresh, record=record, epochs=epochs, flops_ratio=flops_ratio)
