"""What a sensitivity analysis found: curves, their file, and what they choose."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tfprune.allocation.sensitivity import Curve, SensitivityOrder, within_tolerance
from tfprune.errors import ArgumentError
from tfprune.search.record import dump, read
from tfprune.writing import replacing, writable_target

KIND = "sensitivity"
"""Of its file."""


@dataclass(frozen=True)
class GroupSensitivity:
    """What one group bears.

    Attributes:
        width: its channels.
        size: the other axes of its feature maps, such as ``(32, 32)``: its stage.
        kept: channels kept at each ratio.
        values: the metric at each ratio.
        retrained: the same after retraining; ``None`` without.
    """

    width: int
    size: tuple[int | None, ...]
    kept: tuple[int, ...]
    values: tuple[float, ...]
    retrained: tuple[float, ...] | None


@dataclass(frozen=True)
class SensitivityAnalysis:
    """The curves of :func:`sensitivity_analysis`. Printing them gives a table.

    Attributes:
        groups: group name -> its curve.
        ratios: pruning ratios, rising.
        dense: the metric with nothing pruned, measured in the same way as the others.
        metric: its name.
        larger_is_better: whether a larger value of it is better.
        criterion: what ranked the channels, in words.
        settings: what identifies the analysis on file.
    """

    groups: Mapping[str, GroupSensitivity]
    ratios: tuple[float, ...]
    dense: float
    metric: str
    larger_is_better: bool
    criterion: str
    settings: Mapping[str, Any]

    def curves(self, *, retrained: bool = False) -> dict[str, Curve]:
        """Group name -> how much worse the model is at each ratio, for the allocation.

        Raises:
            ArgumentError: ``retrained`` of an analysis without retraining.
        """
        result = {}
        for name, group in self.groups.items():
            values = group.retrained if retrained else group.values
            if values is None:
                raise ArgumentError(
                    "Expected an analysis with retraining. Received: one without. Make it with "
                    "retrain=tfprune.search.Retraining(...), train=..."
                )
            sign = 1 if self.larger_is_better else -1
            drops = tuple(sign * (self.dense - value) for value in values)
            result[name] = Curve(group.width, self.ratios, group.kept, drops, group.size)
        return result

    def order(self, *, retrained: bool = False) -> SensitivityOrder:
        """For ``tfprune.plan(model, macs=0.5, order=analysis.order())``: what hurts least first.

        Give the plan the criterion of the analysis: curves hold for the channels that it removes.
        Groups that were not analysed have to be named in the plan's ``ignore``.

        Raises:
            ArgumentError: as :meth:`curves`.
        """
        return SensitivityOrder(self.curves(retrained=retrained))

    def ratios_within(
        self,
        tolerance: float,
        *,
        per_stage: bool = False,
        skip: Sequence[str] = (),
        retrained: bool = False,
    ) -> dict[str, float]:
        """For ``tfprune.plan(model, ratios)``: the largest ratio that each group alone bears.

        Args:
            tolerance: how much worse each group alone may make the model, in the metric's unit.
            per_stage, skip: as :func:`tfprune.allocation.sensitivity.within_tolerance`.
            retrained: by the curves after retraining.

        Raises:
            ArgumentError: as :meth:`curves` and ``within_tolerance``.
        """
        curves = self.curves(retrained=retrained)
        return within_tolerance(curves, tolerance, per_stage=per_stage, skip=skip)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, whole or not at all: the same file that ``path=`` leaves.

        Raises:
            ArgumentError, FileError: it cannot be written there.
        """
        values = {"dense": self.dense}
        for name, group in self.groups.items():
            values |= _values(name, group.kept, group.values, retrained=False)
            values |= _values(name, group.kept, group.retrained or (), retrained=True)
        target = writable_target(path)
        with replacing(target) as temporary:
            text = dump(KIND, self.settings, keys_of(self.settings), values)
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SensitivityAnalysis:
        """Reads a file of :meth:`save`, or that an analysis with ``path=`` finished.

        Raises:
            ArgumentError: it cannot be read, is damaged, or is not finished.
        """
        settings, values = read(KIND, path)
        try:
            missing = [key for key in keys_of(settings) if key not in values]
            if not missing:
                return analysis_of(settings, values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(
                f"Expected a whole sensitivity analysis. Received: {os.fspath(path)!r}, which is "
                f"damaged ({type(error).__name__}: {error}). Make the analysis again."
            ) from error
        raise ArgumentError(
            f"Expected a finished analysis. Received: {os.fspath(path)!r}, which lacks "
            f"{len(missing)} of {len(keys_of(settings))} measurements. Make the analysis again "
            "with path= this file: it goes on where it ended."
        )

    def plot(self, path: str | os.PathLike[str] | None = None, *, retrained: bool = False) -> Any:
        """One curve per group: the metric over the pruning ratio.

        Args:
            path: where to write the picture as well.
            retrained: the curves after retraining.

        Returns:
            A ``matplotlib.figure.Figure``.
        """
        from tfprune.reports.figures import save, sensitivity_figure

        self.curves(retrained=retrained)
        lines = {}
        for name, group in self.groups.items():
            values = group.retrained if retrained and group.retrained else group.values
            removed = [1 - kept / group.width for kept in group.kept]
            lines[name] = ([0.0, *removed], [self.dense, *values])
        figure = sensitivity_figure(lines, self.metric)
        if path is not None:
            save(figure, path)
        return figure

    def __str__(self) -> str:
        from tfprune.reports.text import percent, table

        def cell(value: float) -> str:
            return f"{100 * value:.1f}" if self.metric == "accuracy" else f"{value:.4g}"

        columns = ("group", "width", "map", *(percent(ratio, 0) for ratio in self.ratios))
        parts = []
        for after, title in ((False, ""), (True, "After retraining:\n\n")):
            rows = [
                (name, group.width, "x".join(map(str, group.size)) or "–", *map(cell, values))
                for name, group in self.groups.items()
                if (values := group.retrained if after else group.values) is not None
            ]
            if rows:
                parts.append(title + table(columns, rows, right=("width", *columns[3:])))
        unit = ", %" if self.metric == "accuracy" else ""
        head = (
            f"Sensitivity of {len(self.groups)} channel groups ({self.criterion}): {self.metric}"
            f"{unit} with each pruned alone; dense {cell(self.dense)}"
        )
        return "\n\n".join((head, *parts))


def key_of(name: str, width: int, retrained: bool = False) -> str:
    """What a measurement is called on file."""
    return f"{name} at {width}{', retrained' if retrained else ''}"


def keys_of(settings: Mapping[str, Any]) -> list[str]:
    """The keys of all measurements; a width is measured once, whatever ratios lead to it."""
    keys = ["dense"]
    for after in (False, True) if settings["retraining"] else (False,):
        for name, group in settings["groups"].items():
            keys += [key_of(name, width, after) for width in group["kept"]]
    return list(dict.fromkeys(keys))


def _values(
    name: str, kept: Sequence[int], values: Sequence[float], retrained: bool
) -> dict[str, float]:
    return {key_of(name, w, retrained): v for w, v in zip(kept, values, strict=False)}


def analysis_of(settings: Mapping[str, Any], values: Mapping[str, float]) -> SensitivityAnalysis:
    """The curves from the settings and all measurements."""

    def curve(name: str, kept: Sequence[int], retrained: bool) -> tuple[float, ...]:
        return tuple(values[key_of(name, width, retrained)] for width in kept)

    return SensitivityAnalysis(
        groups={
            name: GroupSensitivity(
                width=group["width"],
                size=tuple(group["size"]),
                kept=tuple(group["kept"]),
                values=curve(name, group["kept"], False),
                retrained=curve(name, group["kept"], True) if settings["retraining"] else None,
            )
            for name, group in settings["groups"].items()
        },
        ratios=tuple(settings["ratios"]),
        dense=values["dense"],
        metric=settings["metric"],
        larger_is_better=settings["larger is better"],
        criterion=settings["criterion"],
        settings=settings,
    )
