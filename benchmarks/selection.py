"""All criteria and selectors on one trained network: accuracy, and rank correlation with the truth.

Three questions, for every way to choose channels, at the same widths (every group loses the same
fraction):

- What is left right after pruning at 30, 50 and 70 % of the MACs removed, as cut and with the
  statistics of batch normalisation estimated anew?
- What does one pass of fine-tuning over a fixed subset make of it, at 50 %?
- How well do its scores rank the channels by what really happens to the loss when one of them goes?
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from scipy.stats import spearmanr

import tfprune
from benchmarks.common import circumstances, write
from tfprune import criteria
from tfprune.cost import measure
from tfprune.graph.masking import MaskedModel
from tfprune.reports.text import percent, table

REMOVED = (0.3, 0.5, 0.7)
TUNED = 0.5
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Way:
    """One way to choose.

    Attributes:
        name: for the table.
        make: from calibration data ``(x, y)`` and a seed to a criterion.
        seeded: whether data or chance play a part; if not, one seed is all.
        reconstructs: whether new values for weights come with the choice.
        gradients: whether it looks at gradients, which need more examples (influence.md).
    """

    name: str
    make: Callable[[Any, int], Any]
    seeded: bool = True
    reconstructs: bool = False
    gradients: bool = False


WAYS = (
    Way("random", lambda data, seed: criteria.Random(seed=seed)),
    Way("L1", lambda data, seed: criteria.L1(), seeded=False),
    Way("greedy L1", lambda data, seed: criteria.GreedyL1(), seeded=False),
    Way("L2", lambda data, seed: criteria.L2(), seeded=False),
    Way("FPGM", lambda data, seed: criteria.FPGM(), seeded=False),
    Way("BN scale", lambda data, seed: criteria.BatchNormScale(), seeded=False),
    Way("group norm", lambda data, seed: criteria.GroupNorm(), seeded=False),
    Way("activation mean", lambda data, seed: criteria.ActivationMean(data)),
    Way("APoZ", lambda data, seed: criteria.APoZ(data)),
    Way("HRank", lambda data, seed: criteria.HRank(data)),
    Way("CHIP", lambda data, seed: criteria.CHIP(data)),
    Way("NISP", lambda data, seed: criteria.NISP(data)),
    Way("Taylor", lambda data, seed: criteria.Taylor(data), gradients=True),
    Way("influence", lambda data, seed: criteria.Influence(data), gradients=True),
    Way("CCP", lambda data, seed: criteria.CCP(data), gradients=True),
    Way("AOFP damage", lambda data, seed: criteria.AOFP(data, seed=seed)),
    Way("ThiNet", lambda data, seed: criteria.ThiNet(data, seed=seed), reconstructs=True),
    Way(
        "ThiNet, matching",
        lambda data, seed: criteria.ThiNet(data, seed=seed, search="matching"),
        reconstructs=True,
    ),
    Way("LASSO", lambda data, seed: criteria.Lasso(data, seed=seed), reconstructs=True),
    Way(
        "L1, reconstructed",
        lambda data, seed: criteria.Reconstructed(criteria.L1(), data, seed=seed),
        reconstructs=True,
    ),
    Way(
        "CCP, reconstructed",
        lambda data, seed: criteria.Reconstructed(criteria.CCP(data), data, seed=seed),
        reconstructs=True,
        gradients=True,
    ),
)


@dataclass(frozen=True, eq=False)
class Shown:
    """What the pruned networks are shown.

    Attributes:
        test: images and labels that only figures are made of.
        splits: data for the fine-tuning, or ``None`` for none.
        learning_rate: of it.
    """

    test: tuple[Any, Any]
    splits: Any
    learning_rate: float


class Cache:
    """Finished measurements, so that an interrupted run goes on."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        known = path is not None and path.exists()
        self._values: dict[str, Any] = json.loads(path.read_text()) if known and path else {}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """What is known under the key, or else made and kept."""
        if key not in self._values:
            start = time.perf_counter()
            self._values[key] = make()
            print(f"{key}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
            if self._path is not None:
                staged = self._path.with_suffix(".part")
                staged.write_text(json.dumps(self._values))
                os.replace(staged, self._path)
        return self._values[key]


def arrays(dataset: Any) -> tuple[Any, Any]:
    """All examples of a dataset."""
    parts = list(dataset.as_numpy_iterator())
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def calibration(pool: tuple[Any, Any], count: int, seed: int) -> tuple[Any, Any]:
    """``count`` examples of the pool; others for every seed."""
    chosen = np.random.default_rng(seed).choice(len(pool[0]), count, replace=False)
    return pool[0][chosen], pool[1][chosen]


class Once:
    """A criterion that scores a graph once, for several budgets."""

    def __init__(self, criterion: Any) -> None:
        self._criterion = criterion
        self._scores: Any = None
        if isinstance(criterion, criteria.Selector):
            self.select = criterion.select

    def __call__(self, graph: Any) -> Any:
        if self._scores is None:
            self._scores = self._criterion(graph)
        return self._scores


def accuracy_on(model: Any, examples: tuple[Any, Any]) -> float:
    """Top-1 accuracy on arrays."""
    x, y = examples
    hits = [
        np.asarray(model.predict_on_batch(x[start : start + 500])).argmax(-1)
        == y[start : start + 500]
        for start in range(0, len(x), 500)
    ]
    return float(np.concatenate(hits).mean())


def measured(graph: Any, way: Way, data: Any, seed: int, shown: Shown) -> dict[str, Any]:
    """One way with one seed: accuracies by the fraction of MACs removed."""
    criterion = Once(way.make(data, seed))
    result: dict[str, Any] = {"cut": [], "recalibrated": [], "share": [], "seconds": []}
    dense = measure(graph)
    for removed in REMOVED:
        start = time.perf_counter()
        plan = tfprune.plan(graph, macs=1 - removed, criterion=criterion, round_to=1)
        small = plan.apply(graph.model)
        result["seconds"].append(time.perf_counter() - start)
        result["share"].append(measure(small).macs / dense.macs)
        result["cut"].append(accuracy_on(small, shown.test))
        if removed == TUNED and seed == SEEDS[0] and shown.splits is not None:
            other = plan.apply(graph.model)
            tfprune.fine_tune(
                other, shown.splits.train_epoch, epochs=1, learning_rate=shown.learning_rate,
                weight_decay=1e-4, seed=seed, verbose=0,
            )  # fmt: skip
            result["tuned"] = accuracy_on(other, shown.test)
        tfprune.recalibrate_batch_norm(small, data[0])
        result["recalibrated"].append(accuracy_on(small, shown.test))
    return result


def ablation(dense: Any, data: tuple[Any, Any]) -> dict[str, list[float]]:
    """By how much the mean cross-entropy on ``data`` rises when a single channel goes."""
    graph = tfprune.analyse(dense)
    masked = MaskedModel(graph)
    x, y = data

    def loss() -> float:
        total = 0.0
        for start in range(0, len(x), 500):
            logits = masked.outputs([x[start : start + 500]])[0].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            total -= logs[np.arange(len(logits)), y[start : start + 500]].sum()
        return total / len(x)

    masked.mask({})
    base = loss()
    result: dict[str, list[float]] = {}
    for group in graph.prunable:
        rises = []
        for channel in range(group.width):
            masked.mask({group.name: np.delete(np.arange(group.width), channel)})
            rises.append(loss() - base)
        result[group.name] = rises
        print(f"ablation of {group.name}", file=sys.stderr, flush=True)
    return result


def correlations(dense: Any, way: Way, data: Any, truth: dict[str, list[float]]) -> list[float]:
    """Spearman's rank correlation over all channels, and the mean of those within the groups."""
    scores = way.make(data, 0)(tfprune.analyse(dense))
    names = list(truth)
    everywhere = spearmanr(
        np.concatenate([scores[name] for name in names]),
        np.concatenate([truth[name] for name in names]),
    ).statistic
    within = [spearmanr(scores[name], truth[name]).statistic for name in names]
    # Where all scores of a group are equal there is no ranking, and so no correlation.
    return [float(everywhere), float(np.mean([0.0 if np.isnan(r) else r for r in within]))]


def mean_and_spread(values: Sequence[float]) -> str:
    """``81.2 ± 0.4`` in percent: mean and the largest distance from it."""
    middle = float(np.mean(values))
    text = percent(middle, 1)
    if len(values) == 1:
        return text
    return f"{text} ± {100 * max(abs(v - middle) for v in values):.1f}"


def figure(rows: Sequence[dict[str, Any]], dense: float, path: Path) -> None:
    """Accuracy as cut and recalibrated against the MACs removed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True)
    colours = pyplot.get_cmap("tab20")
    for number, row in enumerate(rows):
        for column, (panel, key) in enumerate(zip(axes, ("cut", "recalibrated"), strict=True)):
            values = [dense, *np.mean([run[key] for run in row["runs"]], axis=0)]
            panel.plot(
                [0, *(100 * removed for removed in REMOVED)], [100 * v for v in values],
                color=colours(number % 20), linestyle="--" if row["reconstructs"] else "-",
                marker="o", markersize=3, label=row["name"] if column else None,
            )  # fmt: skip
    for panel, title in zip(axes, ("as cut", "with batch normalisation recalibrated"), strict=True):
        panel.set(title=title, xlabel="MACs removed, %")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    drawn.legend(loc="center right", fontsize=8)
    drawn.subplots_adjust(left=0.06, right=0.82, wspace=0.05)
    drawn.savefig(path, dpi=90)
    pyplot.close(drawn)


def report(
    rows: Sequence[dict[str, Any]], facts: dict[str, Any], options: argparse.Namespace
) -> str:
    """The page as Markdown."""
    middle = REMOVED.index(TUNED)
    by = sorted(rows, key=lambda row: -float(np.mean([run["cut"][middle] for run in row["runs"]])))
    head = ["method", *(f"cut, -{percent(r, 0)}" for r in REMOVED),
            *(f"recal., -{percent(r, 0)}" for r in REMOVED), "tuned, -50 %",
            "rank (all)", "rank (in group)", "s"]  # fmt: skip
    cells = [
        [
            row["name"] + (" *" if row["reconstructs"] else ""),
            *(
                mean_and_spread([run[key][number] for run in row["runs"]])
                for key in ("cut", "recalibrated")
                for number in range(len(REMOVED))
            ),
            percent(row["runs"][0]["tuned"], 1) if "tuned" in row["runs"][0] else "–",
            f"{row['rank'][0]:.2f}",
            f"{row['rank'][1]:.2f}",
            f"{np.mean([run['seconds'] for run in row['runs']]):.1f}",
        ]
        for row in by
    ]
    return "\n\n".join(
        [
            f"# Which channels go: {options.network_name} on {options.data_name}",
            f"The dense network has {percent(facts['dense'], 2)} on the first {facts['test']:,} "
            "test images, which are used for these figures only (their standard error is about a "
            "point). Every group loses the same fraction "
            f"of its channels (order uniform, round_to 1), so that all methods end in networks of "
            f"the same shape: {', '.join(facts['shares'])} of the MACs. Calibration: "
            f"{options.calibration} training images, {options.gradient_calibration:,} for methods "
            f"that look at gradients (Taylor, influence, CCP), other ones for each of {len(SEEDS)} "
            "seeds; methods without data or chance are computed once. **cut**: "
            "as pruned. **recal.**: the statistics of batch normalisation estimated anew on the "
            f"calibration images. **tuned**: at 50 %, one pass over {facts['train']:,} fixed "
            f"training images from there, with the first seed (SGD, momentum 0.9, learning rate "
            f"{options.learning_rate}, L2 1e-4, shifted and flipped), statistics not "
            "recalibrated before. Mean over seeds ± largest distance from it. "
            "**rank**: Spearman's correlation of the scores (seed 0) with the true rise of "
            f"the loss on {facts['validation']:,} held-out images when that channel alone goes, "
            f"over all {facts['channels']} channels of {facts['groups']} groups together, and as "
            "the mean of the correlations within the groups. **s**: seconds to choose and cut, "
            "mean. Methods marked * also solve for new weights.",
            table(head, cells, right=head[1:], markdown=True),
            *([f"Not in this run: {', '.join(facts['missing'])}."] if facts["missing"] else []),
            f"![accuracy against MACs removed]({options.figure.name})" if options.figure else "",
            circumstances("benchmarks.selection", [
                f"--model {options.model.name}", f'--network-name "{options.network_name}"',
                f'--data-name "{options.data_name}"', f"--calibration {options.calibration}",
                f"--gradient-calibration {options.gradient_calibration}",
                f"--test {options.test} --learning-rate {options.learning_rate}",
            ]) + (f" Whole run: {facts['minutes']:.0f} minutes." if facts["minutes"] else ""),
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a .keras file that gives logits")
    parser.add_argument("--network-name", default="The network", help="for the title")
    parser.add_argument("--data-name", default="CIFAR-10", help="for the title")
    parser.add_argument("--normalization", default="imagenet", help="see tfprune.data.load")
    parser.add_argument("--data-dir", help="where TFDS keeps data; by default its own choice")
    parser.add_argument("--calibration", type=int, default=256, help="images (default 256)")
    parser.add_argument(
        "--gradient-calibration", type=int, default=1000,
        help="images for methods that look at gradients (default 1000)",
    )  # fmt: skip
    parser.add_argument("--test", type=int, default=2000, help="test images (default 2000)")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of the fine-tuning")
    parser.add_argument("--only", nargs="*", help="names of methods; by default all")
    parser.add_argument("--no-tuning", action="store_true", help="leave the fine-tuning out")
    parser.add_argument("--cache", type=Path, help="JSON file of finished measurements, to go on")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--figure", type=Path, help="PNG file to write, beside --output")
    options = parser.parse_args()

    began = time.perf_counter()
    # 10,000 images to train on, 1,000 held out.
    shared = {
        "subset": 11_000,
        "validation": 1 / 11,
        "normalization": options.normalization,
        "data_dir": options.data_dir,
        "seed": 0,
    }
    splits = tfprune.data.load("cifar10", augment=True, **shared)
    pool = arrays(tfprune.data.load("cifar10", augment=False, **shared).train)
    held_out = arrays(splits.validation)
    dense = keras.models.load_model(options.model, compile=False)
    cache = Cache(options.cache)
    fresh = options.cache is None or not options.cache.exists()
    test = tuple(part[: options.test] for part in arrays(splits.test))
    shown = Shown(test, None if options.no_tuning else splits, options.learning_rate)
    base = cache.get("dense", lambda: accuracy_on(dense, test))
    truth = cache.get("ablation", lambda: ablation(dense, held_out))
    graph = tfprune.analyse(dense)

    rows = []
    for way in WAYS:
        if options.only and way.name not in options.only:
            continue
        count = options.gradient_calibration if way.gradients else options.calibration
        runs = [
            cache.get(
                f"{way.name}, seed {seed}",
                lambda w=way, s=seed, n=count: measured(
                    graph, w, calibration(pool, n, s), s, shown
                ),
            )
            for seed in (SEEDS if way.seeded else SEEDS[:1])
        ]
        rank = cache.get(
            f"{way.name}, rank",
            lambda w=way, n=count: correlations(dense, w, calibration(pool, n, 0), truth),
        )
        rows.append(
            {"name": way.name, "reconstructs": way.reconstructs, "rank": rank, "runs": runs}
        )
    facts = {
        "dense": base,
        "test": len(test[0]),
        "missing": [way.name for way in WAYS if way.name not in {row["name"] for row in rows}],
        "train": splits.info.counts["train"],
        "validation": len(held_out[0]),
        "channels": sum(map(len, truth.values())),
        "groups": len(truth),
        "shares": [percent(share) for share in rows[0]["runs"][0]["share"]],
        "minutes": (time.perf_counter() - began) / 60 if fresh else 0.0,
    }
    if options.figure:
        figure(rows, base, options.figure)
    write(report(rows, facts, options), options.output)


if __name__ == "__main__":
    main()
