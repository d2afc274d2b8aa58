"""A trained CIFAR-10 network with sparse weights: accuracy, file size and compressed size."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

import tfprune
from benchmarks.cifar import accuracy
from benchmarks.common import circumstances, write
from tfprune.layers import Masks, with_masks
from tfprune.reports.text import percent, size, table

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
SCHEDULES = ("Cosine", "Polynomial")


@dataclass(frozen=True)
class Row:
    """One network; accuracies are fractions of the test set, sizes bytes.

    ``sparse_bytes`` and ``sparse_gzip`` are ``None`` where there is nothing to encode sparsely.
    """

    asked: float
    schedule: str
    found: float
    at_once: float | None
    tuned: float
    size_bytes: int
    gzip_bytes: int
    sparse_bytes: int | None
    sparse_gzip: int | None
    seconds: float


def files(model: Any, sparse: bool) -> tuple[int, int, int | None, int | None]:
    """Bytes and gzip bytes of the float32 file, and of the one in sparse encoding."""
    with tempfile.TemporaryDirectory() as folder:
        dense = tfprune.export(model, Path(folder) / "dense.tflite")
        if not sparse:
            return dense.size_bytes, dense.gzip_bytes, None, None
        other = tfprune.export(model, Path(folder) / "sparse.tflite", sparse=True)
        return dense.size_bytes, dense.gzip_bytes, other.size_bytes, other.gzip_bytes


def at_once(dense: Any, sparsity: float, data: Any) -> float:
    """Accuracy where the smallest weights of every layer go at once, without training."""
    method = tfprune.methods.Han(sparsity=sparsity)
    return accuracy(method.masks(dense).apply(dense).predict_on_batch, data.test)


def sparsify(
    dense: Any,
    data: Any,
    sparsity: float,
    schedule: str,
    without_training: float | None,
    options: argparse.Namespace,
) -> Row:
    """Fine-tunes a copy of the network, its weights pruned on the way if ``sparsity`` asks so."""
    began = time.monotonic()
    steps = options.epochs * len(data.train)
    if sparsity:
        ramp = getattr(tfprune.schedules, schedule)(
            0.0, sparsity, 0, int(options.ramp * steps), frequency=options.frequency
        )
        model, callbacks = tfprune.prune_low_magnitude(dense, ramp), [tfprune.UpdatePruningStep()]
    else:
        model, callbacks = with_masks(dense, Masks.ones(dense)), [tfprune.UpdatePruningStep()]
    tfprune.fine_tune(
        model,
        data.train_epoch,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        schedule="cosine",
        weight_decay=1e-4,
        callbacks=callbacks,
        seed=options.seed,
        verbose=0,
    )
    tuned = tfprune.strip_pruning(model)
    return Row(
        sparsity,
        schedule.lower() if sparsity else "–",
        Masks.of_zeros(tuned).sparsity,
        without_training,
        accuracy(tuned.predict_on_batch, data.test),
        *files(tuned, sparse=sparsity > 0),
        time.monotonic() - began,
    )


def report(rows: list[Row], data: Any, seconds: float, options: argparse.Namespace) -> str:
    """The page as Markdown."""
    head = ("sparsity asked", "schedule", "sparsity", "accuracy at once", "accuracy fine-tuned",
            "file", "gzip", "sparse file", "sparse gzip")  # fmt: skip
    cells = [
        (
            percent(row.asked, 0), row.schedule, percent(row.found, 2),
            "–" if row.at_once is None else percent(row.at_once, 2),
            percent(row.tuned, 2),
            size(row.size_bytes), size(row.gzip_bytes),
            "–" if row.sparse_bytes is None else size(row.sparse_bytes),
            "–" if row.sparse_gzip is None else size(row.sparse_gzip),
        )
        for row in rows
    ]  # fmt: skip
    counts, steps = data.info.counts, options.epochs * len(data.train)
    return "\n\n".join(
        [
            f"# Sparse weights: {options.network_name} on {options.data_name}",
            f"Accuracy on the {counts['test']:,} test images, which nothing else uses. Fine-tuned "
            f"on {counts['train']:,} training images, the rest of a fixed subset of "
            f"{sum(counts.values()) - counts['test']:,} being held out: {options.epochs} epochs "
            f"({steps} steps) of SGD with momentum 0.9, learning rate {options.learning_rate} (a "
            f"cosine from epoch to epoch), batches of {data.info.batch_size}, L2 1e-4, shifted and "
            f"flipped images; the last weights count, nothing is chosen. Masks are updated every "
            f"{options.frequency} steps up to step {int(options.ramp * steps)}, then held. Seed "
            f"{options.seed}, one run each: small differences mean nothing.",
            table(head, cells, right=(head[0], *head[2:]), markdown=True),
            "**sparsity**: of all kernels, in the finished model. **at once**: the same sparsity "
            "in every layer by magnitude, without training. **file**: float32 .tflite, zeros "
            "stored as numbers; **sparse file**: in LiteRT's sparse encoding "
            "(`export(..., sparse=True)`), run and compared with Keras. **gzip**: level 6. The "
            "first row is the network as it came, the second the same fine-tuning without pruning.",
            f"All of it took {seconds / 60:.0f} minutes.",
            circumstances("benchmarks.sparsity", command_line(options)),
        ]
    )


def command_line(options: argparse.Namespace) -> list[str]:
    """The arguments without the places of this machine."""
    return [
        f"--model {options.model.name}",
        f'--network-name "{options.network_name}"',
        f'--data-name "{options.data_name}"',
        f"--subset {options.subset} --epochs {options.epochs} --ramp {options.ramp}",
        f"--frequency {options.frequency} --learning-rate {options.learning_rate}",
        f"--seed {options.seed}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparsity", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a .keras file that gives logits")
    parser.add_argument("--network-name", default="The network", help="for the title")
    parser.add_argument("--data-name", default="CIFAR-10", help="for the title")
    parser.add_argument("--normalization", default="imagenet", help="see tfprune.data.load")
    parser.add_argument("--data-dir", help="where TFDS keeps data; by default its own choice")
    parser.add_argument("--subset", type=int, default=10_000, help="training images to use")
    parser.add_argument("--epochs", type=int, default=5, help="of fine-tuning (default 5)")
    parser.add_argument("--ramp", type=float, default=0.6, help="part of the steps with a rise")
    parser.add_argument("--frequency", type=int, default=10, help="steps between mask updates")
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()

    began = time.monotonic()
    data = tfprune.data.load(
        "cifar10",
        subset=options.subset,
        normalization=options.normalization,
        augment=True,
        seed=options.seed,
        data_dir=options.data_dir,
    )
    dense = keras.models.load_model(options.model, compile=False)
    rows = [
        Row(0.0, "as it came", Masks.of_zeros(dense).sparsity, None,
            accuracy(dense.predict_on_batch, data.test), *files(dense, sparse=False), 0.0)
    ]  # fmt: skip
    print(rows[-1], file=sys.stderr, flush=True)
    for sparsity in (0.0, *SPARSITIES):
        before = at_once(dense, sparsity, data) if sparsity else None
        for schedule in SCHEDULES if sparsity else SCHEDULES[:1]:
            rows.append(sparsify(dense, data, sparsity, schedule, before, options))
            print(rows[-1], file=sys.stderr, flush=True)
    write(report(rows, data, time.monotonic() - began, options), options.output)


if __name__ == "__main__":
    main()
