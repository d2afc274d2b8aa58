"""How long criteria take on a large network: scoring all groups, and choosing half of the MACs."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

import tfprune
from benchmarks.common import circumstances, write
from tfprune import criteria
from tfprune.reports.text import table

NAMES = ("l1", "group_norm", "taylor", "nisp", "influence", "ccp")


def examples(model: Any, count: int) -> tuple[Any, Any]:
    """Random images and labels: the time does not depend on them."""
    random = np.random.default_rng(0)
    images = random.standard_normal((count, *model.input_shape[1:])).astype("float32")
    return images, random.integers(0, model.output_shape[-1], count)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.criteria_time", description=__doc__)
    parser.add_argument("--network", default="ResNet50", help="of keras.applications")
    parser.add_argument("--examples", type=int, default=64, help="calibration images (default 64)")
    parser.add_argument("--names", nargs="*", default=NAMES, help="of criteria")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()

    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, options.network)(weights=None)
    data = examples(model, options.examples)
    graph = tfprune.analyse(model)
    rows = []
    for name in options.names:
        criterion = criteria.get(name, data)
        start = time.perf_counter()
        scores = criterion(graph)
        scoring = time.perf_counter() - start
        start = time.perf_counter()
        # Its scores are made again inside, so that the choice alone is the difference.
        plan = tfprune.plan(graph, macs=0.5, criterion=criterion)
        whole = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append((scores.criterion, f"{scoring:.1f}", f"{whole:.1f}", f"{peak:.1f}"))
        print(*rows[-1], len(plan.kept), file=sys.stderr, flush=True)
    head = ("criterion", "scoring, s", "a whole plan, s", "peak memory so far, GB")
    write(
        "\n\n".join(
            [
                f"# Time of criteria on {options.network}",
                f"{len(graph.prunable)} channel groups, {sum(g.width for g in graph.prunable):,} "
                f"channels, {options.examples} calibration images of "
                f"{'x'.join(map(str, model.input_shape[1:]))}. **scoring**: all channels, the "
                "first time, compilation included. **a whole plan**: scoring again, allocation for "
                "half of the MACs, and a selector's choice.",
                table(head, rows, right=head[1:], markdown=True),
                circumstances("benchmarks.criteria_time"),
            ]
        ),
        options.output,
    )


if __name__ == "__main__":
    main()
