"""Whether XNNPACK's sparse path does what tfprune says of it, with AVX hidden from LiteRT.

It needs Linux on x86-64 with AVX, a C compiler and objdump, and leaves the installed LiteRT alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from benchmarks.common import circumstances, write
from benchmarks.hidden_avx import HiddenAvx, NothingHiddenError, hidden_avx
from tests.sparse_path.networks import NETWORKS, network, with_zeros
from tfprune.litert import sparse_path
from tfprune.litert.convert import convert, convert_sparse
from tfprune.litert.keras_model import keras_model
from tfprune.litert.latency import CpuRunner
from tfprune.reports.text import percent, table
from tfprune.sparse_path import Verdict, keras_sparse_path

_CHILD = Path(__file__).with_name("hidden_avx_child.py")
_WIDTH = 192
_TOLERANCE, _FLOAT16_TOLERANCE = 1e-4, 1e-2
_FASTER = 1.3
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Case:
    """A network, built when its turn comes."""

    name: str
    zeros: float
    model: Any
    float16: bool = False


@dataclass(frozen=True)
class Row:
    """What was foretold of a network, and what happened.

    Attributes:
        error: Why the sparse file does not run; empty where it does.
        difference: From the dense file's outputs, in units of the largest; ``None`` where it does
            not run or the shapes differ.
        speedup: Of the sparse file against the dense one; ``None`` where it does not run.
        with_avx: The difference where AVX is not hidden.
    """

    case: Case
    by_file: Verdict
    by_keras: Verdict
    error: str
    difference: float | None
    speedup: float | None
    with_avx: float

    @property
    def observed(self) -> Verdict:
        """What the verdict should have been."""
        tolerance = _FLOAT16_TOLERANCE if self.case.float16 else _TOLERANCE
        # NaN is not at most anything
        if self.difference is None or not self.difference <= tolerance:
            return "broken"
        return "sparse" if self.speedup is not None and self.speedup > _FASTER else "dense"


def cases(size: int) -> Iterator[Case]:
    """The networks of the tests in larger, two variants of them, and MobileNets."""

    def one(name: str, float16: bool = False, **options: Any) -> Case:
        model = network(keras, **options, size=size, width=_WIDTH)
        return Case(name, options.get("zeros", 0.9), model, float16)

    for name, options in NETWORKS.items():
        yield one(name, **options)
    yield one("plain, in float16", float16=True)
    yield one("multiplied by 2", middle=lambda k, x: x * 2.0)
    for zeros in (0.7, 0.9):
        yield Case("MobileNetV1, symmetric padding", zeros, with_zeros(mobilenet(), zeros))
    for which in (keras.applications.MobileNet, keras.applications.MobileNetV2):
        model = with_zeros(which(weights=None), 0.9)
        yield Case(f"keras.applications.{which.__name__}", 0.9, model)


def mobilenet() -> Any:
    """MobileNetV1 (Howard et al. 2017), padded on all sides alike, with a dense head."""
    layers = keras.layers

    def finished(x: Any) -> Any:
        return layers.ReLU(6.0)(layers.BatchNormalization()(x))

    def padded(x: Any, stride: int) -> Any:
        return layers.ZeroPadding2D(1)(x) if stride == 2 else x

    inputs = keras.Input((224, 224, 3))
    stem = layers.Conv2D(32, 3, strides=2, use_bias=False)
    x = finished(stem(padded(inputs, 2)))
    for width, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
                          *[(512, 1)] * 5, (1024, 2), (1024, 1)):  # fmt: skip
        padding = "valid" if stride == 2 else "same"
        depthwise = layers.DepthwiseConv2D(3, strides=stride, padding=padding, use_bias=False)
        x = finished(depthwise(padded(x, stride)))
        x = finished(layers.Conv2D(width, 1, use_bias=False)(x))
    return keras.Model(inputs, layers.Dense(1000)(layers.GlobalAveragePooling2D()(x)))


def examine(case: Case, hidden: HiddenAvx, rounds: int) -> Row:
    """Judges a network, and runs its dense and its sparse file."""
    model = keras_model(case.model)
    # export() would refuse to write what it expects to break
    dense, sparse = convert(model), convert_sparse(model, float16=case.float16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "dense.tflite").write_bytes(dense)
        (folder / "sparse.tflite").write_bytes(sparse)
        found = observe(folder, hidden, rounds)
    verdicts = (sparse_path(sparse).verdict, keras_sparse_path(case.model).verdict)
    return Row(case, *verdicts, **found, with_avx=difference_with_avx(dense, sparse))


def difference_with_avx(dense: bytes, sparse: bytes) -> float:
    """The largest between the files' outputs on this machine as it is, as in :class:`Row`."""
    outputs = []
    for content in (dense, sparse):
        runner = CpuRunner(content, threads=1, seed=0)
        runner.run()
        outputs.append(runner.outputs())
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*outputs, strict=True))


