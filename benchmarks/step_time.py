"""Time of a training step with pruning wrappers against the plain model, beside tfmot's own."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tf_keras

import tfprune
from benchmarks.common import circumstances, write
from tfprune.reports.text import table

_STEPS = 8
_NEVER = 10**9


@dataclass(frozen=True)
class Contender:
    """A compiled model with what fit() needs, and the model it is compared with."""

    name: str
    fit: Callable[[int], None]
    against: str | None


def resnet20(framework: Any) -> Any:
    """ResNet-20 for CIFAR-10 (He et al. 2016) with projection shortcuts, in either Keras."""
    layers = framework.layers

    def normalised(x: Any, filters: int, size: int, stride: int = 1) -> Any:
        x = layers.Conv2D(filters, size, strides=stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    inputs = framework.Input((32, 32, 3))
    x = layers.ReLU()(normalised(inputs, 16, 3))
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(3):
            stride = 2 if stage and not block else 1
            y = layers.ReLU()(normalised(x, filters, 3, stride))
            y = normalised(y, filters, 3)
            shortcut = normalised(x, filters, 1, stride) if stride == 2 else x
            x = layers.ReLU()(layers.Add()([y, shortcut]))
    x = layers.GlobalAveragePooling2D()(x)
    return framework.Model(inputs, layers.Dense(10)(x))


def contender(
    name: str, framework: Any, frequency: int | None, batch: int, against: str | None, seed: int
) -> Contender:
    """A model of ``framework``, wrapped if there is a frequency of mask updates."""
    framework.utils.set_random_seed(seed)
    model, callbacks = resnet20(framework), []
    if frequency is not None:
        schedule = tfprune.schedules.Constant(0.8, 0, frequency=frequency)
        model = tfprune.prune_low_magnitude(model, schedule)
        callbacks = [tfprune.UpdatePruningStep()]
    model.compile(
        framework.optimizers.SGD(0.01, momentum=0.9),
        framework.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    random = np.random.default_rng(seed)
    x = random.standard_normal((batch * _STEPS, 32, 32, 3)).astype("float32")
    y = random.integers(0, 10, batch * _STEPS)

    def fit(epochs: int) -> None:
        model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0, callbacks=callbacks)

    return Contender(name, fit, against)


def measure(contenders: list[Contender], rounds: int) -> dict[str, list[float]]:
    """Wall milliseconds per step of each contender and round; the contenders take turns."""
    found: dict[str, list[float]] = {one.name: [] for one in contenders}
    for one in contenders:
        one.fit(1)  # traces and warms up
    for _ in range(rounds):
        for one in contenders:
            before = time.perf_counter()
            one.fit(1)
            found[one.name].append(1000 * (time.perf_counter() - before) / _STEPS)
    return found


def report(contenders: list[Contender], found: dict[str, list[float]], batch: int) -> str:
    """The page as Markdown."""
    rows = []
    for one in contenders:
        times = found[one.name]
        cells = [one.name, f"{min(times):.0f}", f"{statistics.median(times):.0f}"]
        if one.against is None:
            rows.append((*cells, "", ""))
            continue
        base = found[one.against]
        paired = statistics.median(a / b for a, b in zip(times, base, strict=True))
        rows.append((*cells, f"{min(times) / min(base):.3f}", f"{paired:.3f}"))
    head = ("model", "ms, least", "ms, median", "least / least of plain", "median of the ratios")
    return "\n\n".join(
        [
            "# Time of a training step with pruning wrappers",
            f"ResNet-20, batches of {batch}, SGD with momentum, random images, no XLA. In every "
            f"one of {len(next(iter(found.values())))} rounds each model makes {_STEPS} steps "
            "through fit(), one after the other, so that what else the machine does meets all of "
            "them; fixed costs of fit() are in all times. *Least* is the least disturbed round; "
            "the last column compares the two models within each round.",
            table(head, rows, right=head[1:], markdown=True),
            circumstances("benchmarks.step_time"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    two, three = "tf_keras, plain", "Keras 3, plain"
    ways = (
        (three, keras, None, None),
        ("Keras 3, wrapped, between mask updates", keras, _NEVER, three),
        ("Keras 3, wrapped, a mask update every 8 steps", keras, _STEPS, three),
        (two, tf_keras, None, None),
        ("tf_keras, tfmot's wrapper, between mask updates", tf_keras, _NEVER, two),
        ("tf_keras, tfmot's wrapper, a mask update every 8 steps", tf_keras, _STEPS, two),
    )
    contenders = [
        contender(name, framework, frequency, options.batch, against, options.seed)
        for name, framework, frequency, against in ways
    ]
    found = measure(contenders, options.rounds)
    write(report(contenders, found, options.batch), options.output)


if __name__ == "__main__":
    main()
