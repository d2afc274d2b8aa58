"""CPU latency of networks pruned to half their MACs, against the dense ones and the ideal."""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import keras

import tfprune
from benchmarks.common import circumstances, instruction_set, write
from tests.equivalence.applications import build, condition, images_for
from tfprune.cost import measure
from tfprune.litert import BenchmarkReport, benchmark_many
from tfprune.reports.text import percent, table

NETWORKS: dict[str, Callable[[], Any]] = {
    "ResNet-56-A": lambda: _zoo_resnet56("A"),
    "ResNet-56-B": lambda: _zoo_resnet56("B"),
    "MobileNetV2": lambda: build("MobileNetV2", 224),
    "ResNet50": lambda: build("ResNet50", 224),
}
TYPES: dict[str, Literal["int8"] | None] = {"float32": None, "int8": "int8"}
GOAL = 0.85
# How far the sum of the operations timed alone may be off before a profile is no explanation.
ALONE = 0.35
# Output channels of XNNPACK's convolution kernels (float32, int8): fewer than the least, or than a
# multiple of the last, cost the same. From XNNPACK's configuration; those of AVX-512 were seen as
# steps in the time of one convolution.
TILES = {"AVX-512": ((16, 32), (16,)), "AVX2": ((16,), (8,)), "NEON": ((8,), (16,))}


@dataclass(frozen=True)
class Variant:
    """One way to prune."""

    name: str
    round_to: int
    order: str = "uniform"
    whole_below: int = 0  # groups of at most so many channels keep all


VARIANTS = (
    Variant("multiples of 1", 1),
    Variant("multiples of 8", 8),
    Variant("multiples of 8, global", 8, "global"),
    Variant("multiples of 16", 16),
    Variant("multiples of 32", 32),
    Variant("multiples of 16, groups up to 16 whole", 16, whole_below=16),
    Variant("multiples of 32, groups up to 32 whole", 32, whole_below=32),
)


# The default of tfprune.plan; where its time goes is shown.
PROFILED = "multiples of 8"


@dataclass(frozen=True)
class Row:
    """One variant of a network in one type; the ratios are dense over pruned."""

    network: str
    dtype: str
    variant: str
    latency_ms: float
    speed_up: float
    ideal: float
    ideal_in_tiles: float

    @property
    def reached(self) -> float:
        """The speed-up as a fraction of the ideal."""
        return self.speed_up / self.ideal


def _zoo_resnet56(shortcut: str) -> Any:
    model = tfprune.zoo.resnet_cifar(56, shortcut=shortcut, seed=0)
    return condition(model, images_for(model, "", 4))


def prune(model: Any, variant: Variant) -> Any:
    """The model at half its MACs, or None where the variant cannot reach that."""
    graph = tfprune.analyse(model)
    narrow = [group.name for group in graph.prunable if group.width <= variant.whole_below]
    if variant.whole_below and not narrow:
        return None  # the same as without
    try:
        plan = tfprune.plan(
            graph, macs=0.5, order=variant.order, round_to=variant.round_to, ignore=narrow
        )
    except tfprune.errors.BudgetError as error:
        print(f"{model.name}, {variant.name}: {error}", file=sys.stderr)
        return None
    return plan.apply(model)


