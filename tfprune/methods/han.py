r"""Iterative pruning by each layer's own threshold, as deep compression began.

Reference: Han, Pool, Tran and Dally, "Learning both Weights and Connections for Efficient Neural
Networks", NIPS 2015, arXiv:1506.02626, section 3. Algorithm, retraining and the dropout formula
were checked against the paper's text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tfprune.arguments import check_whole
from tfprune.errors import ArgumentError
from tfprune.layers.masks import Mask, Masks
from tfprune.methods.method import IterativeMethod, values
from tfprune.methods.ranking import (
    Array,
    check_sparsity,
    largest,
    match,
    require_no_empty,
)

Amount = float | Mapping[str, float]


@dataclass(frozen=True)
class Han(IterativeMethod):
    r"""Prunes, in every layer, what is small for that layer; retrains the rest; repeats.

    In layer l a weight stays if

    .. math:: |w| > t_l, \qquad t_l = q_l \, \mathrm{std}(W_l),

    with a quality parameter :math:`q_l` that the paper sets by the layer's sensitivity, smallest
    for the first convolution. What stays is trained on *from its values*, not drawn anew; the
    learning rate should be lower than in the first training (a tenth for MNIST, a hundredth for
    AlexNet). Then the next round prunes with larger thresholds. With normally distributed weights
    q = 0.25, 0.5, 1 and 2 prune 20, 38, 68 and 95 %.

    The paper does not say over which weights a later round takes the standard deviation; here it
    is over those that are left, in the first round over all. Neurons without inputs or outputs are
    removed by ``finish(..., structured=True)``. Convolutions and dense layers can be pruned in
    separate phases: a weight that no path or pattern fits is left as it is in that round (the paper
    also freezes the layers of the other phase, which is up to ``trainable``).

    Args:
        quality: q: a number for all layers, or a mapping from paths of weights, or shell patterns
            (``"conv*/kernel"``), to numbers; or a list of such, one per round.
        sparsity: instead of ``quality``, in the same forms: the fraction of zeros that a weight is
            to have after the round; ``round(N (1 - sparsity))`` of it stay exactly.
        epochs_per_round: of training between two rounds; the last round has what is left.
        allow_empty_layers: a layer may lose all its weights.

    Raises:
        ArgumentError: not one of ``quality`` and ``sparsity``; a value out of range; a path that
            the model does not have; a threshold at which a layer would be left empty, in later
            rounds during training.
    """

    quality: Amount | Sequence[Amount] | None = None
    sparsity: Amount | Sequence[Amount] | None = None
    epochs_per_round: int = 1
    allow_empty_layers: bool = False

    changes_masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.quality is None) == (self.sparsity is None):
            raise ArgumentError(
                "Expected either quality or sparsity. Received: "
                f"quality={self.quality!r}, sparsity={self.sparsity!r}."
            )
        check_whole("epochs_per_round", self.epochs_per_round, 1)
        if not self.amounts:
            raise ArgumentError("Expected at least one round. Received: an empty list.")
        for amount in self.amounts:
            for value in amount.values() if isinstance(amount, Mapping) else [amount]:
                if self.quality is None:
                    check_sparsity(value)
                else:
                    _check_quality(value)

    @property
    def amounts(self) -> tuple[Amount, ...]:
        """Quality or sparsity, round by round."""
        given = self.sparsity if self.quality is None else self.quality
        return tuple(given) if isinstance(given, list | tuple) else (given,)  # type: ignore[return-value]

    @property
    def rounds(self) -> int:  # type: ignore[override]
        """How often weights are pruned; the first time is before training."""
        return len(self.amounts)

    def masks(self, model: Any, round_number: int = 0, current: Masks | None = None) -> Masks:
        """Which weights stay in a round. ``model`` stays as it is."""
        weights = values(model, current)
        amount = self.amounts[round_number]
        by_path = match(amount if isinstance(amount, Mapping) else {"*": amount}, weights)
        chosen = dict(current or {})
        for path, value in by_path.items():
            left = None if current is None else current[path]
            if self.quality is None:
                chosen[path] = _at_sparsity(path, weights[path], value, left)
            else:
                chosen[path] = std_mask(weights[path], value, left)
        return require_no_empty(Masks.over(model, chosen), self.allow_empty_layers)


def std_mask(weight: Array, quality: float, left: Mask | None = None) -> Mask:
    """What is larger in magnitude than ``quality`` standard deviations of the weights left.

    Args:
        weight: any shape.
        quality: q, from 0.
        left: which elements are left; ``None`` for all.
    """
    left = np.ones(weight.shape, np.bool_) if left is None else left
    if not left.any():
        return left
    threshold = quality * float(np.std(weight[left]))
    return left & (np.abs(weight) > threshold)


def corrected_dropout(rate: float, before: int, after: int) -> float:
    r"""The dropout rate for retraining, :math:`D_r = D_o \sqrt{C_{ir} / C_{io}}`.

    A pruned layer has less capacity, and needs less dropout (section 3.2 of the paper).

    Args:
        rate: D_o, the fraction dropped in the first training, in [0, 1).
        before: C_io, the connections of the layer before pruning.
        after: C_ir, those after.

    Raises:
        ArgumentError: a rate out of range, or not 0 <= after <= before with before > 0.
    """
    if not 0 <= rate < 1:
        raise ArgumentError(f"Expected a dropout rate in [0, 1). Received: {rate!r}.")
    if not 0 <= after <= before or before == 0:
        raise ArgumentError(
            "Expected the connections before pruning, and those after, which are no more. "
            f"Received: before={before!r}, after={after!r}."
        )
    return rate * math.sqrt(after / before)


def _at_sparsity(path: str, weight: Array, sparsity: float, left: Mask | None) -> Mask:
    magnitudes = np.abs(weight)
    kept = round(weight.size * (1 - sparsity))
    if left is not None:
        magnitudes = np.where(left, magnitudes, -np.inf)
        count = int(np.count_nonzero(left))
        if kept > count:
            raise ArgumentError(
                f"Expected a sparsity of at least {1 - count / weight.size:.6g} for {path!r}, "
                f"which it has from the round before. Received: {sparsity}."
            )
    return largest({path: magnitudes}, kept)[path]


def _check_quality(value: Any) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value < 0
    ):
        raise ArgumentError(
            "Expected quality as a number from 0, in standard deviations of a layer's weights. "
            f"Received: {value!r}."
        )
