r"""Pruning the smallest weights of the whole network.

Reference: Liu, Sun, Zhou, Huang and Darrell, "Rethinking the Value of Network Pruning", ICLR 2019,
arXiv:1810.05270, the unstructured experiments and the comparison with lottery tickets. The rules
were read in the authors' code; the paper's text was not at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tfprune.arguments import check_whole
from tfprune.graph.trace import all_layers, raw_variable
from tfprune.layers.masks import Masks
from tfprune.layers.prunable import prunable_weights
from tfprune.methods.method import IterativeMethod, plain_copy, values
from tfprune.methods.ranking import Array, check_sparsity, require_no_empty


@dataclass(frozen=True)
class GlobalMagnitude(IterativeMethod):
    r"""Prunes the smallest weights of all convolutions together, once or in rounds.

    With N weights, sorted by magnitude, :math:`t = \mathrm{sorted}[\lfloor N p \rfloor]` (from 0),
    and a weight stays if :math:`|w| > t`. So one weight more than :math:`\lfloor N p \rfloor` goes,
    and all that tie with it; that is the authors' rule, kept so that their figures come out.

    In rounds, each removes the same fraction p of the weights that are left, with
    :math:`(1 - p)^{\mathrm{rounds}} = 1 - \mathrm{sparsity}`: with z zeros,
    :math:`t = \mathrm{sorted}[z + \lfloor (N - z) p \rfloor]`. The weights that stay are trained on
    from their values.

    Departures: the authors' code takes a weight for pruned when it is zero; here the masks are
    kept apart, so a weight that passes through zero goes on. A layer that loses all its weights is
    an error here, a printed line there.

    Args:
        sparsity: final fraction of zeros among the ranked weights, in [0, 1).
        dense: also rank the kernels of Dense and all other layers; by default those of
            convolutions only, and the others stay dense.
        rounds: how often to prune; the first time is before training.
        epochs_per_round: of training between two rounds.
        allow_empty_layers: a layer may lose all its weights.

    Raises:
        ArgumentError: a value out of range; a sparsity at which a layer would be left empty; in
            later rounds that is raised during training.
    """

    sparsity: float
    dense: bool = False
    rounds: int = 1
    epochs_per_round: int = 1
    allow_empty_layers: bool = False

    changes_masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_whole("rounds", self.rounds, 1)
        check_whole("epochs_per_round", self.epochs_per_round, 1)

    def masks(self, model: Any, round_number: int = 0, current: Masks | None = None) -> Masks:
        """Which weights stay in a round. ``model`` stays as it is."""
        weights = values(model, current)
        ranked = list(weights) if self.dense else convolutions(model)
        ratio = self.sparsity
        if self.rounds > 1:
            ratio = 1 - (1 - self.sparsity) ** (1 / self.rounds)
        chosen = global_masks(
            {path: weights[path] for path in ranked},
            ratio,
            None if current is None else {path: current[path] for path in ranked},
        )
        return require_no_empty(Masks.over(model, chosen), self.allow_empty_layers)


def global_masks(
    weights: Mapping[str, Array], ratio: float, masks: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The authors' rule: keep what is strictly larger than the threshold, over all weights.

    Args:
        weights: path -> array.
        ratio: p, the fraction of the weights left that goes, in [0, 1).
        masks: path -> array of truth values: what is left; ``None`` for everything.

    Returns:
        Path -> array of truth values.
    """
    left = masks or {path: np.ones(array.shape, np.bool_) for path, array in weights.items()}
    # what is gone sorts first, whatever value it has
    magnitudes = {
        path: np.where(left[path], np.abs(array), -1.0) for path, array in weights.items()
    }
    flat = np.concatenate([array.ravel() for array in magnitudes.values()])
    count = int(sum(np.count_nonzero(left[path]) for path in weights))
    index = (flat.size - count) + int(count * ratio)
    threshold = np.partition(flat, index)[index]
    return {path: array > max(threshold, 0.0) for path, array in magnitudes.items()}


def convolutions(model: Any) -> list[str]:
    """The paths of the prunable kernels of convolutions, in the model's order.

    Raises:
        ModelError: no built Keras 3 model, or an unknown layer in it.
    """
    kernels = {
        id(raw_variable(variable))
        for layer in all_layers(model)
        if hasattr(layer, "kernel_size")
        for variable in layer.weights
    }
    weights = prunable_weights(model)
    return [path for path, variable in weights.items() if id(raw_variable(variable)) in kernels]


def redrawn(model: Any, masks: Masks, *, seed: int = 0) -> Any:
    r"""The sparse network with new random weights: "Scratch" of the unstructured experiments.

    Every convolution's kernel is drawn from :math:`N(0, \sqrt{2 / n_l})` (the second is the
    standard deviation), where :math:`n_l` is its number of weights that stay, divided by its number
    of input channels: the fan-out of what stays. Then the masks are applied. All other weights keep
    their values, so give a model that was just initialised.

    Args:
        model: a Keras 3 model. It stays as it is.
        masks: for its prunable weights.
        seed: from 0.

    Returns:
        A new plain model with zeros; train it with ``with_masks(result, masks)``.

    Raises:
        ArgumentError: masks that do not fit, or that leave nothing of a kernel.
        ModelError: no built Keras 3 model, or an unknown layer in it.
    """
    check_whole("seed", seed, 0)
    masks.check(model)
    paths = convolutions(model)
    require_no_empty(Masks({path: masks[path] for path in paths}), allowed=False)
    copy = plain_copy(model)
    weights = prunable_weights(copy)
    for number, path in enumerate(paths):
        shape = tuple(weights[path].shape)
        fan_out = np.count_nonzero(masks[path]) / shape[-2]
        values = np.random.default_rng([seed, number]).normal(0, math.sqrt(2 / fan_out), shape)
        weights[path].assign(values)
    masks.zero(copy)
    return copy
