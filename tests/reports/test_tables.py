"""Tables: no column is lost, whatever the width and whatever layers are called."""

from __future__ import annotations

import keras
import pytest

import tfprune
from tests import toys
from tfprune.cost import CostModel, measure
from tfprune.graph.blocks import blocks_of
from tfprune.reports import cost_table, graph_table, plan_table
from tfprune.reports.text import (
    count,
    mega,
    milliseconds,
    percent,
    shortened,
    size,
    table,
    terminal_width,
)

COLUMNS = ("name", "layers", "width", "verdict")
ROWS = [("conv", "conv, norm, relu, depthwise, project", 16, "yes"),
        ("head", "head", 1000, "no: the outputs of a model are what its users read")]  # fmt: skip


def test_plain_table() -> None:
    assert table(("a", "number"), [("x", 1), ("long", 23)], right=("number",)) == (
        "a     number\n────────────\nx          1\nlong      23"
    )


def test_markdown_table() -> None:
    text = table(("a", "number"), [("x|y", 1), ("[red]", 2)], right=("number",), markdown=True)
    assert text.splitlines() == [
        "| a | number |", "| --- | ---: |", "| x\\|y | 1 |", "| [red] | 2 |",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [60, 70, 80, 120])
def test_fitted_to_a_width(width) -> None:
    text = table(COLUMNS, ROWS, right=("width",), cut=("layers",), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert text.split()[:4] == list(COLUMNS)
    words = " ".join(text.split())
    assert "1000" in words and "conv" in words
    # folded, not cut: every word of the verdict is there
    assert set(ROWS[1][-1].split()) <= set(words.split())
    assert ("…" in text) == (width < 100)


def test_what_cannot_be_squeezed_stays_whole() -> None:
    text = table(("name", "n"), [("x" * 50, "1" * 50)], right=("n",), width=20)
    assert "x" * 50 + "  " + "1" * 50 in text


@pytest.mark.parametrize("name", ["[bold]", "a[/b]", ":smile:", "50%", "\\[x]", "naïve"])
def test_names_are_taken_literally(name) -> None:
    assert name in table(("name", "n"), [(name, 1)], cut=("name",))


def test_a_cell_of_several_lines_stays_in_its_row() -> None:
    assert len(table(("a", "b"), [("x\ny", "z")]).splitlines()) == 3


def test_no_rows() -> None:
    assert table(("a", "b"), []).splitlines()[0] == "a  b"


def test_the_terminal_decides(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "97")
    assert terminal_width() == 97
    monkeypatch.setenv("COLUMNS", "20")
    assert terminal_width() == 80


def test_units() -> None:
    assert [count(None), count(1234.4), count(0)] == ["–", "1,234", "0"]
    assert [mega(None), mega(747_000), mega(4.11e9)] == ["–", "0.747 M", "4.11 G"]
    assert [size(None), size(999), size(2_750_000)] == ["–", "1.0 kB", "2.75 MB"]
    assert [percent(None), percent(0.5), percent(0.99444, 2)] == ["–", "50.0 %", "99.44 %"]
    assert [milliseconds(None), milliseconds(0.02299)] == ["–", "0.023 ms"]
    assert shortened(["a", "b", "c", "d"], 2) == "a, b +2"
    assert shortened(["a", "b"], 2) == "a, b"


def test_graph_table() -> None:
    graph = tfprune.analyse(toys.residual())
    text = graph_table(graph, width=200)
    assert str(graph).splitlines()[0] == text.splitlines()[0]
    first = f"residual: {len(graph.prunable)} of {len(graph.groups)} channel groups can be pruned"
    assert text.startswith(first)
    for group in graph.groups:
        line = next(line for line in text.splitlines() if line.startswith(f"{group.name} "))
        assert str(group.width) in line.split()
        assert ("yes" in line) == group.prunable
        assert group.prunable or str(group.reason) in line
    rows = graph_table(graph, markdown=True).split("\n\n")[1].splitlines()
    assert len(rows) == len(graph.groups) + 2 and {row.count(" | ") for row in rows} == {4}
    *_, title, blocks = text.split("\n\n")
    (block,) = blocks_of(graph)
    assert title == "1 block can be removed whole:"
    whole, left = CostModel(graph), CostModel(graph, [block.name])
    share = 1 - left.macs(left.full_mask()) / whole.macs(whole.full_mask())
    assert blocks.splitlines()[-1].split()[0] == block.name
    assert blocks.splitlines()[-1].endswith(percent(share))


def test_no_blocks_and_free_sizes() -> None:
    assert "removed whole" not in graph_table(tfprune.analyse(toys.chain()))
    inputs = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(4, 1, name="stem")(inputs)
    x = keras.layers.Add(name="sum")([x, keras.layers.Conv2D(4, 1, name="inside")(x)])
    last = graph_table(tfprune.analyse(keras.Model(inputs, x))).splitlines()[-1]
    assert last.split() == ["sum", "inside", "–"]


def test_inexact_groups_are_marked() -> None:
    inputs = keras.Input((4,))
    x = keras.layers.Dense(8, name="wide")(inputs)
    x = keras.layers.LayerNormalization()(x)
    graph = tfprune.analyse(keras.Model(inputs, keras.layers.Dense(2)(x)))
    assert "yes, inexact: " in graph_table(graph, width=200)


def test_a_name_with_brackets() -> None:
    inputs = keras.Input((4,))
    x = keras.layers.Dense(8, name="stage[1].[bold]")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    assert "stage[1].[bold]" in graph_table(tfprune.analyse(model))
    plan = tfprune.plan(model, 0.5, round_to=1)
    assert "stage[1].[bold]" in plan_table(plan)
    assert "stage[1].[bold]" in cost_table(measure(model))


def test_plan_table() -> None:
    plan = tfprune.plan(toys.chain(), 0.5, round_to=4, ignore=["conv1"])
    text = plan_table(plan)
    assert "2 groups lose 12 of 24 channels" in text.splitlines()[0]
    assert "criterion: L1 norm" in text and "round_to: 4" in text
    assert [line.split() for line in text.splitlines()[-2:]] == [
        ["conv0", "8", "4", "50.0", "%"],
        ["conv2", "16", "8", "50.0", "%"],
    ]


def test_cost_table() -> None:
    cost = measure(toys.chain())
    lines = cost_table(cost).splitlines()
    conv = next(line.split() for line in lines if line.startswith("conv0 "))
    assert conv[:4] == ["conv0", "Conv2D", str(27 * 8 + 8), f"{64 * 27 * 8:,}"]
    assert lines[-1].split()[:3] == ["total", f"{cost.parameters:,}", f"{cost.macs:,}"]
    assert cost_table(cost, markdown=True).splitlines()[2].startswith("| layer | kind |")
