"""Checks of what a schedule is made from: steps, sparsities and numbers."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import numpy as np

from tfprune.errors import ArgumentError


def check_sparsity(value: Any, name: str) -> float:
    """``value`` as a fraction of zeros in [0, 1), as float32 sees it.

    Raises:
        ArgumentError: it is none.
    """
    if not _is_number(value) or not value >= 0 or not np.float32(value) < 1:
        raise ArgumentError(
            f"Expected {name} to be a fraction of zeros, from 0 up to but not including 1. "
            f"Received: {value!r}. For 80 % zeros write 0.8."
        )
    return float(value)


def check_positive(value: Any, name: str) -> float | int:
    """``value`` as a finite number above 0; a whole number stays one.

    Raises:
        ArgumentError: it is none.
    """
    if not _is_number(value) or not math.isfinite(value) or not value > 0:
        raise ArgumentError(f"Expected {name} to be a number above 0. Received: {value!r}.")
    return int(value) if isinstance(value, Integral) else float(value)


def check_count(value: Any, name: str, least: int = 1) -> int:
    """``value`` as a whole number, at least ``least``.

    Raises:
        ArgumentError: it is none.
    """
    if not _is_number(value) or not isinstance(value, Integral) or value < least:
        raise ArgumentError(
            f"Expected {name} to be a whole number, {least} or more. Received: {value!r}."
        )
    return int(value)


def check_steps(begin_step: Any, end_step: Any, *, endless: bool) -> tuple[int, int]:
    """First and last step; -1 for the last means without end, where ``endless`` allows it.

    Raises:
        ArgumentError: a step is negative or not whole, the end comes before the beginning, or no
            update could ever happen.
    """
    begin = check_count(begin_step, "begin_step", 0)
    if _is_number(end_step) and end_step == -1:
        if endless:
            return begin, -1
        raise ArgumentError(
            "Expected end_step to be the step at which the final sparsity is reached: this curve "
            "needs one. Received: -1 (without end). Give the number of training steps, or take "
            "Constant, which can go on for ever."
        )
    end = check_count(end_step, "end_step (or -1, without end)" if endless else "end_step", 0)
    if end < begin:
        raise ArgumentError(
            f"Expected end_step not to come before begin_step. Received: begin_step {begin}, "
            f"end_step {end}: pruning would end before it begins."
        )
    if end == 0:
        raise ArgumentError(
            "Expected end_step to be 1 or more. Received: 0. The first training batch is step 1, "
            "so masks would never be updated."
        )
    return begin, end


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)
