"""Which form of a channel selection LiteRT runs well: a gather, slices that are joined, a product.

A pre-activation network whose readers keep every third channel of a stream, in each form, and the
same network without any selection: milliseconds on the CPU, and whether the GPU accelerator takes
all of it with the right numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from benchmarks.common import circumstances, write
from tfprune.litert.convert import convert
from tfprune.litert.gpu import driver_announced, run_on_gpu
from tfprune.litert.keras_model import keras_model
from tfprune.litert.latency import CpuRunner
from tfprune.reports.text import table

_CHANNELS, _BLOCKS, _SIZE, _WARMUP = 96, 6, 32, 5


def gathered(tensor: Any, indices: Any) -> Any:
    """One GATHER."""
    return keras.ops.take(tensor, np.asarray(indices, np.int32), axis=-1)


def sliced(tensor: Any, indices: Any) -> Any:
    """A slice for every run of neighbours, joined."""
    cuts = np.flatnonzero(np.diff(indices) != 1) + 1
    runs = np.split(np.asarray(indices), cuts)
    parts = [tensor[..., int(run[0]) : int(run[-1]) + 1] for run in runs]
    return parts[0] if len(parts) == 1 else keras.ops.concatenate(parts, axis=-1)


def multiplied(tensor: Any, indices: Any) -> Any:
    """A 1x1 convolution with ones and zeros."""
    kernel = np.eye(tensor.shape[-1], dtype="float32")[:, indices]
    layer = keras.layers.Conv2D(len(indices), 1, use_bias=False)
    result = layer(tensor)
    layer.set_weights([kernel[None, None]])
    return result


def whole(tensor: Any, indices: Any) -> Any:
    """No selection: all channels are read."""
    return tensor


def network(form: Callable[[Any, Any], Any], indices: Any) -> Any:
    """Pre-activation blocks of 3x3 convolutions, each reading a selection of the stream."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((_SIZE, _SIZE, 3), batch_size=1)
    stream = layers.Conv2D(_CHANNELS, 3, padding="same", use_bias=False)(inputs)
    for _ in range(_BLOCKS):
        branch = layers.ReLU()(layers.BatchNormalization()(form(stream, indices)))
        branch = layers.Conv2D(_CHANNELS // 3, 3, padding="same", use_bias=False)(branch)
        branch = layers.ReLU()(layers.BatchNormalization()(branch))
        branch = layers.Conv2D(_CHANNELS, 1, use_bias=False)(branch)
        stream = layers.Add()([stream, branch])
    features = layers.GlobalAveragePooling2D()(layers.ReLU()(stream))
    return keras.Model(inputs, layers.Dense(10)(features))


def main() -> None:
    """Measures every form and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="timed runs of every form")
    parser.add_argument("--output", type=Path, help="file for the table; default: print it")
    options = parser.parse_args()
    scattered = np.arange(0, _CHANNELS, 3)
    neighbours = np.arange(_CHANNELS // 3)
    cases = [
        ("every channel read", whole, scattered),
        ("gather (keras.ops.take)", gathered, scattered),
        ("slices, joined; 32 runs", sliced, scattered),
        ("1x1 convolution", multiplied, scattered),
        ("gather, one run of neighbours", gathered, neighbours),
        ("slice, one run of neighbours", sliced, neighbours),
    ]
    contents = [convert(keras_model(network(form, indices))) for _, form, indices in cases]
    runners = [CpuRunner(content, threads=1, seed=0) for content in contents]
    seconds: list[list[float]] = [[] for _ in cases]
    for number in range(options.rounds + _WARMUP):
        for times, runner in zip(seconds, runners, strict=True):
            started = time.perf_counter()
            runner.run()
            if number >= _WARMUP:
                times.append(time.perf_counter() - started)
    rows = []
    least = [min(times) for times in seconds]
    for (name, _, _), content, best in zip(cases, contents, least, strict=True):
        gpu = "no driver"
        if driver_announced():
            run = run_on_gpu(content, runs=1, warmup=0, timeout_s=120)
            difference = run.relative_difference
            gpu = run.status + ("" if difference is None else f", difference {difference:.1e}")
        rows.append((name, f"{best / least[0]:.2f}", gpu))
    lines = [
        "# Forms of a channel selection",
        "",
        f"{_BLOCKS} pre-activation blocks on a stream of {_CHANNELS} channels, {_SIZE}x{_SIZE} "
        f"pixels; each reader takes {_CHANNELS // 3} of them. CPU: least of {options.rounds} "
        "interleaved runs, one thread, as a ratio to the network that reads every channel.",
        "",
        table(("form", "CPU, ratio", "GPU accelerator"), rows, markdown=True),
        "",
        circumstances("benchmarks.selection_form"),
    ]
    write("\n".join(lines), options.output)


if __name__ == "__main__":
    main()
