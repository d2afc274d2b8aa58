"""What the commands do: read files, call one public function, print one report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

import tfprune
from tfprune.cli.main import CHECK_FAILED, OK
from tfprune.cli.parser import request_of
from tfprune.cost import CostModel, measure
from tfprune.errors import ArgumentError, DataError
from tfprune.graph.plan import PruningPlan
from tfprune.loading import SUFFIXES, load_model
from tfprune.reports.text import count, percent
from tfprune.saving import check_target, save_model
from tfprune.writing import writable_target


def inspect(options: Namespace) -> int:
    """Prints the channel groups of a model."""
    graph = tfprune.analyse(load_model(options.model_file), input_shape=options.input_shape)
    cost = measure(graph)
    if options.json:
        costs = CostModel(graph)
        shares = costs.share_of_macs()
        groups = [
            {
                "name": group.name,
                "width": group.width,
                "layers": group.layers,
                "share_of_macs": shares.get(group.name),
                "prunable": group.prunable,
                "reason": group.reason,
                "exact": group.exact,
            }
            for group in graph.groups
        ]
        totals = {k: v for k, v in dataclasses.asdict(cost).items() if k != "layers"}
        frozen = costs.frozen_share_of_macs()
        _print_json({"model": graph.model.name, "cost": totals, "frozen_share_of_macs": frozen,
                     "groups": groups})  # fmt: skip
        return OK
    print(graph)
    if options.layers:
        print(f"\n{cost}")
    return OK


def prune(options: Namespace) -> int:
    """Writes a smaller model, after proving the surgery on it."""
    _check_outputs(options)
    model = load_model(options.model_file)
    if options.plan is not None:
        plan = PruningPlan.load(options.plan)
    else:
        data = _dataset(options.data, options).train if options.data else None
        plan = tfprune.plan(
            model, data=data, input_shape=options.input_shape, **request_of(options)
        )
    before = measure(model, input_shape=options.input_shape)
    after = measure(model, plan, input_shape=options.input_shape)
    found = None
    if not options.dry_run:
        small = plan.apply(model)
        found = tfprune.verify(model, plan, pruned=small)
        if not found:
            print(f"{found}. Nothing was written; please report this model.", file=sys.stderr)
            return CHECK_FAILED
        save_model(small, options.output)
    if options.save_plan:
        plan.save(options.save_plan)
    if options.json:
        _print_json({
            "plan": {name: len(kept) for name, kept in plan.kept.items()},
            "new_values": list(plan.values),
            "notes": dict(plan.notes),
            "parameters": [before.parameters, after.parameters],
            "macs": [before.macs, after.macs],
            "size_bytes": [before.size_bytes, after.size_bytes],
            "relative_difference": None if found is None else found.relative,
            "output": None if options.dry_run else options.output,
        })  # fmt: skip
        return OK
    print(f"{plan}\n")
    print(_change("MACs", before.macs, after.macs))
    print(_change("parameters", before.parameters, after.parameters))
    if found is not None:
        print(f"{found}\n")
        print(f"Wrote {options.output}. Its accuracy has to be won back: fine-tune it before use.")
    return OK


def export(options: Namespace) -> int:
    """Writes a LiteRT file."""
    if Path(options.output).suffix not in (".tflite", ".litert"):
        raise ArgumentError(
            f"Expected an output file ending in .tflite. Received: {options.output!r}."
        )
    writable_target(options.output)
    report = tfprune.export(
        load_model(options.model_file),
        options.output,
        quantize=options.quantize,
        calibration=_calibration(options),
        input_shape=options.input_shape,
        verbose=_verbose(options),
        sparse=options.sparse,
    )
    _print(options, report)
    return OK


def benchmark(options: Namespace) -> int:
    """Measures files side by side."""
    from tfprune.litert import benchmark_many

    reports = benchmark_many(
        {name: _runnable(name) for name in options.models},
        threads=options.threads,
        runs=options.runs,
        warmup=options.warmup,
        gpu=options.gpu,
        profile=options.profile,
        verbose=_verbose(options),
    )
    if options.json:
        _print_json({name: dataclasses.asdict(report) for name, report in reports.items()})
    else:
        print("\n\n".join(str(report) for report in reports.values()))
    return OK


def compare(options: Namespace) -> int:
    """Prints one table of several models."""
    models: dict[str, Any] = {}
    for text in options.models:
        name, separator, path = text.rpartition("=")
        if not separator:
            name = Path(path).stem
        if name in models:
            raise ArgumentError(f"Expected different names. Received: {name!r} twice.")
        models[name] = _runnable(path)
    data = _dataset(options.data, options).test if options.data else None
    report = tfprune.compare(
        models, data, runs=options.runs, gpu=options.gpu, verbose=_verbose(options)
    )
    if options.json:
        _print_json(report.as_dict())
    else:
        print(report.to_markdown() if options.markdown else report)
    return OK


def train(options: Namespace) -> int:
    """Runs a recipe."""
    from tfprune import recipes

    if options.list:
        found = {name: recipes.read(name).about for name in recipes.names()}
        if options.json:
            _print_json(found)
        else:
            print("\n\n".join(f"{name}\n  {about}" for name, about in found.items()))
        return OK
    recipe = (
        recipes.read(options.recipe)
        if options.recipe
        else recipes.find(options.method, options.model, options.dataset)
    ).changed(dict(options.set))
    report = recipes.train(recipe, options.output, on_epoch_end=_epoch_line(options))
    if options.json:
        _print_json(report.as_dict())
    else:
        print(report)
    return OK


def _epoch_line(options: Namespace) -> Any:
    """A line on standard error for every epoch, unless that was declined."""
    if options.quiet or options.json:
        return None

    def line(phase: str, epoch: int, values: Mapping[str, float]) -> None:
        shown = {"loss": "loss", "val_accuracy": "validation accuracy", "macs": "MACs left"}
        parts = [f"{text} {values[key]:.4g}" for key, text in shown.items() if key in values]
        print(f"{phase} {epoch + 1}: {', '.join(parts)}", file=sys.stderr, flush=True)

    return line


def demo(options: Namespace) -> int:
    """The main job on real data."""
    from tfprune.demo import demo as run

    report = run(
        options.dataset,
        options.output,
        epochs=options.epochs,
        subset=options.subset,
        seed=options.seed,
        gpu=options.gpu,
        verbose=int(not (options.quiet or options.json)),
    )
    if options.json:
        _print_json(report.as_dict())
    else:
        print(report)
    return OK


def _check_outputs(options: Namespace) -> None:
    """Before any long work: everything can be written, and the model is not written over."""
    if options.save_plan is not None:
        writable_target(options.save_plan)
    if options.dry_run:
        return
    target = check_target(options.output)
    if target.exists() and target.samefile(options.model_file):
        raise ArgumentError(
            f"Expected another file than the model itself. Received: {options.output!r} for both; "
            "the whole model would be lost."
        )


def _runnable(path: str) -> Any:
    """A LiteRT file's path as it is; a Keras file as a model."""
    return load_model(path) if Path(path).suffix in SUFFIXES else path


