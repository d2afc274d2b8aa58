r"""Sensitivity analysis: how the accuracy falls when one channel group alone is pruned.

Reference: Li, Kadav, Durdanovic, Samet and Graf, "Pruning Filters for Efficient ConvNets", ICLR
2017 (arXiv:1608.08710), section 3.2: for each layer i and each ratio p on a grid, prune only layer
i by the L1 norm and evaluate on validation data without retraining, which gives a curve
:math:`a_i(p)`; on request retrain each (i, p) briefly, which gives :math:`b_i(p)`. Checked against
the paper's text.

As in the paper's own efficient variant, channels are sorted once and nested prefixes of that order
are evaluated with masks; nothing is rebuilt, but for retraining. Kept are
``max(1, floor(width (1 - p)))`` channels, or as many as a group cannot do without.

Departures: groups of channels in the place of layers (a residual stream is one group); any
criterion; on request batch normalisation is estimated anew before each measurement.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from tfprune.allocation import Chain, Constraints, kept_count
from tfprune.allocation.steps import check_patterns, matches
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph, ChannelGroup, analyse
from tfprune.graph.trace import is_model
from tfprune.losses import resolve_loss
from tfprune.protocols import fine_tune
from tfprune.search.analysis import KIND, SensitivityAnalysis, analysis_of, key_of, keys_of
from tfprune.search.measuring import Judge, Measurement, Metric, resolve_metric
from tfprune.search.ranking import ranked_chains
from tfprune.search.record import Results, weights_digest
from tfprune.search.retraining import Retraining
from tfprune.search.watching import progress_bar
from tfprune.surgery import check_finite
from tfprune.workers import Examples, PortableModel, check_executor, digest_of, gather, run_tasks

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The grid of the paper's figure."""


def sensitivity_analysis(
    model: Any,
    validation: Any,
    *,
    ratios: Sequence[float] = RATIOS,
    criterion: Any = "l1",
    data: Any = None,
    groups: Sequence[str] | None = None,
    metric: Metric | None = None,
    recalibrate: Any = None,
    recalibration_batches: int | None = 100,
    retrain: Retraining | None = None,
    train: Any = None,
    batch_size: int = 128,
    path: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    progress: bool = True,
) -> SensitivityAnalysis:
    """Measures how a model bears the pruning of each channel group alone.

    There are as many measurements as groups times ratios. The model stays as it is.

    Args:
        model: of Keras 3 or tf_keras, or its analysed graph.
        validation: **validation data, never the test set**, as what is chosen by it would look
            better there than it is: ``(x, y)`` arrays or a finite ``tf.data.Dataset`` of batches,
            which is read into memory.
        ratios: pruning ratios, the fraction of channels removed, in (0, 1).
        criterion: what ranks the channels: a name or an object, as in :func:`tfprune.plan` (of a
            selector, its scores).
        data: training data for the criteria that need some.
        groups: names or patterns of groups, or of layers that produce their channels; all that
            can be pruned if ``None``.
        metric: what to measure; the accuracy of a classifier if ``None``.
        recalibrate: training data on which the statistics of batch normalisation are estimated
            anew before each measurement, that of the dense model included, so that a drop is
            due to the pruning alone; ``None`` leaves them.
        recalibration_batches: read only so many batches of ``recalibrate``; ``None`` for all.
        retrain: measure as well after pruning for real and training briefly; ``None`` does not.
        train: training data for ``retrain``, with labels; read into memory.
        batch_size: of the batches cut from arrays for measuring and recalibrating.
        path: a JSON file that holds every measurement as soon as it is made. If it is there
            already the analysis goes on from it, and ends with the same numbers.
        executor: where to measure: see :mod:`tfprune.workers`; ``None`` for this process.
        progress: whether to show a progress bar on standard error.

    Returns:
        The curves, which choose widths (:meth:`SensitivityAnalysis.order`,
        :meth:`SensitivityAnalysis.ratios_within`), and can be printed, drawn and saved.

    Raises:
        ModelError: the model is subclassed or unbuilt, or has weights that are not finite.
        ArgumentError: a ratio out of range, an unknown group or criterion, no metric for the model,
            a file of another analysis, a model that cannot be sent to other processes.
        DataError: the data are empty, lack labels, or do not fit the model.
    """
    check_executor(executor)
    grid = _check_ratios(ratios)
    if (retrain is None) != (train is None):
        raise ArgumentError(
            "Expected retrain and train together. Received: "
            f"{'train' if retrain is None else 'retrain'} alone. Write "
            "retrain=tfprune.search.Retraining(epochs=1), train=(x, y)."
        )
    graph = model if isinstance(model, ChannelGraph) else analyse(model)
    check_finite(graph.model)
    shape = getattr(graph.model, "input_shape", None)
    examples = gather(validation, labels=True, batch_size=batch_size, input_shape=shape)
    resolved = resolve_metric(graph.model, metric, examples.y)
    calibration = trained_on = None
    if recalibrate is not None:
        read_in = gather(
            recalibrate, batches=recalibration_batches, batch_size=batch_size, input_shape=shape
        )
        calibration = Examples(read_in.x, None, read_in.batch_size)
    if retrain is not None:
        trained_on = gather(
            train, batches=retrain.batches, labels=True, batch_size=retrain.batch_size,
            input_shape=shape,
        )  # fmt: skip
        resolve_loss(graph.model, retrain.loss, trained_on.y)

    ranked, words = ranked_chains(graph, criterion, data, Constraints(round_to=1))
    chosen = _named(graph, ranked, groups)
    settings = {
        "model": graph.structure.fingerprint,
        "weights": weights_digest(graph),
        "criterion": words,
        "ranking": digest_of([chain.order for chain in chosen]),
        "metric": resolved.name,
        "larger is better": resolved.larger_is_better,
        "validation": examples.digest,
        "recalibration": None if calibration is None else calibration.digest,
        "retraining": None if retrain is None else asdict(retrain),
        "training data": None if trained_on is None else trained_on.digest,
        "ratios": grid,
        "groups": {
            chain.group.name: {
                "width": chain.group.width,
                "size": _map_size(graph, chain.group),
                "kept": [_width_at(chain, ratio) for ratio in grid],
            }
            for chain in chosen
        },
    }
    results = Results(KIND, settings, keys_of(settings), path)
    tasks = _tasks(chosen, grid, retrain is not None)
    missing = results.missing
    shared = _Shared(
        Measurement(PortableModel(graph.model), examples, resolved, calibration),
        trained_on, retrain,
    )  # fmt: skip
    total = len(tasks)
    with progress_bar(progress, "sensitivity", total, total - len(missing)) as advance:
        if missing:
            run = run_tasks(executor, _measure, shared, [tasks[key] for key in missing])
            with closing(run):
                for number, value in run:
                    results.add(missing[number], value)
                    advance()
    return analysis_of(settings, results.values)


