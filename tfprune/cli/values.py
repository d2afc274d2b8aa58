"""Turns the text of options into values, or says what was expected (no imports of the project)."""

from __future__ import annotations

import tomllib
from argparse import ArgumentTypeError
from typing import Any


def amount(text: str) -> float | int:
    """A budget: a fraction (``0.5``) or a whole number (``2_000_000``)."""
    try:
        return int(text.replace("_", ""))
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(
            f"expected a fraction such as 0.5, or a whole number, not {text!r}"
        ) from None


def fraction(text: str) -> float:
    """A number from 0 up to but not including 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ArgumentTypeError(
            f"expected a fraction from 0 up to but not including 1, such as 0.5, not {text!r}"
        )
    return value


def positive(text: str) -> int:
    """A whole number from 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 0)


def multiple(text: str) -> int | str:
    """A multiple of channels, or a word that may name a preset."""
    return text if text.isidentifier() else _whole(text, 1)


def setting(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``, the value as in TOML; what is none is a text."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ArgumentTypeError(f"expected KEY=VALUE, such as train.epochs=20, not {text!r}")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def shape(text: str) -> tuple[int, ...]:
    """The shape of one example: ``224,224,3`` or ``224x224x3``."""
    parts = text.lower().replace("x", ",").split(",")
    try:
        sizes = tuple(int(part) for part in parts)
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ArgumentTypeError(
            f"expected positive sizes of one example, such as 224,224,3, not {text!r}"
        )
    return sizes


def _whole(text: str, least: int) -> int:
    try:
        value = int(text.replace("_", ""))
    except ValueError:
        value = least - 1
    if value < least:
        raise ArgumentTypeError(f"expected a whole number from {least}, not {text!r}")
    return value
