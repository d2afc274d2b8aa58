"""Time of ThiNet's and LASSO's selection for one wide layer, by Gram matrices and naively."""

from __future__ import annotations

import argparse
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import circumstances, write
from tfprune.criteria.lasso import path_of
from tfprune.criteria.reconstruction.problem import Problem, block_sums
from tfprune.criteria.reconstruction.solve import solve
from tfprune.criteria.thinet import removal_order, scales_of
from tfprune.reports.text import table

_RIDGE = 1e-6


@dataclass(frozen=True)
class Case:
    """A layer and how much of it is looked at; half of its input channels stay.

    Attributes:
        channels, taps, filters: the layer's.
        rows: sampled positions.
        naive_rows: of them, how many the naive form sees; each has a response per filter.
    """

    channels: int
    taps: int
    filters: int
    rows: int
    naive_rows: int

    def __str__(self) -> str:
        return f"{self.channels} channels, {self.taps} taps, {self.filters} filters"


@dataclass(frozen=True)
class Line:
    """One measurement: seconds, and the process's peak memory (MB) when it was over."""

    case: Case
    what: str
    seconds: float
    note: str
    peak: float


def peak_megabytes() -> float:
    """The process's largest resident memory so far."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result and wall seconds."""
    began = time.perf_counter()
    result = function()
    return result, time.perf_counter() - began


