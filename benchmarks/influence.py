"""What the influence score's agreement with the true ablation depends on.

Needs the file of finished measurements of ``benchmarks.selection`` (its ``--cache``), for the true
rise of the loss when a single channel goes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
from scipy.stats import spearmanr

import tfprune
from benchmarks.common import circumstances, write
from benchmarks.selection import arrays, calibration
from tfprune import criteria
from tfprune.graph import ChannelGraph
from tfprune.reports.text import table


def ranks(graph: ChannelGraph, scores: Any, truth: Any) -> list[str]:
    """Spearman over all channels; over those of blocks and of streams; means within the groups."""
    makers = {g.name: {m.path for m in g.producers if m.scored} for g in graph.prunable}
    parts = {
        "all": list(truth),
        "blocks": [name for name in truth if len(makers[name]) == 1],
        "streams": [name for name in truth if len(makers[name]) > 1],
    }
    found = []
    for names in parts.values():
        given = np.concatenate([scores[name] for name in names])
        real = np.concatenate([truth[name] for name in names])
        found.append(f"{spearmanr(given, real).statistic:.2f}")
    for kind in ("blocks", "streams"):
        within = [spearmanr(scores[name], truth[name]).statistic for name in parts[kind]]
        found.append(f"{np.mean(within):.2f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.influence", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a .keras file that gives logits")
    parser.add_argument("--cache", type=Path, required=True, help="of benchmarks.selection")
    parser.add_argument("--normalization", default="imagenet", help="see tfprune.data.load")
    parser.add_argument("--data-dir", help="where TFDS keeps data; by default its own choice")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()

    truth = json.loads(options.cache.read_text())["ablation"]
    dense = keras.models.load_model(options.model, compile=False)
    graph = tfprune.analyse(dense)
    splits = tfprune.data.load(
        "cifar10", subset=11_000, validation=1 / 11, normalization=options.normalization,
        data_dir=options.data_dir, seed=0,
    )  # fmt: skip
    pool, unseen = arrays(splits.train), arrays(splits.test)
    sources = {
        "256 training images": calibration(pool, 256, 0),
        "1,000 training images": calibration(pool, 1000, 0),
        "256 images it has not seen": calibration(unseen, 256, 0),
        "1,000 images it has not seen": calibration(unseen, 1000, 0),
    }
    rows = []
    for words, data in sources.items():
        ways = {
            "influence, -g + F/2": criteria.Influence(data, batches=None),
            "first order alone, (g)² (Taylor)": criteria.Taylor(data, batches=None),
        }
        for name, criterion in ways.items():
            rows.append((words, name, *ranks(graph, criterion(graph), truth)))
    biggest = {name: max(values) for name, values in truth.items()}
    head = ("data", "score", "all", "blocks", "streams", "in a block", "in a stream")
    write(
        "\n\n".join(
            [
                "# Influence scores against the true ablation",
                "Spearman's rank correlation with the rise of the loss when one channel goes: over "
                "all channels, those inside residual blocks and those of the residual streams, "
                "and as means within the groups of either kind. The network was trained on all "
                "training images; those that it has not seen are test images, which choose nothing "
                "here.",
                table(head, rows, right=head[2:], markdown=True),
                "Largest rise in a group: "
                + ", ".join(f"{name} {value:.2f}" for name, value in biggest.items())
                + ".",
                circumstances("benchmarks.influence", [
                    f"--model {options.model.name}", f"--cache {options.cache.name}",
                ]),
            ]
        ),
        options.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()
