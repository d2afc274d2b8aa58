r"""Widths from a sensitivity analysis: what hurts least goes first.

Reference: Li, Kadav, Durdanovic, Samet and Graf, "Pruning Filters for Efficient ConvNets", ICLR
2017 (arXiv:1608.08710), section 3.2: prune one layer at a time, look at the accuracy, and give
sensitive layers small ratios or none. The paper chooses them by eye and has no formula. Both rules
here are stand-ins of our own: :func:`within_tolerance`, the largest ratio p of a group with

.. math:: a_i(0) - a_i(p) \le \mathrm{tol},

or the smallest such ratio of a whole stage, as the paper has one per stage (same feature-map size);
and :class:`SensitivityOrder`, which ranks the steps of all groups by the drop that the curves
predict, so that a budget of MACs or bytes can be met exactly.

A drop is measured with one group pruned alone. Nothing says what several do together.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tfprune.allocation.order import Order
from tfprune.allocation.steps import Chain
from tfprune.errors import ArgumentError


@dataclass(frozen=True)
class Curve:
    """What pruning one group alone costs.

    Attributes:
        width: the group's channels.
        ratios: pruning ratios asked for, rising, in (0, 1).
        kept: channels kept at each of them.
        drops: how much worse the model is there (accuracy lost, or loss gained); negative if it
            is better.
        size: the other axes of the group's feature maps, such as ``(32, 32)``: its stage.
    """

    width: int
    ratios: tuple[float, ...]
    kept: tuple[int, ...]
    drops: tuple[float, ...]
    size: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        points = len(self.ratios)
        rising = list(self.ratios) == sorted(set(self.ratios))
        falling = list(self.kept) == sorted(self.kept, reverse=True)
        inside = all(0 < ratio < 1 for ratio in self.ratios) and all(
            0 < kept <= self.width for kept in self.kept
        )
        same = points == len(self.kept) == len(self.drops) and points > 0
        if not (same and rising and falling and inside and all(map(math.isfinite, self.drops))):
            raise ArgumentError(
                "Expected a curve with one number of kept channels and one finite drop for every "
                f"ratio, the ratios rising between 0 and 1. Received: {self!r}."
            )

    def predicted(self, width: int) -> float:
        """The drop at a width: on the straight line between the two measured ones beside it.

        0 at the group's own width; infinity below the smallest that was measured, where nothing
        is known.
        """
        if width < self.kept[-1]:
            return math.inf
        points = {**dict(zip(self.kept, self.drops, strict=True)), self.width: 0.0}
        if width in points:
            return points[width]
        above = min(kept for kept in points if kept > width)
        below = max(kept for kept in points if kept < width)
        part = (above - width) / (above - below)
        return points[above] + part * (points[below] - points[above])


@dataclass(frozen=True)
class SensitivityOrder:
    """The order of removal steps by the drop predicted after each: for ``tfprune.plan(order=...)``.

    A group's drop counts as the largest so far, so that its steps stay in order whatever noise
    there is in a curve. Steps with equal drops go by the fraction removed, smallest first, so that
    groups which seem to cost nothing shrink side by side. Steps beyond the largest measured ratio
    come after all others, by the fraction removed.

    Attributes:
        curves: group name -> its curve.
    """

    curves: Mapping[str, Curve]

    def __call__(self, chain_list: Sequence[Chain]) -> Order:
        """Chain numbers; the n-th mention of a chain is its n-th step.

        Raises:
            ArgumentError: a group has no curve, or had another width when it was measured.
        """
        entries: list[tuple[float, float, int, int]] = []
        for number, chain in enumerate(chain_list):
            curve = self._curve_of(chain)
            worst = -math.inf
            for step, width in enumerate(chain.widths[1:], 1):
                worst = max(worst, curve.predicted(width))
                entries.append((worst, 1 - width / chain.widths[0], number, step))
        return [number for _, _, number, _ in sorted(entries)]

    def _curve_of(self, chain: Chain) -> Curve:
        name = chain.group.name
        curve = self.curves.get(name)
        if curve is None:
            raise ArgumentError(
                f"Expected an analysis of every group that may be pruned. Received: one without "
                f"{name!r}. Analyse that group as well, or leave it whole: ignore=[{name!r}]."
            )
        if curve.width != chain.group.width:
            raise ArgumentError(
                f"Expected an analysis of this model. Received: one in which {name!r} has "
                f"{curve.width} channels, where the model has {chain.group.width}."
            )
        return curve


def within_tolerance(
    curves: Mapping[str, Curve],
    tolerance: float,
    *,
    per_stage: bool = False,
    skip: Sequence[str] = (),
) -> dict[str, float]:
    """For every group the largest measured ratio whose drop is at most ``tolerance``; 0 if none.

    Args:
        curves: group name -> its curve.
        tolerance: in the unit of the drops, such as 0.01 for one percentage point of accuracy.
        per_stage: give all groups of one feature-map size the smallest of their ratios.
        skip: names or patterns (``*``, ``?``) of groups that stay whole and do not count for their
            stage: the sensitive layers that the paper skips, or residual streams.

    Returns:
        Group name -> ratio, for ``tfprune.plan(model, ratios)``.

    Raises:
        ArgumentError: ``tolerance`` is not finite, or a pattern matches no group.
    """
    if not isinstance(tolerance, int | float) or not math.isfinite(tolerance):
        raise ArgumentError(f"Expected tolerance to be a finite number. Received: {tolerance!r}.")
    for pattern in skip:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in curves):
            raise ArgumentError(
                f"Expected skip to name analysed groups. Received: {pattern!r}, which matches none "
                f"of {', '.join(curves)}."
            )
    counted = {
        name: curve
        for name, curve in curves.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)
    }
    ratios = {
        name: max(
            (p for p, d in zip(curve.ratios, curve.drops, strict=True) if d <= tolerance),
            default=0.0,
        )
        for name, curve in counted.items()
    }
    if per_stage:
        ratios = {
            name: min(ratios[o] for o, theirs in counted.items() if theirs.size == curve.size)
            for name, curve in counted.items()
        }
    return {name: ratios.get(name, 0.0) for name in curves}