@dataclass(frozen=True, eq=False)
class _Shared:
    measurement: Measurement
    train: Examples | None
    retraining: Retraining | None

    def open(self) -> _Opened:
        return _Opened(self.measurement.open(), self.train, self.retraining)


@dataclass(frozen=True, eq=False)
class _Opened:
    judge: Judge
    train: Examples | None
    retraining: Retraining | None


@dataclass(frozen=True)
class _Task:
    """The channels that one group keeps; no group for the dense model."""

    kept: Mapping[str, tuple[int, ...]]
    retrain: bool = False


def _measure(opened: _Opened, task: _Task) -> float:
    if not task.retrain or opened.train is None or opened.retraining is None:
        return opened.judge.masked(task.kept)
    examples, options = opened.train, asdict(opened.retraining)
    del options["batches"]

    def train(model: Any) -> None:
        fine_tune(model, examples.data, verbose=0, **options)

    return opened.judge.pruned(task.kept, train=train)


def _check_ratios(ratios: Sequence[float]) -> list[float]:
    values = [] if isinstance(ratios, str) else list(ratios)
    good = all(
        isinstance(ratio, int | float) and not isinstance(ratio, bool) and 0 < ratio < 1
        for ratio in values
    )
    if not values or not good or len(set(values)) < len(values):
        raise ArgumentError(
            "Expected ratios to be different fractions of channels to remove, above 0 and below "
            f"1. Received: {ratios!r}."
        )
    return sorted(float(ratio) for ratio in values)


def _named(
    graph: ChannelGraph, chain_list: Sequence[Chain], groups: Sequence[str] | None
) -> list[Chain]:
    """The chains of the groups that were asked for."""
    if groups is None:
        chosen = list(chain_list)
    else:
        if isinstance(groups, str):
            raise ArgumentError(
                f"Expected groups to be a list of names or patterns. Received the string "
                f"{groups!r}: write groups=[{groups!r}]."
            )
        check_patterns(graph, list(groups), "groups")
        for pattern in groups:
            named = [group for group in graph.groups if matches(group, pattern)]
            if not any(group.prunable for group in named):
                raise ArgumentError(
                    f"Expected groups that can be pruned. Received: {pattern!r}, but "
                    f"{named[0].name!r} cannot: {named[0].reason}."
                )
        chosen = [c for c in chain_list if any(matches(c.group, pattern) for pattern in groups)]
    if not chosen:
        raise ArgumentError(
            "Expected channel groups to analyse. Received: none. print(tfprune.analyse(model)) "
            "says what can be pruned."
        )
    return chosen


def _width_at(chain: Chain, ratio: float) -> int:
    return chain.widths[chain.at_most(kept_count(chain.group.width, ratio))]


def _tasks(chain_list: Sequence[Chain], grid: Sequence[float], retrain: bool) -> dict[str, _Task]:
    """Key -> task, in the order of the keys."""
    tasks = {"dense": _Task({})}
    for after in (False, True) if retrain else (False,):
        for chain in chain_list:
            for width in (_width_at(chain, ratio) for ratio in grid):
                kept = tuple(int(i) for i in chain.kept(width))
                name = chain.group.name
                tasks[key_of(name, width, after)] = _Task({name: kept}, after)
    return tasks


def _map_size(graph: ChannelGraph, group: ChannelGroup) -> list[int | None]:
    """The sizes of the axes beside the channels in what the first producer puts out.

    Where the producer is part of a layer (the query of an attention), in what that layer does.
    """
    found: dict[str, list[int | None]] = {}
    for traced in graph.record.traces.values():
        for call in traced.calls:
            path = graph.record.paths.get(id(call.op))
            if path is None or is_model(call.op) or not f"{group.path}/".startswith(f"{path}/"):
                continue
            ref = call.outputs[0]
            labels = graph.record.tensors.get(ref.key, (None,) * len(ref.shape))
            found.setdefault(
                path,
                [
                    size
                    for axis, (size, label) in enumerate(zip(ref.shape, labels, strict=True))
                    if axis and label is None
                ],
            )
    return found[max(found, key=len)] if found else []
