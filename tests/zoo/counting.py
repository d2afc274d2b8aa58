"""Parameters and MACs counted from layer shapes, independently of the library's own counter."""

import math
from typing import Any


def trainable_parameters(model: Any) -> int:
    return sum(math.prod(weight.shape) for weight in model.trainable_weights)


def multiply_accumulates(model: Any) -> int:
    """MACs of convolutions and dense layers for one example: one kernel per output position."""
    total = 0
    for layer in model.layers:
        kind = type(layer).__name__
        if kind == "Dense":
            total += math.prod(layer.kernel.shape)
        elif kind in ("Conv2D", "DepthwiseConv2D"):
            _, height, width, _ = layer.output.shape
            total += height * width * math.prod(layer.kernel.shape)
    return total