def _dataset(name: str, options: Namespace) -> Any:
    """A data set by name; TFDS, which prints as it downloads, leaves standard output alone."""
    with ExitStack() as stack:
        if not _verbose(options):
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stderr(null))
        stack.enter_context(redirect_stdout(sys.stderr))
        return tfprune.data.load(name)


def _calibration(options: Namespace) -> Any:
    name = options.calibration
    if name is None:
        return None
    if name.endswith(".npy"):
        try:
            return np.load(name, allow_pickle=False)
        # numpy reports what is no array at all with these three
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"Expected an .npy file of numbers. Received: {name!r} ({error})."
            ) from error
    return _dataset(name, options).train


def _verbose(options: Namespace) -> int:
    """Whether to show moving bars: to a person at a terminal who did not decline."""
    quiet = options.quiet or options.json
    return int(not quiet and sys.stderr is not None and sys.stderr.isatty())


def _change(what: str, before: float | None, after: float | None) -> str:
    if not before or after is None:
        return f"{what}: not known, as the input's size is open (use --input-shape)"
    return f"{what}: {count(before)} -> {count(after)} ({percent(after / before)})"


def _print(options: Namespace, report: Any) -> None:
    if options.json:
        _print_json(dataclasses.asdict(report))
    else:
        print(report)


def _print_json(value: Any) -> None:
    print(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    """Values that JSON knows: paths as text, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return os.fspath(value) if isinstance(value, os.PathLike) else value
