"""Channel multiples that phones like, and the widths that a group may take.

Sources: XNNPACK pads output channels to the width of its micro-kernels, the GPU delegates store
channels in slices of four (read in their code; no phone was at hand, so the presets are not
measured on one). One channel above a multiple costs as much as a whole further multiple.
"""

from __future__ import annotations

import math

from tfprune.errors import ArgumentError

PRESETS = {"cpu_fp32": 8, "cpu_fp16": 16, "cpu_int8": 16, "gpu": 4, "gpu_large": 16}
"""``round_to`` by target: the multiple that the target's kernels work in."""


def multiple(round_to: int | str) -> int:
    """The multiple behind ``round_to``: a positive int, or the name of a preset.

    Raises:
        ArgumentError: neither.
    """
    if isinstance(round_to, str) and round_to in PRESETS:
        return PRESETS[round_to]
    if isinstance(round_to, int) and not isinstance(round_to, bool) and round_to >= 1:
        return round_to
    presets = ", ".join(f"{name} ({value})" for name, value in PRESETS.items())
    raise ArgumentError(
        f"Expected round_to to be a positive integer or one of {presets}. Received: {round_to!r}."
    )


def allowed_widths(width: int, minimum: int, round_to: int) -> list[int]:
    """The widths that a group may be cut to, from ``width`` down.

    Widths are multiples of ``round_to``, but for ``width`` itself. A group narrower than one
    multiple is not rounded.

    Args:
        width: channels now.
        minimum: fewest channels to keep.
        round_to: the multiple.
    """
    step = 1 if width < round_to else round_to
    lowest = max(step, math.ceil(minimum / step) * step)
    below = range(((width - 1) // step) * step, lowest - 1, -step)
    return [width, *below]
