"""A trained CIFAR-10 network, pruned: accuracy before and after fine-tuning, size and latency."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

import tfprune
from benchmarks.common import circumstances, write
from tfprune.cost import measure
from tfprune.litert import Predictor, benchmark_many
from tfprune.reports.text import mega, percent, size, table

BUDGETS = (0.7, 0.5, 0.3)
# A global order of random scores is no method: it is left out.
WAYS = (("l1", "uniform"), ("l1", "global"), ("random", "uniform"))


@dataclass(frozen=True)
class Row:
    """One pruning; accuracies are fractions of the test set."""

    budget: float
    criterion: str
    order: str
    macs: int
    parameters: int
    pruned: float
    recalibrated: float
    tuned: float


@dataclass(frozen=True)
class File:
    """One exported file."""

    name: str
    dtype: str
    size_bytes: int
    latency_ms: float
    accuracy: float


def accuracy(predict: Any, data: Any) -> float:
    """Top-1 accuracy."""
    hits = [predict(x).argmax(-1) == np.asarray(y) for x, y in data.as_numpy_iterator()]
    return float(np.concatenate(hits).mean())


def prune_and_tune(
    dense: Any, data: Any, budget: float, criterion: str, order: str, options: argparse.Namespace
) -> tuple[Row, Any]:
    """Prunes, estimates the statistics anew, fine-tunes, and looks at the test set after each."""
    if criterion == "random":
        criterion = tfprune.criteria.Random(seed=options.seed)
    small = tfprune.prune(
        dense, macs=budget, criterion=criterion, order=order, round_to=options.round_to
    )
    cost = measure(small)
    found = [accuracy(small.predict_on_batch, data.test)]
    tfprune.recalibrate_batch_norm(small, data.train)
    found.append(accuracy(small.predict_on_batch, data.test))
    tfprune.fine_tune(
        small,
        data.train_epoch,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        schedule="cosine",
        weight_decay=1e-4,
        seed=options.seed,
        verbose=0,
    )
    found.append(accuracy(small.predict_on_batch, data.test))
    name = criterion if isinstance(criterion, str) else "random"
    return Row(budget, name, order, cost.macs, cost.parameters, *found), small


def exported(models: dict[str, Any], data: Any, runs: int) -> list[File]:
    """Files of every model in float32 and int8, their latency and accuracy on the test set."""
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            for dtype, quantize in (("float32", None), ("int8", "int8")):
                report = tfprune.export(
                    model,
                    Path(folder) / "model.tflite",
                    quantize=quantize,
                    calibration=data.train,
                    check=quantize is None,
                )
                files[name, dtype] = report.path.read_bytes()
    timed = benchmark_many({" ".join(k): content for k, content in files.items()}, runs=runs,
                           gpu=False)  # fmt: skip
    return [
        File(name, dtype, len(content), timed[f"{name} {dtype}"].latency_ms,
             accuracy(Predictor(content, threads=1), data.test))
        for (name, dtype), content in files.items()
    ]  # fmt: skip


def report(
    dense: Any, dense_accuracy: float, rows: list[Row], files: list[File], data: Any,
    options: argparse.Namespace,
) -> str:  # fmt: skip
    """The page as Markdown."""
    base = measure(dense)
    head = ("MACs asked", "criterion", "order", "MACs", "of dense", "parameters",
            "accuracy pruned", "recalibrated", "fine-tuned")  # fmt: skip
    counts = data.info.counts
    cells = [("100 %", "–", "–", mega(base.macs), "100.0 %", f"{base.parameters:,}",
              percent(dense_accuracy, 2), "–", "–")]  # fmt: skip
    for row in rows:
        accuracies = [percent(v, 2) for v in (row.pruned, row.recalibrated, row.tuned)]
        asked, share = percent(row.budget, 0), percent(row.macs / base.macs)
        costs = (mega(row.macs), share, f"{row.parameters:,}")
        cells.append((asked, row.criterion, row.order, *costs, *accuracies))
    file_head = ("network", "type", "file", "CPU ms", "speed-up", "accuracy")
    first = {file.dtype: file.latency_ms for file in reversed(files)}
    return "\n\n".join(
        [
            f"# {options.network_name} on {options.data_name}",
            f"Accuracy on the {counts['test']:,} test images, which nothing else uses. Of a fixed "
            f"subset of {sum(counts.values()) - counts['test']:,} training images "
            f"{counts['train']:,} serve statistics, calibration and fine-tuning: "
            f"{options.epochs} epoch(s), SGD with momentum 0.9, learning rate "
            f"{options.learning_rate} (a cosine from epoch to epoch), batches of "
            f"{data.info.batch_size}, L2 1e-4, shifted and flipped images; the last weights "
            "count, nothing is chosen. "
            f"Widths are multiples of {options.round_to}. Seed {options.seed}, one run each: "
            "small differences mean nothing.",
            table(head, cells, right=(head[0], *head[3:]), markdown=True),
            "**pruned**: as cut. **recalibrated**: with batch statistics estimated anew on the "
            "training images. **fine-tuned**: after that, trained.",
            "The files, fine-tuned where pruned (l1, uniform), in LiteRT with one thread:",
            table(
                file_head,
                [
                    (f.name, f.dtype, size(f.size_bytes), f"{f.latency_ms:.3f}",
                     f"{first[f.dtype] / f.latency_ms:.2f} ×", percent(f.accuracy, 2))
                    for f in files
                ],
                right=file_head[2:],
                markdown=True,
            ),
            circumstances("benchmarks.cifar", command_line(options)),
        ]
    )  # fmt: skip


def command_line(options: argparse.Namespace) -> list[str]:
    """The arguments without the places of this machine."""
    return [
        f"--model {options.model.name}",
        f'--network-name "{options.network_name}"',
        f'--data-name "{options.data_name}"',
        f"--subset {options.subset} --epochs {options.epochs}",
        f"--learning-rate {options.learning_rate} --round-to {options.round_to}",
        f"--seed {options.seed} --runs {options.runs}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cifar", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a .keras file that gives logits")
    parser.add_argument("--network-name", default="The network", help="for the title")
    parser.add_argument("--data-name", default="CIFAR-10", help="for the title")
    parser.add_argument("--normalization", default="imagenet", help="see tfprune.data.load")
    parser.add_argument("--data-dir", help="where TFDS keeps data; by default its own choice")
    parser.add_argument("--subset", type=int, default=10_000, help="training images to use")
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning (default 2)")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--round-to", type=int, default=4, help="multiple of widths (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=50, help="timed runs (default 50)")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()

    data = tfprune.data.load(
        "cifar10",
        subset=options.subset,
        normalization=options.normalization,
        augment=True,
        seed=options.seed,
        data_dir=options.data_dir,
    )
    dense = keras.models.load_model(options.model, compile=False)
    dense_accuracy = accuracy(dense.predict_on_batch, data.test)
    print(f"dense {dense_accuracy:.4f}", file=sys.stderr, flush=True)
    rows, models = [], {"dense": dense}
    for budget in BUDGETS:
        for criterion, order in WAYS:
            row, small = prune_and_tune(dense, data, budget, criterion, order, options)
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
            if (criterion, order) == WAYS[0]:
                models[f"{percent(row.macs / measure(dense).macs, 0)} of the MACs"] = small
    files = exported(models, data, options.runs)
    write(report(dense, dense_accuracy, rows, files, data, options), options.output)


if __name__ == "__main__":
    main()
