"""Time of a training step by each training-time method against plain training, in one run."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

from benchmarks.common import circumstances, write
from benchmarks.methods import SETTINGS, Stage
from benchmarks.step_time import Contender, measure, resnet20
from tfprune.cost import measure as cost_of
from tfprune.methods.structured import StructureLog
from tfprune.reports.text import table

_STEPS = 8
_PLAIN = "plain"


def examples(batch: int, seed: int) -> tuple[Any, Any]:
    """Random images and labels for an epoch of the measurement."""
    random = np.random.default_rng(seed)
    images = random.standard_normal((batch * _STEPS, 32, 32, 3)).astype("float32")
    return images, random.integers(0, 10, batch * _STEPS)


def contender(name: str, batch: int, seed: int) -> tuple[Contender, float]:
    """A model in training, and the seconds that its log takes at the end of an epoch."""
    keras.utils.set_random_seed(seed)
    x, y = examples(batch, seed)
    model = resnet20(keras)
    method = None
    if name != _PLAIN:
        macs = cost_of(model).macs or 1
        method = SETTINGS[name](Stage(data=(x, y), steps=_STEPS, epochs=4, macs=macs))
        model = method.prepare(model)
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    seconds = 0.0
    if method is not None:
        log = StructureLog(method)
        log.set_model(model)
        log.on_epoch_end(0, {})  # analyses the model once
        started = time.perf_counter()
        log.on_epoch_end(1, {})
        seconds = time.perf_counter() - started

    def fit(epochs: int) -> None:
        model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0)

    return Contender(name, fit, None if name == _PLAIN else _PLAIN), seconds


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.method_time", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    made = [contender(name, options.batch, options.seed) for name in (_PLAIN, *SETTINGS)]
    found = measure([one for one, _ in made], options.rounds)
    plain = found[_PLAIN]
    rows = []
    for one, seconds in made:
        times = found[one.name]
        paired = statistics.median(a / b for a, b in zip(times, plain, strict=True))
        log = "" if one.against is None else f"{1000 * seconds:.0f}"
        rows.append(
            (one.name, f"{min(times):.0f}", f"{min(times) / min(plain):.2f}", f"{paired:.2f}", log)
        )
    head = ("training", "ms, least", "least / least of plain", "median of the ratios", "log, ms")
    text = "\n\n".join(
        [
            "# Time of a training step, by method",
            f"ResNet-20, batches of {options.batch}, SGD with momentum, random images, no XLA. In "
            f"every one of {options.rounds} rounds each model makes {_STEPS} steps through fit(), "
            "one after the other. What runs between epochs, or every few hundred steps (zeroing, "
            "choosing masks), is left out; **log** is what writing the structure to the logs takes "
            "at the end of an epoch.",
            table(head, rows, right=head[1:], markdown=True),
            circumstances("benchmarks.method_time"),
        ]
    )
    write(text, options.output)


if __name__ == "__main__":
    main()
