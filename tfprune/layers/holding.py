"""Masks from elsewhere: given to wrappers, held or replaced while training goes on."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfprune.errors import ArgumentError
from tfprune.layers.distribution import strategy_scope
from tfprune.layers.masks import Masks
from tfprune.layers.prunable import is_wrapper, prunable_of, require_built, walk
from tfprune.layers.wrapping import wrap_layers
from tfprune.schedules import Fixed


def with_masks(model: Any, masks: Masks) -> Any:
    """A copy of ``model`` whose masked weights are zero and stay zero in training.

    Args:
        model: a built Keras 3 functional, sequential or nested model.
        masks: for its prunable weights, from any method, ``Masks.of_zeros`` or a file; those that
            are not mentioned stay whole.

    Returns:
        A wrapped model, uncompiled. Train it with ``UpdatePruningStep`` like every wrapped model.

    Raises:
        ArgumentError: a mask does not fit.
        ModelError: the model cannot be wrapped.
    """
    Masks.over(model, masks)
    result = wrap_layers(
        model, lambda layer: True, {"pruning_schedule": Fixed(masks.sparsity)}
    )  # fmt: skip
    set_masks(result, masks)
    return result


def set_masks(model: Any, masks: Masks) -> None:
    """Replaces masks of a wrapped model in place, and masks its weights.

    Wrapped weights that ``masks`` does not mention keep the masks they have.

    Args:
        model: a wrapped model; it may be in training, under any distribution strategy.
        masks: for weights that have a wrapper.

    Raises:
        ArgumentError: a mask does not fit, or would zero a weight that has no wrapper.
        ModelError: no built Keras 3 model.
    """
    current = masks_of(model)
    Masks.over(model, {**current, **masks})  # refuses what does not fit
    bare = [path for path in masks if path not in current and not masks[path].all()]
    if bare:
        raise ArgumentError(
            f"Expected masks with zeros only for weights with a pruning wrapper. Received: some "
            f"for {bare}, whose layers have none. Make the model with "
            "tfprune.layers.with_masks, or wrap those layers too."
        )
    with strategy_scope(model):
        for path, layer in walk(model):
            if not is_wrapper(layer):
                continue
            for weight, (_, mask, _) in zip(
                prunable_of(layer.layer, path), layer.pruning_vars, strict=True
            ):
                given = masks.get(f"{path}/{weight.name}")
                if given is not None:
                    mask.assign(np.asarray(given, dtype=mask.dtype))
            layer.mask_weights()


def masks_of(model: Any) -> Masks:
    """The masks that the wrappers of a model hold at present.

    Raises:
        ModelError: no built Keras 3 model.
    """
    require_built(model)
    return Masks(
        {
            f"{path}/{weight.name}": mask
            for path, layer in walk(model)
            if is_wrapper(layer)
            for weight, mask in zip(prunable_of(layer.layer, path), layer.masks, strict=True)
        }
    )
