"""The rules: one file per family of operations. Importing this package registers them all."""

from tfprune.graph.rules import (
    attention,
    contraction,
    convolution,
    dense,
    normalization,
    preprocessing,
    recurrent,
    reduction,
    reshape,
    selection,
    wrappers,
)
from tfprune.graph.rules.elementwise import elementwise
from tfprune.graph.rules.registry import find_rule, rule

__all__ = [
    "attention",
    "contraction",
    "convolution",
    "dense",
    "elementwise",
    "find_rule",
    "normalization",
    "preprocessing",
    "recurrent",
    "reduction",
    "reshape",
    "rule",
    "selection",
    "wrappers",
]
