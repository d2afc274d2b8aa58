"""The rules: one file per family of operations. Importing this package registers them all."""

from tfprune.graph.rules import (
    convolution,
    dense,
    normalization,
    reduction,
    reshape,
    selection,
)
from tfprune.graph.rules.elementwise import elementwise
from tfprune.graph.rules.registry import find_rule, rule

__all__ = [
    "convolution",
    "dense",
    "elementwise",
    "find_rule",
    "normalization",
    "reduction",
    "reshape",
    "rule",
    "selection",
]
