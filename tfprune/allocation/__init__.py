"""Allocation: how many channels each group keeps, and so, with the scores, which."""

from tfprune.allocation.budget import Budget, check_met, limits_of, meet
from tfprune.allocation.cropping import preconfig, precrop, ratios_of
from tfprune.allocation.expected_synflow import SynExp, synexp
from tfprune.allocation.layer_densities import densities, water_filling
from tfprune.allocation.order import ORDERS, global_ranking, uniform
from tfprune.allocation.ratios import (
    above,
    by_pattern,
    check_ratio,
    every_group,
    kept_count,
    overall,
)
from tfprune.allocation.rounding import PRESETS, allowed_widths, multiple
from tfprune.allocation.sensitivity import Curve, SensitivityOrder, within_tolerance
from tfprune.allocation.steps import (
    Chain,
    Constraints,
    chains,
    check_patterns,
    kept_by_steps,
    protected_channels,
)

__all__ = [
    "ORDERS",
    "PRESETS",
    "Budget",
    "Chain",
    "Constraints",
    "Curve",
    "SensitivityOrder",
    "SynExp",
    "above",
    "allowed_widths",
    "by_pattern",
    "chains",
    "check_met",
    "check_patterns",
    "check_ratio",
    "densities",
    "every_group",
    "global_ranking",
    "kept_by_steps",
    "kept_count",
    "limits_of",
    "meet",
    "multiple",
    "overall",
    "preconfig",
    "precrop",
    "protected_channels",
    "ratios_of",
    "synexp",
    "uniform",
    "water_filling",
    "within_tolerance",
]
