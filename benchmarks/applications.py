"""Every model of keras.applications: what can be pruned, and whether masked equals pruned."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

import tfprune
from benchmarks.common import circumstances, write
from tests.equivalence.applications import MODELS, build, images_for
from tfprune.cost import CostModel
from tfprune.reports.text import mega, percent, table

RATIOS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Row:
    """What was seen of one model; shares are fractions, differences relative to the outputs."""

    name: str
    parameters: int
    groups: tuple[int, int]
    channels: tuple[int, int]
    frozen_macs: float
    inexact: float
    differences: tuple[float, ...]
    plain: tuple[float, ...]
    seconds: float


def look(name: str, size: int) -> Row:
    """Builds, analyses, prunes at the three ratios and compares with the masked model."""
    model = build(name, size)
    start = time.perf_counter()
    graph = tfprune.analyse(model)
    seconds = time.perf_counter() - start
    costs = CostModel(graph)
    width = sum(group.width for group in graph)
    free = sum(group.width for group in graph.prunable)
    inexact = [group for group in graph.prunable if not group.exact]
    images = images_for(model, name, 1)
    return Row(
        name=name,
        parameters=costs.parameters(costs.full_mask()),
        groups=(len(graph.prunable), len(graph)),
        channels=(free, width),
        frozen_macs=costs.frozen_share_of_macs(),
        inexact=sum(group.width for group in inexact) / free,
        differences=differences(model, graph, images, []),
        # Without the inexact groups the masked model is the original with zeros, nothing else.
        plain=differences(model, graph, images, [g.name for g in inexact]) if inexact else (),
        seconds=seconds,
    )


def differences(model: Any, graph: Any, images: Any, ignore: list[str]) -> tuple[float, ...]:
    """The largest difference between masked and pruned, relative to the largest output."""
    found = []
    for ratio in RATIOS:
        plan = tfprune.plan(graph, ratio, criterion="random", round_to=1, ignore=ignore)
        found.append(tfprune.verify(model, plan, inputs=images).relative)
        gc.collect()
    return tuple(found)


def report(rows: list[Row], size: int) -> str:
    """The page as Markdown."""
    head = (
        "model", "parameters", "groups", "channels", "fixed MACs", "inexact",
        *(f"difference at {ratio}" for ratio in RATIOS),
    )  # fmt: skip
    body = table(
        head,
        [
            (
                row.name,
                mega(row.parameters),
                "{} of {}".format(*row.groups),
                "{:,} of {:,}".format(*row.channels),
                percent(row.frozen_macs, 2),
                percent(row.inexact) if row.inexact else "0",
                *(f"{value:.1e}" for value in row.differences),
            )
            for row in rows
        ],
        right=head[1:],
        markdown=True,
    )
    worst = max(max(row.differences) for row in rows)
    parts = [
        "# The models of keras.applications",
        f"{len(rows)} models at {size} pixels, with random weights and statistics, and logits as "
        f"outputs. The largest difference of all is {worst:.1e} of the largest logit.",
        body,
        "**groups**, **channels**: those that can be pruned, of all, the classes included. "
        "**fixed MACs**: the share of multiply-accumulates in operations that neither read nor "
        "write a channel that can go. **inexact**: the share of the prunable channels over which "
        "a layer normalisation takes statistics, so that removing some changes what it computes "
        "for the others; the masked model leaves them out of the statistics. **difference at r**: "
        "after removing the fraction r of every group at random, the largest absolute difference "
        "between the outputs of the pruned and of the masked model, relative to the largest "
        "output.",
    ]
    with_inexact = [row for row in rows if row.plain]
    if with_inexact:
        head = ("model", *(f"difference at {ratio}" for ratio in RATIOS))
        cells = [(row.name, *(f"{value:.1e}" for value in row.plain)) for row in with_inexact]
        parts += [
            "Models with inexact groups, pruned in the others only: here the masked model is the "
            "original with zeros in the consumers of the removed channels, and nothing else.",
            table(head, cells, right=head[1:], markdown=True),
        ]
    return "\n\n".join([*parts, circumstances("benchmarks.applications")])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.applications", description=__doc__)
    parser.add_argument("--size", type=int, default=96, help="height and width (default 96)")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", choices=MODELS)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        start = time.perf_counter()
        rows.append(look(name, arguments.size))
        keras.backend.clear_session()
        gc.collect()
        print(f"{time.perf_counter() - start:6.1f} s  {rows[-1]}", file=sys.stderr, flush=True)
    write(report(rows, arguments.size), arguments.output)


if __name__ == "__main__":
    main()
