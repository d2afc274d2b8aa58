"""Time of tfprune.analyse against the size of the model: real networks and growing families."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

import tfprune
from benchmarks.common import circumstances, write
from tfprune.reports.text import table

MODELS = (
    "MobileNetV2", "VGG16", "ResNet50", "ResNet152", "DenseNet121", "DenseNet201", "InceptionV3",
    "InceptionResNetV2", "Xception", "NASNetMobile", "NASNetLarge", "EfficientNetB0",
    "EfficientNetB7", "EfficientNetV2L", "MobileNetV3Large", "ConvNeXtTiny", "ConvNeXtXLarge",
)  # fmt: skip
GOALS_S = {"ResNet50": 0.2, "EfficientNetB7": 1.0, "NASNetLarge": 1.0}
DEPTHS = (8, 16, 32, 64, 128, 256)
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Row:
    """One model; the times are the least and the median of several."""

    name: str
    layers: int
    groups: int
    channels: int
    least_s: float
    median_s: float


def look(name: str, model: Any, repeats: int) -> Row:
    """Analyses a built model several times; the first is not counted."""
    graph = tfprune.analyse(model)
    seconds = []
    for _ in range(repeats):
        start = time.thread_time()
        graph = tfprune.analyse(model)
        seconds.append(time.thread_time() - start)
    layers = len(model._flatten_layers(include_self=False, recursive=True))
    channels = sum(group.width for group in graph)
    print(name, layers, channels, seconds, file=sys.stderr, flush=True)
    return Row(name, layers, len(graph), channels, min(seconds), float(np.median(seconds)))


def residual(depth: int, width: int) -> Any:
    """A stem and ``depth`` residual blocks of two convolutions; 1x1, so that weights are small."""
    layers = keras.layers
    inputs = x = keras.Input((8, 8, 3))
    x = layers.Conv2D(width, 1)(x)
    for _ in range(depth):
        y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 1)(x)))
        y = layers.BatchNormalization()(layers.Conv2D(width, 1)(y))
        x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def dense_blocks(depth: int, growth: int) -> Any:
    """``depth`` layers that each read all before them: widths, not only layers, grow."""
    layers = keras.layers
    inputs = x = keras.Input((8, 8, 3))
    x = layers.Conv2D(growth, 1)(x)
    for _ in range(depth):
        y = layers.Conv2D(growth, 1)(layers.ReLU()(layers.BatchNormalization()(x)))
        x = layers.Concatenate()([x, y])
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def family(title: str, make: Callable[[int], Any], sizes: Sequence[int], repeats: int) -> list[Row]:
    """A row for every size."""
    rows = []
    for number in sizes:
        rows.append(look(f"{title} {number}", make(number), repeats))
        keras.backend.clear_session()
        gc.collect()
    return rows


def exponent(sizes: Sequence[int], rows: Sequence[Row]) -> float:
    """The slope of log time over log size, in the upper half, where constants matter least."""
    half = len(sizes) // 2
    x, y = np.log(sizes[half:]), np.log([row.least_s for row in rows[half:]])
    return float(np.polyfit(x, y, 1)[0])


def rows_table(rows: Sequence[Row], goals: bool = False) -> str:
    """A Markdown table."""
    head = ["model", "layers", "groups", "channels", "least s", "median s", *(["goal"] * goals)]
    cells = []
    for row in rows:
        goal = GOALS_S.get(row.name)
        cells.append(
            [
                row.name,
                f"{row.layers:,}",
                f"{row.groups:,}",
                f"{row.channels:,}",
                f"{row.least_s:.4f}",
                f"{row.median_s:.4f}",
                *([f"at most {goal:g} s" if goal else ""] * goals),
            ]
        )
    return table(head, cells, right=head[1:6], markdown=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.analysis", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="timed analyses a model (default 7)")
    parser.add_argument("--models", nargs="*", default=MODELS, help="of keras.applications")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()

    real = []
    for name in arguments.models:
        model = getattr(keras.applications, name)(weights=None)
        real.append(look(name, model, arguments.repeats))
        del model
        keras.backend.clear_session()
        gc.collect()
    parts = [
        "# Time of tfprune.analyse",
        "Of models of `keras.applications` at their usual size, after they are built. Thread CPU "
        f"time of {arguments.repeats} analyses after one that is not counted.",
        rows_table(real, goals=True),
    ]
    families: tuple[tuple[str, str, Callable[[int], Any], Sequence[int]], ...] = (
        ("Growing depth", "residual blocks of 64 channels", lambda n: residual(n, 64), DEPTHS),
        ("Growing width", "channels in 8 residual blocks", lambda n: residual(8, n), WIDTHS),
        ("Growing concatenations", "layers of 16 channels that read all before them",
         lambda n: dense_blocks(n, 16), DEPTHS[:-1]),
    )  # fmt: skip
    for title, unit, make, sizes in families:
        rows = family(unit + ",", make, sizes, arguments.repeats)
        parts += [
            f"## {title}",
            f"Sizes: {unit}. Time grows with the size to the power of "
            f"{exponent(sizes, rows):.2f} over the upper half of the table.",
            rows_table(rows),
        ]
    parts.append(
        "In the last family the weights' axes grow with the square of the number of layers, and "
        "so does the least that an analysis has to read."
    )
    write("\n\n".join([*parts, circumstances("benchmarks.analysis")]), arguments.output)


if __name__ == "__main__":
    main()
