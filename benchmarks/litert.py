"""LiteRT against Keras: float32 differences and int8 agreement, dense and halved."""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

import tfprune
from benchmarks.common import circumstances, write
from tests.equivalence.networks import NETWORKS, halved, images, network, relative_difference
from tfprune.litert import Predictor
from tfprune.reports.text import percent, size, table


@dataclass(frozen=True)
class Row:
    """One network in one form."""

    name: str
    form: str
    float_bytes: int
    difference: float
    yardstick: float
    int8_bytes: int
    agreement: float
    classes: int
    noise: float


def yardstick(model: Any, test: Any, expected: Any) -> float:
    """What Keras itself makes of inputs that are off by one unit in the last place."""
    signs = np.random.default_rng(0).choice(np.float32([-1, 1]), test.shape)
    moved = test * (1 + signs * np.finfo(np.float32).eps)
    return relative_difference(expected, model.predict(moved, verbose=0))


def look(model: Any, name: str, form: str, examples: int, folder: Path) -> Row:
    """Converts to float32 and int8 and runs both on images that the calibration did not see."""
    test = images(model, name, examples, seed=4)
    expected = np.asarray(model.predict(test, verbose=0), np.float64)
    # Judged here, so that a difference beyond the exporter's own limit is a figure, not an error.
    floats = tfprune.export(model, folder / "float.tflite", check=False)
    integers = tfprune.export(
        model,
        folder / "int8.tflite",
        quantize="int8",
        calibration=images(model, name, 64, seed=3),
        check=False,
    )
    quantized = Predictor(integers.path)(test)
    chosen = expected.argmax(-1)
    return Row(
        name=name,
        form=form,
        float_bytes=floats.size_bytes,
        difference=relative_difference(expected, Predictor(floats.path)(test)),
        yardstick=yardstick(model, test, expected),
        int8_bytes=integers.size_bytes,
        agreement=float((quantized.argmax(-1) == chosen).mean()),
        classes=len(np.unique(chosen)),
        # Only what differs between images decides which class is largest.
        noise=float((quantized - expected).std() / (expected - expected.mean(0)).std()),
    )


def report(rows: list[Row], examples: int) -> str:
    """The page as Markdown."""
    head = (
        "network", "form", "float32", "difference", "one ulp", "int8", "same top-1",
        "classes seen", "int8 noise",
    )  # fmt: skip
    body = table(
        head,
        [
            (
                row.name,
                row.form,
                size(row.float_bytes),
                f"{row.difference:.1e}",
                f"{row.yardstick:.1e}",
                size(row.int8_bytes),
                percent(row.agreement),
                row.classes,
                percent(row.noise),
            )
            for row in rows
        ],
        right=head[2:],
        markdown=True,
    )
    worst = max(row.difference for row in rows)
    return "\n\n".join(
        [
            "# LiteRT against Keras",
            f"Networks with random weights on {examples} random images of coarse squares; halved: "
            "half of the channels of every group pruned, statistics estimated anew. The largest "
            f"float32 difference is {worst:.1e} of the largest output.",
            body,
            "**difference**: the largest absolute difference between LiteRT's float32 model and "
            "Keras, relative to the largest output. **one ulp**: the same between Keras and Keras "
            "with every input moved by one unit in the last place; a difference of that order is "
            "the network's own sensitivity, not the conversion's. **same top-1**: how often the "
            "int8 model (calibrated on 64 other images) has its largest output at the same class "
            "as Keras. **classes seen**: how many classes Keras chose among these images. "
            "**int8 noise**: deviation of the int8 outputs from Keras's, relative to the deviation "
            "of Keras's outputs among the images. Untrained networks are a hard case for int8: "
            "their largest outputs lie close together.",
            circumstances("benchmarks.litert"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.litert", description=__doc__)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS, metavar="NAME")
    parser.add_argument("--examples", type=int, default=256, help="test images (default 256)")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.networks:
            model = network(name)
            for form, one in (("dense", model), ("halved", halved(model, name))):
                rows.append(look(one, name, form, arguments.examples, Path(folder)))
                print(rows[-1], file=sys.stderr, flush=True)
            keras.backend.clear_session()
            gc.collect()
    write(report(rows, arguments.examples), arguments.output)


if __name__ == "__main__":
    main()
