"""Figures: files that hold a picture, and no trace in pyplot."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tfprune
from tests import toys
from tfprune.errors import ArgumentError
from tfprune.reports import Comparison, Row, figures

PNG = b"\x89PNG\r\n\x1a\n"


def _row(name: str, **changes) -> Row:
    values = {"accuracy": 0.9, "macs": 10**6, "parameters": 1000, "size_bytes": 4000,
              "latency_ms": 0.5, "gpu": ""}  # fmt: skip
    return Row(name=name, **{**values, **changes})


def test_comparison(tmp_path) -> None:
    names = ["dense", "pruned [0.5]", "$x^2$", "d", "e", "f"]
    comparison = Comparison(tuple(map(_row, names)), "a processor", 10)
    figure = figures.comparison_figure(comparison)
    assert [axes.get_title() for axes in figure.axes] == [
        "accuracy, %", "million MACs", "file, kB", "CPU, ms",
    ]  # fmt: skip
    assert [bar.get_height() for bar in figure.axes[1].patches] == [1.0] * 6
    assert [text.get_text() for text in figure.axes[2].texts] == ["4"] * 6
    figures.save(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)


def test_panels_without_numbers_are_left_out() -> None:
    rows = (_row("a", accuracy=None, macs=None), _row("b", accuracy=None, size_bytes=2_750_944))
    figure = figures.comparison_figure(Comparison(rows, "a processor", 0))
    assert [axes.get_title() for axes in figure.axes] == ["million MACs", "file, kB", "CPU, ms"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["–", "1"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["4", "2,751"]


def test_widths(tmp_path) -> None:
    plan = tfprune.plan(toys.chain(), 0.5, round_to=4)
    figure = figures.widths_figure(plan)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [8, 12, 16, 4, 8, 8]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == list(plan.kept)
    figures.save(figure, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text(encoding="utf-8")


def test_training() -> None:
    figure = figures.training_figure({"dense": [0.1, 0.5], "pruned": [0.4]}, "validation accuracy")
    first, second = figure.axes[0].lines
    assert list(first.get_xdata()) == [1, 2] and list(second.get_ydata()) == [0.4]
    assert figure.axes[0].get_ylabel() == "validation accuracy"
    assert [text.get_text() for text in figure.axes[0].get_legend().texts] == ["dense", "pruned"]


def test_schedules(tmp_path) -> None:
    curves = {
        "slow": ([0, 1, 2], [0.0, 0.25, 0.5], [False, True, True]),
        "fast": ([0, 2], [0.0, 0.8], [False, False]),
    }
    figure = figures.schedule_figure(curves)
    (axes,) = figure.axes
    slow, fast = axes.lines
    assert list(slow.get_xdata()) == [0, 1, 2] and list(slow.get_ydata()) == [0.0, 0.25, 0.5]
    assert slow.get_markevery() == [1, 2] and fast.get_markevery() == []
    assert slow.get_color() != fast.get_color()
    assert [text.get_text() for text in axes.get_legend().texts] == ["slow", "fast"]
    assert axes.get_ylabel() == "sparsity" and "step" in axes.get_xlabel()
    figures.save(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)


def test_a_place_that_cannot_be_written(tmp_path) -> None:
    figure = figures.training_figure({"a": [1.0]})
    with pytest.raises(ArgumentError, match="not a directory"):
        figures.save(figure, tmp_path / "nowhere" / "figure.png")


def test_a_failed_save_leaves_the_old_picture(tmp_path) -> None:
    target = tmp_path / "figure.xyz"
    target.write_bytes(b"old")
    with pytest.raises(ValueError, match="xyz"):
        figures.save(figures.training_figure({"a": [1.0]}), target)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_pyplot_is_left_alone(tmp_path) -> None:
    """No window, no backend chosen: pyplot is not even imported."""
    program = (
        "import sys\n"
        "from tfprune.reports import figures\n"
        "figure = figures.training_figure({'a': [1.0, 2.0]})\n"
        f"figures.save(figure, {str(tmp_path / 'figure.png')!r})\n"
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True False\n", done.stderr


def test_structure() -> None:
    """A row for every group; epoch 0 is the network as it was."""
    widths = {"a": (6.0, 4.0, 2.0), "b": (5.0, 5.0, 0.0)}
    figure = figures.structure_figure(widths, {"a": 8, "b": 5, "other": 3})
    (image,) = figure.axes[0].images
    assert image.get_array().tolist() == [[1, 6 / 8, 4 / 8, 2 / 8], [1, 1, 1, 0]]
    assert image.get_extent()[:2] == [-0.5, 3.5]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a  2/8", "b  0/5"]
    (image,) = figures.structure_figure(widths).axes[0].images
    assert image.get_array().tolist() == [[1, 4 / 6, 2 / 6], [1, 1, 0]]
    assert image.get_extent()[:2] == [0.5, 3.5]
