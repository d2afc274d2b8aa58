"""Dense-sparse-dense training: pruning for a while, as a regulariser.

Reference: Han, Pool, Narang, Mao et al., "DSD: Dense-Sparse-Dense Training for Deep Neural
Networks", ICLR 2017, arXiv:1607.04381. Checked against the paper's text. The authors published
models, no training code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tfprune.arguments import check_whole
from tfprune.errors import ArgumentError
from tfprune.layers import masks_of, set_masks, with_masks
from tfprune.layers.masks import Masks
from tfprune.layers.prunable import prunable_weights
from tfprune.methods.global_magnitude import convolutions
from tfprune.methods.method import AtEpochs, MaskMethod, plain_copy, values
from tfprune.methods.ranking import check_sparsity, kept_count, largest, match
from tfprune.protocols.optimizers import learning_rate_at


@dataclass(frozen=True)
class DSD(MaskMethod):
    """Trains dense, then sparse, then dense again; the result has the size it had, and is better.

    1. Dense: ``dense_epochs`` of ordinary training; 0 for a model that is trained already.
    2. Sparse: in every layer but the first convolution the ``round(N (1 - sparsity))`` largest
       weights stay, chosen once; ``sparse_epochs`` with these masks.
    3. Dense: the masks go, the weights that come back start from 0, and all are trained for the
       rest of the epochs at a lower learning rate, with everything else as it was.

    The optimizer's state of the weights that come back is set to its initial value: what it
    gathered while they were masked is not about them.

    Args:
        sparsity: in the second phase, the same for all layers. The paper uses 25 to 50 %, 30 % for
            all its convolutional networks.
        dense_epochs, sparse_epochs: lengths of the first two phases. The paper's for ResNet-50 on
            ImageNet are 90 and 45, and 45 more.
        exclude: paths or shell patterns of weights that stay dense throughout; ``None`` for the
            first convolution, as in the paper.
        learning_rate_factors: in the three phases, on the learning rate of :meth:`run`. The
            default is the paper's for ResNet-50: 1e-1, 1e-2, 1e-3.

    Raises:
        ArgumentError: a value out of range, or a pattern that fits no weight.
    """

    sparsity: float = 0.3
    dense_epochs: int = 0
    sparse_epochs: int = 1
    exclude: Sequence[str] | None = None
    learning_rate_factors: tuple[float, float, float] = (1.0, 0.1, 0.01)

    changes_masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_whole("dense_epochs", self.dense_epochs, 0)
        check_whole("sparse_epochs", self.sparse_epochs, 1)
        factors = tuple(self.learning_rate_factors)
        if len(factors) != 3 or not all(np.isfinite(f) and f > 0 for f in factors):
            raise ArgumentError(
                "Expected learning_rate_factors as three positive numbers, one per phase. "
                f"Received: {self.learning_rate_factors!r}."
            )
        if isinstance(self.exclude, str):
            raise ArgumentError(
                f"Expected exclude as a list of paths or patterns. Received: {self.exclude!r}."
            )

    @property
    def epochs_needed(self) -> int:
        """Those of the first two phases, and one of the third."""
        return self.dense_epochs + self.sparse_epochs + 1

    def masks(self, model: Any) -> Masks:
        """Those of the sparse phase, from the weights of ``model``, which stays as it is."""
        weights = values(model)
        dense = convolutions(model)[:1] if self.exclude is None else self.exclude
        excluded = match(dict.fromkeys(dense, True), weights)
        chosen = {
            path: largest({path: np.abs(weight)}, kept_count(weight.size, self.sparsity))[path]
            for path, weight in weights.items()
            if path not in excluded
        }
        return Masks.over(model, chosen)

    def learning_rate_factor(self, epoch: int) -> float:
        """The factor on the learning rate in an epoch, counted from 0.

        For training without :meth:`run`: ``keras.callbacks.LearningRateScheduler(lambda epoch:
        0.1 * method.learning_rate_factor(epoch))``.
        """
        phase = (epoch >= self.dense_epochs) + (epoch >= self.dense_epochs + self.sparse_epochs)
        return self.learning_rate_factors[phase]

    def prepare(self, model: Any) -> Any:
        """A copy of the model with masks of ones, which the callbacks change."""
        copy = plain_copy(model)
        self.masks(copy)  # refuses patterns and sparsities that do not fit, before any training
        return with_masks(copy, Masks.ones(copy))

    def callbacks(self) -> list[Any]:
        """What sets the masks, releases them, and holds them in between."""
        released = self.dense_epochs + self.sparse_epochs
        actions = {self.dense_epochs: self._sparsify, released: release}
        return [AtEpochs(actions), *super().callbacks()]

    def _sparsify(self, model: Any) -> None:
        set_masks(model, self.masks(model))

    def fit_options(self, epochs: int, options: dict[str, Any]) -> dict[str, Any]:
        options = super().fit_options(epochs, options)
        given = options.get("schedule", "constant")

        def schedule(progress: float) -> float:
            epoch = round(progress * epochs)
            return learning_rate_at(1.0, given, epoch, epochs) * self.learning_rate_factor(epoch)

        return {**options, "schedule": schedule}


def release(model: Any) -> None:
    """Lifts all masks of a model in training, *in place*.

    Weights that come back start from 0, and so do their entries in the optimizer's state
    (accumulators of Adagrad and Ftrl from their initial value). State that is not kept weight by
    weight, as Adafactor's, stays. To be called in the scope of the model's strategy.
    """
    masks = masks_of(model)
    masks.zero(model)
    set_masks(model, Masks.ones(model))
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return
    weights = prunable_weights(model)
    slots = slots_of(optimizer, model.trainable_variables)
    initial = float(getattr(optimizer, "initial_accumulator_value", 0.0))
    for path, weight in weights.items():
        for name, slot in slots.get(weight.path, {}).items():
            value = np.asarray(slot)
            start = initial if name == "accumulator" else 0.0
            slot.assign(np.where(masks[path], value, np.asarray(start, value.dtype)))


def slots_of(optimizer: Any, variables: Sequence[Any]) -> Mapping[str, dict[str, Any]]:
    """The variables that a Keras 3 optimizer keeps weight by weight.

    Keras names them after the weight's path (``"conv_kernel_momentum"``); of several weights whose
    paths fit, the longest is meant.

    Returns:
        Path of the weight -> name such as ``"momentum"`` -> variable of the weight's shape.
    """
    prefixes = {variable.path.replace("/", "_") + "_": variable for variable in variables}
    found: dict[str, dict[str, Any]] = {}
    for slot in optimizer.variables:
        fitting = [
            prefix
            for prefix, variable in prefixes.items()
            if slot.name.startswith(prefix) and tuple(slot.shape) == tuple(variable.shape)
        ]
        if fitting:
            prefix = max(fitting, key=len)
            found.setdefault(prefixes[prefix].path, {})[slot.name.removeprefix(prefix)] = slot
    return found