def observe(folder: Path, hidden: HiddenAvx, rounds: int) -> dict[str, Any]:
    """What came of running the files, by the names that ``Row`` has for it.

    A process that does not end well is a result, too.
    """
    failed = {"difference": None, "speedup": None}
    try:
        done = hidden.run(_CHILD, str(folder), str(rounds), timeout_s=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"it does not end in {_TIMEOUT_S} s", **failed}
    if done.returncode < 0:
        return {"error": f"it ends by signal {-done.returncode}", **failed}
    if done.returncode:
        raise RuntimeError(f"The process without AVX failed: {done.stderr}")
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if not found.pop("answered"):
        raise RuntimeError("LiteRT asked the processor for AVX without being noticed")
    return found


def report(rows: list[Row], size: int, seconds: float) -> str:
    """The page as Markdown."""
    head = (
        "network",
        "zeros",
        "file",
        "Keras",
        "observed",
        "runs",
        "difference",
        "speed-up",
        "with AVX",
    )
    return "\n\n".join(
        [
            "# XNNPACK's sparse path: foretold and observed",
            f"Each network is converted twice, with dense kernels and with sparse ones, and both "
            f"files run on the same random image, on one thread of LiteRT from which AVX was "
            f"hidden (`hidden_avx.py`): with it, XNNPACK has no sparse path on x86. The networks "
            f"are those of `tests/sparse_path/networks.py` with {size} pixels and {_WIDTH} "
            "channels, where a MobileNet is not named; weights are random.",
            table(head, [_cells(row) for row in rows], right=head[6:], markdown=True),
            "**zeros**: in each 1x1 convolution. **file**, **Keras**: the verdicts of "
            "`tfprune.litert.sparse_path` on the sparse file and of `keras_sparse_path` on the "
            "model. **observed**: *broken* where the sparse file does not run, or its outputs have "
            f"other shapes or differ by more than {_TOLERANCE:g} of the largest "
            f"({_FLOAT16_TOLERANCE:g} in float16); else *sparse* where it is more than {_FASTER:g} "
            "times as fast as the dense file, and *dense* otherwise. **difference**: the largest, "
            "from the dense file, in units of the output's largest value; **with AVX**: the same "
            "where AVX is not hidden and XNNPACK computes everything densely. **speed-up**: CPU "
            "time of the dense file by that of the sparse one, median of rounds in which both take "
            "turns.",
            "These are x86's SSE kernels: a phone's speed-ups are others. That the same search for "
            "sparse parts runs on ARM is read in XNNPACK's source, and was not observed.",
            *_agreement(rows),
            f"All of it took {seconds / 60:.0f} minutes.",
            circumstances("benchmarks.sparse_path"),
        ]
    )


def _cells(row: Row) -> tuple[str, ...]:
    difference = "other shape" if row.speedup is not None else "–"
    return (
        row.case.name,
        percent(row.case.zeros, 0),
        *(v if v == row.observed else f"**{v}**" for v in (row.by_file, row.by_keras)),
        row.observed,
        "no" if row.error else "yes",
        difference if row.difference is None else _small(row.difference),
        "–" if row.speedup is None else f"{row.speedup:.2f}",
        _small(row.with_avx),
    )


def _small(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _agreement(rows: list[Row]) -> Iterator[str]:
    wrong = {
        "from the file": [r for r in rows if r.by_file != r.observed],
        "from the Keras model": [r for r in rows if r.by_keras != r.observed],
    }
    yield " ".join(
        f"**{len(rows) - len(differing)} of {len(rows)} verdicts {source} are what was observed.**"
        for source, differing in wrong.items()
    )
    lines = [
        f"- {row.case.name}, {percent(row.case.zeros, 0)} zeros, {source}: "
        f"{row.by_file if source == 'from the file' else row.by_keras}, observed {row.observed}"
        for source, differing in wrong.items()
        for row in differing
    ]
    if lines:
        yield "\n".join(["The others:", "", *lines])
    refused = [f"- {row.case.name}: {row.error}" for row in rows if row.error]
    if refused:
        yield "\n".join(["Where a file does not run:", "", *refused])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_path", description=__doc__)
    parser.add_argument("--size", type=int, default=112, help="pixels of the small networks")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each file")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    began = time.monotonic()
    rows = []
    try:
        with hidden_avx() as hidden:
            for case in cases(options.size):
                rows.append(examine(case, hidden, options.rounds))
                print(*_cells(rows[-1]), sep="  ", file=sys.stderr, flush=True)
                keras.backend.clear_session()
    except NothingHiddenError as error:
        parser.exit(1, f"{error}.\n")
    write(report(rows, options.size, time.monotonic() - began), options.output)


if __name__ == "__main__":
    main()
