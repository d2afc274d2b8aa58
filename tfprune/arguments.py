"""Checks of arguments that many share."""

from __future__ import annotations

import math
from typing import Any

from tfprune.errors import ArgumentError


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuses what is no whole number from ``least`` on.

    Raises:
        ArgumentError: naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"Expected {name} as a whole number from {least}. Received: {value!r}.")


def check_positive(name: str, value: float) -> None:
    """Refuses what is no positive finite number.

    Raises:
        ArgumentError: naming the argument.
    """
    if not math.isfinite(value) or value <= 0:
        raise ArgumentError(f"Expected {name} to be a positive number. Received: {value!r}.")
