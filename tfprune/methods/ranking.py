"""From scores to masks: how many weights stay, and which.

Counts are exact and ties are broken by position, weights in the order of the model's layers and
elements in the order of memory, so that equal scores give equal masks everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.errors import ArgumentError, ModelError
from tfprune.layers.masks import Mask, Masks

Array = NDArray[Any]


def check_sparsity(sparsity: Any, name: str = "sparsity") -> float:
    """The sparsity as a float.

    Raises:
        ArgumentError: it is no number from 0 up to, but not including, 1.
    """
    if (
        isinstance(sparsity, bool)
        or not isinstance(sparsity, int | float | np.number)
        or not math.isfinite(sparsity)
        or not 0 <= sparsity < 1
    ):
        raise ArgumentError(
            f"Expected {name} as a fraction of zeros, from 0 to less than 1. "
            f"Received: {sparsity!r}."
        )
    return float(sparsity)


def kept_count(total: int, sparsity: float) -> int:
    """How many of ``total`` weights stay: ``round(total * (1 - sparsity))``, halves to even.

    Lee et al. (SNIP) write kappa for it, Han et al. (DSD) k; tfmot rounds in the same way.

    Raises:
        ArgumentError: none would stay.
    """
    kept = round(total * (1 - sparsity))
    if kept < 1:
        raise ArgumentError(
            f"Expected a sparsity at which some of {total} weights stay, at most "
            f"{1 - 1 / total if total else 0:.6g}. Received: {sparsity}."
        )
    return kept


def largest(scores: Mapping[str, Array], kept: int) -> dict[str, Mask]:
    """Masks that keep exactly ``kept`` weights, those of the largest scores, over all layers.

    Args:
        scores: path -> scores of any shape. ``-inf`` marks what is gone already.
        kept: from 0 to the number of scores.

    Raises:
        ModelError: a score is NaN or ``+inf``, naming the weight.
    """
    for path, array in scores.items():
        if np.isnan(array).any() or np.isposinf(array).any():
            raise ModelError(
                f"Expected finite scores. Received: NaN or infinity for {path!r}. The model's "
                "weights, or its outputs on the data, may be NaN or too large."
            )
    flat = np.concatenate([np.ravel(array) for array in scores.values()])
    if kept == 0:
        return split(np.zeros(flat.size, np.bool_), scores)
    threshold = np.partition(flat, flat.size - kept)[flat.size - kept]
    mask = flat > threshold
    ties = np.flatnonzero(flat == threshold)
    mask[ties[: kept - int(np.count_nonzero(mask))]] = True
    return split(mask, scores)


def split(flat: Array, like: Mapping[str, Array]) -> dict[str, Any]:
    """Cuts a vector into arrays of the shapes, and under the paths, of ``like``."""
    ends = np.cumsum([array.size for array in like.values()])
    parts = np.split(flat, ends[:-1])
    return {
        path: part.reshape(array.shape)
        for part, (path, array) in zip(parts, like.items(), strict=True)
    }


def require_no_empty(masks: Masks, allowed: bool) -> Masks:
    """The masks, if every weight keeps an element, or if it is allowed that some don't.

    Raises:
        ArgumentError: naming the weights of which nothing would stay.
    """
    if masks.empty and not allowed:
        raise ArgumentError(
            f"Expected a sparsity at which every layer keeps weights. Received: one that leaves "
            f"nothing of {', '.join(map(repr, masks.empty))} (over all weights: "
            f"{masks.sparsity:.6f}), which cuts the network off there unless something bypasses "
            "it. Ask for less, or set allow_empty_layers=True."
        )
    return masks


def match(pattern_values: Mapping[str, Any], paths: Any) -> dict[str, Any]:
    """The value for each path: that of the path itself, or of the first pattern that fits.

    Args:
        pattern_values: path or shell pattern (``"block*/kernel"``; ``*`` crosses slashes) ->
            value.
        paths: of the weights.

    Returns:
        Path -> value, without the paths that nothing fits.

    Raises:
        ArgumentError: a key that fits no path.
    """
    for pattern in pattern_values:
        if not any(path == pattern or fnmatchcase(path, pattern) for path in paths):
            known = ", ".join(map(repr, paths))
            raise ArgumentError(
                f"Expected paths, or patterns, of the weights {known}. Received: {pattern!r}, "
                "which fits none."
            )
    found = {}
    for path in paths:
        if path in pattern_values:
            found[path] = pattern_values[path]
            continue
        fitting = [key for key in pattern_values if fnmatchcase(path, key)]
        if fitting:
            found[path] = pattern_values[fitting[0]]
    return found
