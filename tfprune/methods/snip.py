r"""SNIP: prune once, before training, by the sensitivity of the loss to each connection.

Reference: Lee, Ajanthan and Torr, "SNIP: Single-shot Network Pruning based on Connection
Sensitivity", ICLR 2019, arXiv:1810.02340. The algorithm below was checked against the paper's text,
the departures against the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfprune.arguments import check_whole
from tfprune.batches import iterate
from tfprune.errors import ModelError
from tfprune.layers.masks import Masks
from tfprune.layers.prunable import prunable_weights
from tfprune.methods.copies import scoring_copy
from tfprune.methods.gradients import mean_gradient, objective_of
from tfprune.methods.method import OneShotMethod
from tfprune.methods.ranking import (
    check_sparsity,
    kept_count,
    largest,
    require_no_empty,
)


@dataclass(frozen=True, eq=False)
class SNIP(OneShotMethod):
    r"""Keeps the connections to which the loss is most sensitive, over all layers jointly.

    With an indicator :math:`c_j = 1` on every weight, the sensitivity is

    .. math:: g_j = \partial L(c \odot w) / \partial c_j = w_j \, \partial L / \partial w_j,
        \qquad s_j = |g_j| / \textstyle\sum_k |g_k| ,

    and the :math:`\kappa = \mathrm{round}(N (1 - \mathrm{sparsity}))` largest :math:`s_j` stay.
    It is meant for a network at its initial values, drawn with a variance-scaling initialiser
    (``"glorot_..."``, ``"he_..."``), which is then trained with the masks held.

    Departures: the authors rank biases as well (as they start at zero, all of them are pruned for
    good); here biases and normalisation stay. The authors score one random draw of the weights and
    train another; for that use ``with_masks(other_model, method.masks(model))``. Several batches
    are summed before the absolute value is taken, each by its number of examples. As in the
    authors' code, batch normalisation works in inference mode.

    Args:
        sparsity: fraction of zeros among all prunable weights, in [0, 1).
        data: labelled training data: a ``tf.data.Dataset`` of batches (x, y), or a pair of arrays.
        loss: a function of (labels, outputs), or a Keras loss or its name; by default
            cross-entropy as the model's last activation and the labels suggest.
        batches: how many batches to use; the paper uses one. ``None`` for all.
        batch_size: for arrays. The paper uses 100 (MNIST) and 128 (CIFAR).
        allow_empty_layers: a layer may lose all its weights, which SNIP does to some at high
            sparsity.

    Raises:
        ArgumentError: a value out of range; a sparsity at which a layer would be left empty.
    """

    sparsity: float
    data: Any = field(repr=False)
    loss: Any = None
    batches: int | None = 1
    batch_size: int = 128
    allow_empty_layers: bool = False

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_whole("batch_size", self.batch_size, 1)
        if self.batches is not None:
            check_whole("batches", self.batches, 1)

    def scores(self, model: Any) -> dict[str, Any]:
        """The sensitivities s: path -> float64 array of the weight's shape; all sum to 1.

        Raises:
            ModelError: no Keras 3 model, or one whose loss does not depend on its weights.
            DataError: no labels, no examples, or shapes that do not fit.
        """
        copy = scoring_copy(model)
        weights = prunable_weights(copy)
        batches = iterate(
            self.data, batch_size=self.batch_size, limit=self.batches, labels=True,
            input_shape=copy.input_shape,
        )  # fmt: skip
        objective, batches = objective_of(copy, self.loss, batches)
        gradients = mean_gradient(copy, list(weights.values()), batches, objective, training=False)
        products = {
            path: np.abs(np.asarray(variable).astype(np.float64) * gradient)
            for (path, variable), gradient in zip(weights.items(), gradients, strict=True)
        }
        return normalized(products)

    def masks(self, model: Any) -> Masks:
        """Which weights stay. ``model`` stays as it is."""
        scores = self.scores(model)
        total = sum(score.size for score in scores.values())
        kept = largest(scores, kept_count(total, self.sparsity))
        return require_no_empty(Masks(kept), self.allow_empty_layers)


def normalized(scores: dict[str, Any]) -> dict[str, Any]:
    """The scores divided by the sum of their magnitudes.

    Raises:
        ModelError: all are zero, or one is not finite.
    """
    total = sum(float(np.abs(score).sum()) for score in scores.values())
    if not np.isfinite(total) or total == 0:
        raise ModelError(
            "Expected a loss that depends on the weights and finite gradients. Received: "
            f"gradients whose products with the weights sum to {total}. Are the weights zero or "
            "NaN, or is the output constant?"
        )
    return {path: score / total for path, score in scores.items()}