def macs_in_tiles(model: Any, tile: tuple[int, ...]) -> float:
    """MACs if output channels of convolutions and dense layers come in whole tiles."""
    total = 0.0
    for layer in measure(model).layers:
        kernel = getattr(_layer(model, layer.path), "kernel", None)
        factor = 1.0
        if kernel is not None and "Depthwise" not in layer.kind:
            wide = kernel.shape[-1]
            whole = next((t for t in tile if wide <= t), -(-wide // tile[-1]) * tile[-1])
            factor = whole / wide
        total += (layer.macs or 0) * factor
    return total


def _layer(model: Any, path: str) -> Any:
    return next((layer for layer in model.layers if layer.name == path), None)


def look(
    name: str, variants: tuple[Variant, ...], runs: int, folder: Path
) -> tuple[list[Row], dict[str, dict[str, BenchmarkReport]]]:
    """All variants of one network: the rows, and the reports with profiles by type."""
    dense = NETWORKS[name]()
    models = {"dense": dense}
    models |= {v.name: small for v in variants if (small := prune(dense, v)) is not None}
    examples = images_for(dense, name, 4)
    rows, reports = [], {}
    for (dtype, quantize), tile in zip(TYPES.items(), tiles(), strict=True):
        files = {}
        for number, (form, model) in enumerate(models.items()):
            # The files are only timed, so they are not compared with Keras here.
            report = tfprune.export(
                model,
                folder / f"{number}.tflite",
                quantize=quantize,
                calibration=examples,
                check=False,
            )
            files[form] = report.path.read_bytes()
        found = benchmark_many(files, runs=runs, gpu=False)
        base, base_macs = found["dense"].latency_ms, measure(dense).macs
        for form, model in models.items():
            rows.append(
                Row(
                    name,
                    dtype,
                    form,
                    found[form].latency_ms,
                    base / found[form].latency_ms,
                    base_macs / measure(model).macs,
                    macs_in_tiles(dense, tile) / macs_in_tiles(model, tile),
                )
            )
            print(rows[-1], file=sys.stderr, flush=True)
        profiled = {form: files[form] for form in ("dense", PROFILED)}
        reports[dtype] = benchmark_many(profiled, runs=max(runs // 2, 5), gpu=False, profile=True)
    return rows, reports


def tiles() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tiles of float32 and int8 kernels on this machine's CPU."""
    return TILES.get(instruction_set().split(" ")[0], ((8,), (8,)))


def alone_over_whole(report: BenchmarkReport) -> float:
    """The sum of the operations' times over the whole model's."""
    return sum(o.median_us for o in report.operations) / (1e3 * report.latency_ms)


def by_operation(reports: Mapping[str, BenchmarkReport]) -> list[tuple[Any, ...]]:
    """Microseconds by kind of operation: dense, pruned, and the ratio."""
    sums = []
    for report in reports.values():
        sums.append(Counter[str]())
        for operation in report.operations:
            sums[-1][operation.op] += operation.median_us
    dense, pruned = sums
    total = sum(dense.values())
    rows: list[tuple[Any, ...]] = []
    for op, us in dense.most_common():
        left = pruned[op]
        shares = percent(us / total), percent(left / sum(pruned.values()))
        rows.append(
            (op, f"{us:,.0f}", f"{left:,.0f}", *shares, f"{us / left:.2f} ×" if left else "–")
        )
    whole = [report.latency_ms * 1e3 for report in reports.values()]
    sums_us = [sum(s.values()) for s in sums]
    for label, (a, b) in (("sum of the operations", sums_us), ("whole model", whole)):
        rows.append((label, f"{a:,.0f}", f"{b:,.0f}", "", "", f"{a / b:.2f} ×"))
    return rows


def words(tile: tuple[int, ...]) -> str:
    """Such as "16 or multiples of 32"."""
    return " or ".join([*map(str, tile[:-1]), f"multiples of {tile[-1]}"])


def report(rows: list[Row], profiles: Mapping[str, Any], runs: int) -> str:
    """The page as Markdown, but for the conclusions."""
    tile = tiles()
    head = ("network", "type", "kept channels", "CPU ms", "MACs", "ideal", "speed-up",
            "of the ideal", "tiled")  # fmt: skip
    body = table(
        head,
        [
            (
                row.network,
                row.dtype,
                row.variant,
                f"{row.latency_ms:.2f}",
                percent(1 / row.ideal),
                f"{row.ideal:.2f} ×",
                f"{row.speed_up:.2f} ×",
                percent(row.reached, 0),
                f"{row.ideal_in_tiles:.2f} ×",
            )
            for row in rows
        ],
        right=head[3:],
        markdown=True,
    )
    parts = [
        "# CPU latency at half the MACs",
        f"LiteRT, one thread, median thread CPU time of {runs} runs, all forms of a network in "
        "turn, five runs each, round after round. Random weights, criterion l1, `macs=0.5`, "
        "order uniform unless said. ResNet-56 (shortcuts A and B) at 32 pixels, the others at 224.",
        body,
        "**ideal**: MACs of the dense over MACs of the pruned network. **of the ideal**: speed-up "
        f"over ideal; the goal is {percent(GOAL, 0)}. **tiled**: the same ratio of MACs if output "
        "channels count in whole tiles of the kernels of this CPU, "
        f"{words(tile[0])} for float32 and {words(tile[1])} for int8. Missing variants cannot "
        "reach half the MACs, or are the same as without their last clause.",
    ]
    head = ("operation", "dense µs", "pruned µs", "of dense", "of pruned", "speed-up")
    for (name, dtype), reports in profiles.items():
        title = f"{name}, {dtype}, {list(reports)[1]}"
        worst = max(abs(alone_over_whole(report) - 1) for report in reports.values())
        if worst > ALONE:
            ratios = " and ".join(f"{alone_over_whole(report):.2f}" for report in reports.values())
            parts.append(
                f"No profile of {title}: the operations timed alone take {ratios} times as long "
                "as in the whole, so that they do not tell where its time goes."
            )
            continue
        parts += [
            f"## Where the time goes: {title}",
            table(head, by_operation(reports), right=head[1:], markdown=True),
        ]
    parts.append("Operations are timed alone; their sum is near the whole model's time, not equal.")
    return "\n\n".join([*parts, circumstances("benchmarks.latency")])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS], choices=[*NETWORKS])
    parser.add_argument("--runs", type=int, default=50, help="timed runs a model (default 50)")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    rows: list[Row] = []
    profiles = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.networks:
            found, reports = look(name, VARIANTS, arguments.runs, Path(folder))
            rows += found
            profiles |= {(name, dtype): by_form for dtype, by_form in reports.items()}
            keras.backend.clear_session()
            gc.collect()
    write(report(rows, profiles, arguments.runs), arguments.output)


if __name__ == "__main__":
    main()
