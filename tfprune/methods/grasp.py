r"""GraSP: prune once, before training, so that the gradient keeps flowing.

Reference: Wang, Zhang and Grosse, "Picking Winning Tickets Before Training by Preserving Gradient
Flow", ICLR 2020, arXiv:2002.07376. The algorithm was read in the authors' code; the paper's text
was not at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from tfprune.arguments import check_whole
from tfprune.batches import iterate
from tfprune.errors import ArgumentError
from tfprune.graph.trace import all_layers
from tfprune.layers.masks import Masks
from tfprune.layers.prunable import prunable_weights
from tfprune.losses import final_activation, resolve_loss
from tfprune.methods.copies import altered_copy, head_of, linear_form, scoring_copy
from tfprune.methods.gradients import hessian_product, mean_gradient
from tfprune.methods.method import OneShotMethod
from tfprune.methods.ranking import (
    check_sparsity,
    kept_count,
    largest,
    require_no_empty,
)
from tfprune.methods.snip import normalized
from tfprune.protocols.session import reseed


@dataclass(frozen=True, eq=False)
class GraSP(OneShotMethod):
    r"""Removes the weights whose removal reduces the gradient's norm least.

    With the gradient :math:`g = \nabla_w L` and the Hessian :math:`H = \nabla^2_w L` over the
    prunable weights, the score of a weight is

    .. math:: S = -w \odot (H g) ;

    the weights with the *largest* scores go, and exactly ``round(N (1 - sparsity))`` stay. L is the
    mean cross-entropy of the logits divided by a temperature T. H is never formed: H g is the
    gradient of :math:`\langle g, \nabla_w L \rangle` with g held constant.

    As in the authors' code every batch is cut in two halves (their batch normalisation sees one
    half each), and the network is in training mode. It is a copy, so that no statistics change in
    the model itself; dropout in it is drawn from ``seed``.

    Departures: the authors keep the weight at the threshold too, so one more than asked; they draw
    all Dense kernels anew (Glorot normal) in the copy that is scored, which ``redraw_dense`` asks
    for. By default the weights that are scored are those that will be trained.

    Args:
        sparsity: fraction of zeros among all prunable weights, in [0, 1).
        data: labelled training data: a ``tf.data.Dataset`` of batches (x, y), or a pair of arrays.
            It is read twice, so a dataset must not shuffle anew for each reading. The authors use
            10 examples of each class for CIFAR-10, 5 for CIFAR-100, 1 for ImageNet.
        loss: a function of (labels, logits / T), or a Keras loss (from logits) or its name; by
            default cross-entropy as the model's last activation and the labels suggest. A softmax
            or sigmoid at the end of the model is taken off.
        temperature: T.
        batches: how many batches to use; ``None`` for all.
        batch_size: for arrays.
        redraw_dense: draw Dense kernels anew in the copy that is scored.
        seed: of those, and of dropout.
        allow_empty_layers: a layer may lose all its weights.

    Raises:
        ArgumentError: a value out of range; a sparsity at which a layer would be left empty.
    """

    sparsity: float
    data: Any = field(repr=False)
    loss: Any = None
    temperature: float = 200.0
    batches: int | None = None
    batch_size: int = 128
    redraw_dense: bool = False
    seed: int = 0
    allow_empty_layers: bool = False

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_whole("batch_size", self.batch_size, 2)
        check_whole("seed", self.seed, 0)
        if self.batches is not None:
            check_whole("batches", self.batches, 1)
        if not self.temperature > 0 or not np.isfinite(self.temperature):
            raise ArgumentError(f"Expected a positive temperature. Received: {self.temperature!r}.")

    def scores(self, model: Any) -> dict[str, Any]:
        """The scores S, divided by the sum of their magnitudes: path -> float64 array.

        Larger means: goes first.

        Raises:
            ModelError: no Keras 3 model, or one whose loss does not depend on its weights.
            DataError: no labels, no examples, or shapes that do not fit.
            ArgumentError: the loss is not given and cannot be inferred.
        """
        copy = logits_copy(model)
        if self.redraw_dense:
            _redraw_dense(copy, self.seed)
        objective: Any = None

        def halves() -> Iterator[tuple[Any, Any]]:
            nonlocal objective
            for x, y in iterate(
                self.data, batch_size=self.batch_size, limit=self.batches, labels=True,
                input_shape=copy.input_shape,
            ):  # fmt: skip
                if objective is None:
                    objective = _loss_on_logits(model, self.loss, y)
                middle = (len(y) + 1) // 2
                for part in (slice(None, middle), slice(middle, None)):
                    if len(y[part]):
                        cut = keras.tree.map_structure(lambda array, part=part: array[part], x)
                        yield cut, y[part]

        def loss(y: Any, logits: Any) -> Any:
            return objective(y, logits / self.temperature)

        weights = prunable_weights(copy)
        variables = list(weights.values())
        reseed(copy, self.seed, 0)
        gradient = mean_gradient(copy, variables, halves(), loss, training=True)
        reseed(copy, self.seed, 0)
        product = hessian_product(copy, variables, halves(), loss, training=True, vector=gradient)
        return normalized(
            {
                path: -np.asarray(variable).astype(np.float64) * part
                for (path, variable), part in zip(weights.items(), product, strict=True)
            }
        )

    def masks(self, model: Any) -> Masks:
        """Which weights stay. ``model`` stays as it is."""
        scores = {path: -score for path, score in self.scores(model).items()}
        total = sum(score.size for score in scores.values())
        kept = largest(scores, kept_count(total, self.sparsity))
        return require_no_empty(Masks(kept), self.allow_empty_layers)


def logits_copy(model: Any) -> Any:
    """A copy of a model without the softmax or sigmoid at its end."""
    plain = scoring_copy(model)
    if final_activation(plain) not in ("softmax", "sigmoid"):
        return plain
    head = head_of(plain)
    return altered_copy(plain, lambda op: linear_form(op) if op is head else None)


def _redraw_dense(model: Any, seed: int) -> None:
    """Glorot normal values for every Dense kernel, in place."""
    dense = [layer for layer in all_layers(model) if isinstance(layer, keras.layers.Dense)]
    for number, layer in enumerate(dense):
        own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) >> 1
        layer.kernel.assign(keras.initializers.GlorotNormal(own)(layer.kernel.shape))


def _loss_on_logits(model: Any, loss: Any, labels: Any) -> Any:
    if loss is not None:
        return keras.losses.get(loss) if isinstance(loss, str) else loss
    inferred = resolve_loss(model, None, labels)
    return type(inferred)(from_logits=True)
