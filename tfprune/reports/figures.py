"""Figures of what the other packages found (the only place that imports matplotlib)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfprune.writing import replacing, writable_target

if TYPE_CHECKING:
    from tfprune.graph.plan import PruningPlan
    from tfprune.reports.comparison import Comparison

# One colour per model, readable with colour-blind eyes and in grey.
_COLOURS = ("#4c5c68", "#e07a1f", "#2a7f9e", "#8a4f9e", "#6a994e")


def comparison_figure(comparison: Comparison) -> Any:
    """Bars for accuracy, MACs, bytes and CPU latency, one panel each.

    Returns:
        A ``matplotlib.figure.Figure``, not attached to any window.
    """
    panels: list[tuple[str, list[float | None]]] = [
        (
            "accuracy, %",
            [None if r.accuracy is None else 100 * r.accuracy for r in comparison.rows],
        ),
        ("million MACs", [None if r.macs is None else r.macs / 1e6 for r in comparison.rows]),
        ("file, kB", [r.size_bytes / 1e3 for r in comparison.rows]),
        ("CPU, ms", [r.latency_ms for r in comparison.rows]),
    ]
    shown = [(title, values) for title, values in panels if any(v is not None for v in values)]
    figure = _figure(3.0 * len(shown), 3.2)
    names = [row.name for row in comparison.rows]
    for number, (title, values) in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), number + 1)
        _bars(axes, names, values)
        axes.set_title(title, fontsize=10)
    figure.tight_layout()
    return figure


def widths_figure(plan: PruningPlan) -> Any:
    """Width of every group that loses channels, before and after.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    names = list(plan.kept)
    figure = _figure(max(5.0, 0.28 * len(names) + 1.5), 3.4)
    axes = figure.add_subplot(1, 1, 1)
    positions = range(len(names))
    axes.bar(positions, [plan.widths[n] for n in names], color="#c9d1d6", label="before")
    axes.bar(positions, [len(plan.kept[n]) for n in names], color=_COLOURS[1], label="kept")
    axes.set_xticks(list(positions), names, rotation=90, fontsize=7)
    axes.set_ylabel("channels")
    axes.legend(frameon=False)
    _plain(axes)
    figure.tight_layout()
    return figure


def training_figure(histories: Mapping[str, Sequence[float]], label: str = "accuracy") -> Any:
    """One curve per run over epochs.

    Args:
        histories: name of the run -> one value per epoch.
        label: of the vertical axis.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure = _figure(5.5, 3.2)
    axes = figure.add_subplot(1, 1, 1)
    for number, (name, values) in enumerate(histories.items()):
        axes.plot(
            range(1, len(values) + 1), values, color=_COLOURS[number % len(_COLOURS)], label=name
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.legend(frameon=False)
    _plain(axes)
    figure.tight_layout()
    return figure


def structure_figure(
    widths: Mapping[str, Sequence[float]], full: Mapping[str, float] | None = None
) -> Any:
    """How the structure emerged: the fraction of every group that is left, over the epochs.

    Args:
        widths: group name -> its width at the end of every epoch; all of the same length.
        full: group name -> its width before the training, shown as epoch 0; others are not looked
            at. ``None``: fractions are of the largest width that came up.

    Returns:
        A ``matplotlib.figure.Figure``: a row for every group, dark where much is left.
    """
    names = list(widths)
    if full is not None:
        widths = {name: (full[name], *series) for name, series in widths.items()}
    widest = [max(series) or 1.0 for series in widths.values()]
    values = [
        [value / most for value in series]
        for series, most in zip(widths.values(), widest, strict=True)
    ]
    first = 1 if full is None else 0
    last = first + max(map(len, widths.values())) - 1
    figure = _figure(6.0, max(2.0, 0.2 * len(names) + 1.2))
    axes = figure.add_subplot(1, 1, 1)
    image = axes.imshow(
        values,
        aspect="auto",
        cmap="cividis_r",
        vmin=0,
        vmax=1,
        extent=(first - 0.5, last + 0.5, len(names) - 0.5, -0.5),
    )
    labels = [
        f"{name}  {series[-1]:.0f}/{most:.0f}"
        for (name, series), most in zip(widths.items(), widest, strict=True)
    ]
    axes.set_yticks(range(len(names)), labels, fontsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    figure.colorbar(image, label="of its largest width" if full is None else "of its width")
    figure.tight_layout()
    return figure


def schedule_figure(curves: Mapping[str, tuple[Any, Any, Any]]) -> Any:
    """Sparsity over training steps, with a mark at every step at which masks are updated.

    Args:
        curves: name -> steps, the sparsity at each, and whether masks are updated there: three
            arrays of one length.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure = _figure(5.5, 3.2)
    axes = figure.add_subplot(1, 1, 1)
    for number, (name, (steps, sparsities, updates)) in enumerate(curves.items()):
        axes.plot(
            steps,
            sparsities,
            color=_COLOURS[number % len(_COLOURS)],
            label=name,
            marker="o",
            markersize=3,
            markevery=[i for i, update in enumerate(updates) if update],
        )
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("training step (dots: masks updated)")
    axes.set_ylabel("sparsity")
    axes.legend(frameon=False)
    _plain(axes)
    figure.tight_layout()
    return figure


def sensitivity_figure(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], label: str = "accuracy"
) -> Any:
    """One curve per channel group over the fraction of its channels removed.

    Args:
        curves: name of the group -> fractions removed, and the metric at each.
        label: of the vertical axis.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    columns = max(1, -(-len(curves) // 18))
    figure = _figure(5.5 + 1.8 * columns, 3.6)
    axes = figure.add_subplot(1, 1, 1)
    styles = ("-", "--", ":", "-.")
    for number, (name, (removed, values)) in enumerate(curves.items()):
        axes.plot(
            removed,
            values,
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=styles[number // len(_COLOURS) % len(styles)],
            marker="o",
            markersize=3,
            label=name,
        )
    axes.set_xlabel("channels of the group removed, fraction")
    axes.set_ylabel(label)
    axes.legend(
        frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), ncols=columns
    )
    _plain(axes)
    figure.tight_layout()
    return figure


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG (or whatever the suffix says), whole or not at all.

    Raises:
        ArgumentError, FileError: the path cannot be written.
    """
    target = writable_target(path)
    with replacing(target) as temporary:
        figure.savefig(temporary, dpi=130, format=target.suffix.lstrip(".") or "png")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    # Not pyplot: no window, no global state.
    return Figure(figsize=(width, height))


def _bars(axes: Any, names: Sequence[str], values: Sequence[float | None]) -> None:
    heights = [0.0 if value is None else value for value in values]
    bars = axes.bar(
        range(len(names)), heights, color=[_COLOURS[i % len(_COLOURS)] for i in range(len(names))]
    )
    axes.bar_label(bars, [_label(value) for value in values], fontsize=8)
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=20, ha="right")
    axes.margins(y=0.15)
    _plain(axes)


def _label(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