class Layer:
    """Weights, and patches of rectified correlated channels, batch after batch."""

    def __init__(self, case: Case, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.case, self.seed = case, seed
        size = case.channels * case.taps
        self.weights = random.standard_normal((size, case.filters)) / np.sqrt(size)
        self.mixture = random.standard_normal((case.channels, case.channels)) / np.sqrt(
            case.channels
        )

    def rows(self, count: int, batch: int = 2048) -> Any:
        """Batches of rows, shape (rows, channels * taps), float64."""
        case = self.case
        for number, start in enumerate(range(0, count, batch)):
            random = np.random.default_rng([self.seed, number])
            some = min(batch, count - start)
            maps = random.standard_normal((some * case.taps, case.channels)) @ self.mixture
            maps = np.maximum(maps, 0).reshape(some, case.taps, case.channels)
            yield np.moveaxis(maps, 1, 2).reshape(some, -1)

    def responses(self, count: int) -> Any:
        """Contributions of every channel: shape (count * filters, channels)."""
        case = self.case
        weights = self.weights.reshape(case.channels, case.taps, case.filters)
        x = np.concatenate(list(self.rows(count))).reshape(count, case.channels, case.taps)
        return np.einsum("rct,ctf->rfc", x, weights, optimize=True).reshape(-1, case.channels)


def gram_form(layer: Layer) -> list[Line]:
    """Both selections from all rows, and the least squares behind each."""
    case, lines = layer.case, []
    size, half = case.channels * case.taps, case.channels // 2
    gram, cross = np.zeros((size, size)), np.zeros((size, case.filters))
    spent = 0.0
    for x in layer.rows(case.rows):
        began = time.perf_counter()
        gram += x.T @ x
        cross += x.T @ (x @ layer.weights)
        spent += time.perf_counter() - began

    def add(what: str, seconds: float) -> None:
        lines.append(Line(case, what, seconds, f"{case.rows:,} rows", peak_megabytes()))

    add("both: moments A and D", spent)
    owners = np.arange(case.channels)
    g, seconds = timed(
        lambda: block_sums(gram, layer.weights, owners, case.channels, case.taps)[:-1, :-1]
    )
    add("both: G from A and W", seconds)
    gone, seconds = timed(lambda: removal_order(g, half))
    add(f"ThiNet: {half} greedy removals", seconds)
    kept = np.setdiff1d(owners, gone)
    _, seconds = timed(lambda: scales_of(g, kept, _RIDGE))
    add("ThiNet: scales w", seconds)
    spread = layer.weights.reshape(case.channels, -1)
    b = (cross * layer.weights).reshape(case.channels, -1).sum(1)
    problem = Problem(g, b, float(g.sum()), np.linalg.norm(spread, axis=1))
    path, seconds = timed(lambda: path_of(problem, _RIDGE))
    add(f"LASSO: whole path, {len(path.lambdas):,} knots", seconds)
    kept = path.choose(half, np.zeros(0, np.int64))
    columns = (kept[:, None] * case.taps + np.arange(case.taps)).ravel()
    _, seconds = timed(lambda: solve(gram[np.ix_(columns, columns)], cross[columns], _RIDGE))
    add(f"LASSO: W-step, {len(columns):,} unknowns", seconds)
    return lines


def naive_form(layer: Layer) -> list[Line]:
    """The papers' loops on explicit responses: ThiNet's removals and a bisected LASSO."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso

    case, lines = layer.case, []
    half = case.channels // 2
    z, seconds = timed(lambda: np.asfortranarray(layer.responses(case.naive_rows)))
    note = f"{case.naive_rows:,} rows ({len(z):,} responses)"

    def add(what: str, seconds: float) -> None:
        lines.append(Line(case, what, seconds, note, peak_megabytes()))

    add("naive, both: contributions Z", seconds)

    def remove() -> list[int]:
        total, left, gone = np.zeros(len(z)), list(range(case.channels)), []
        while len(gone) < half:
            costs = [float(((total + z[:, j]) ** 2).sum()) for j in left]
            gone.append(left.pop(int(np.argmin(costs))))
            total += z[:, gone[-1]]
        return gone

    gone, seconds = timed(remove)
    add(f"naive, ThiNet: {half} greedy removals", seconds)
    same = removal_order(z.T @ z, half).tolist()
    assert gone == same, "the Gram form removes other channels"
    y = z.sum(1)

    def bisect() -> tuple[int, int]:
        """The authors' search: doubling, then bisection, to within 10% of the target."""
        model = Lasso(alpha=1e-3, warm_start=True, selection="random", random_state=0)
        low, high, solved = 0.0, None, 0
        for _ in range(60):
            model.fit(z, y)
            solved += 1
            count = int((model.coef_ != 0).sum())
            if half <= count <= 1.1 * half:
                break
            if count < half:
                high = model.alpha
            else:
                low = model.alpha
            model.alpha = 2 * low if high is None else (low + high) / 2
        return solved, count

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        (solved, count), seconds = timed(bisect)
    add(f"naive, LASSO: {solved} fits on the way to {count} channels", seconds)
    return lines


def report(lines: list[Line], seed: int) -> str:
    """The page as Markdown."""
    head = ("layer", "what", "seconds", "measured on", "peak MB")
    rows = [
        (str(line.case), line.what, f"{line.seconds:.3g}", line.note, f"{line.peak:,.0f}")
        for line in lines
    ]
    return "\n\n".join(
        [
            "# Time of channel selection for one layer",
            "Half of the input channels stay. Rows are patches of rectified, correlated random "
            "channels in float64; making them is not counted. The Gram form sees the response of "
            "every filter at every row and works in the sizes of the layer alone; the naive form "
            "holds all responses, and is measured on fewer rows and on a smaller layer, without "
            "extrapolation: its removals take time in proportion to the responses times the square "
            "of the channels. Where both see the same responses they remove the same channels "
            "(asserted). *Peak* is the most memory that the process had taken when a line was "
            "over; it never falls from line to line. All responses of the wide layer at all rows "
            f"would take {_responses(lines):,.0f} GB.",
            table(head, rows, right=("seconds", "peak MB"), markdown=True),
            f"Seed {seed}. " + circumstances("benchmarks.solvers"),
        ]
    )


def _responses(lines: list[Line]) -> float:
    """Gigabytes of the explicit contributions of the largest case."""
    return max(8 * line.case.rows * line.case.filters * line.case.channels / 1e9 for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solvers", description=__doc__)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--filters", type=int, default=512)
    parser.add_argument("--window", type=int, default=3, help="width and height of the kernel")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    taps = options.window**2
    small = Case(options.channels // 8, taps, options.filters // 8, options.rows // 10, 500)
    large = Case(options.channels, taps, options.filters, options.rows, 0)
    for form in (gram_form, naive_form):
        form(Layer(Case(8, 1, 8, 100, 100), options.seed))  # imports and warms up
    lines = []
    for case in (small, large):
        layer = Layer(case, options.seed)
        lines += gram_form(layer)
        print(f"{case}: Gram form done", file=sys.stderr, flush=True)
        if case.naive_rows:
            lines += naive_form(layer)
    # The naive form on the wide layer: about the 100,000 responses that the ThiNet paper samples.
    some = -(-100_000 // options.filters)
    wide = Layer(Case(large.channels, taps, large.filters, large.rows, some), options.seed)
    lines += naive_form(wide)
    write(report(lines, options.seed), options.output)


if __name__ == "__main__":
    main()
