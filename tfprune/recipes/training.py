"""Runs a recipe in one folder: trains, prunes, fine-tunes, reports; goes on after a stop."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfprune.cost import measure
from tfprune.errors import ArgumentError
from tfprune.graph import analyse
from tfprune.loading import load_model
from tfprune.methods.structured import StructuredMethod, difference
from tfprune.protocols import fine_tune
from tfprune.recipes.recipe import METHODS, NETWORKS, Recipe, splits_of
from tfprune.reports import figures
from tfprune.reports.text import percent, table
from tfprune.saving import save_model
from tfprune.writing import replacing

_RECIPE = "recipe.json"


@dataclass(frozen=True)
class TrainReport:
    """What a recipe came to.

    Attributes:
        recipe: as it was run.
        accuracy: top-1 on the test set, by stage: "dense" (where it was trained or came trained),
            "trained" by the method, "pruned" straight after, and "fine-tuned".
        macs: of one example, before and after.
        parameters: before and after.
        difference: largest difference between the outputs of the trained and the pruned model on a
            batch of training data, over the largest output.
        widths: group -> width at the end of every epoch of the method's training.
        seconds: wall time of all trainings, those before an interruption included.
        output: the folder.
    """

    recipe: Recipe
    accuracy: Mapping[str, float]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    difference: float
    widths: Mapping[str, tuple[float, ...]]
    seconds: float
    output: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {
            **values,
            "recipe": self.recipe.as_dict(),
            "accuracy": dict(self.accuracy),
            "widths": {name: list(series) for name, series in self.widths.items()},
        }

    def __str__(self) -> str:
        rows = [(stage, percent(value, 2)) for stage, value in self.accuracy.items()]
        lines = [
            f"{self.recipe.method} of {self.recipe.model} on {self.recipe.dataset}",
            *([self.recipe.about] if self.recipe.about else []),
            "",
            table(("model", "test accuracy"), rows, right=("test accuracy",)),
            "",
            f"MACs: {self.macs[0]:,} -> {self.macs[1]:,} ({percent(self.macs[1] / self.macs[0])})",
            f"parameters: {self.parameters[0]:,} -> {self.parameters[1]:,} "
            f"({percent(self.parameters[1] / self.parameters[0])})",
            f"largest difference of outputs when channels went: {self.difference:.2g} of the "
            "largest output",
            f"{self.seconds:.0f} s of training. Everything is in {self.output}.",
        ]
        return "\n".join(lines)


def train(
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    on_epoch_end: Callable[[str, int, Mapping[str, float]], None] | None = None,
) -> TrainReport:
    """Runs a recipe. The same call goes on where an interrupted one stopped, epoch by epoch.

    The folder holds the recipe, checkpoints of every training, ``trained.keras`` (before pruning),
    ``plan.json``, ``pruned.keras`` (fine-tuned, if the recipe says so), ``structure.png`` (the
    width of every group over time) and ``report.json``. The test set is used for the report only.

    Args:
        recipe: see :func:`tfprune.recipes.read`.
        output: a folder; made if it is not there. One with another recipe in it is refused.
        on_epoch_end: called with the phase ("dense", "train" or "fine_tune"), the epoch's number
            and its values.

    Raises:
        ArgumentError: the folder belongs to another recipe or cannot be written, or what the
            method, ``tfprune.data.load`` and ``tfprune.fine_tune`` raise.
    """
    folder = Path(output)
    _check_folder(recipe, folder)
    splits = splits_of(recipe)
    source = _network(recipe, splits.info)
    options = dict(recipe.arguments)
    kind = METHODS[recipe.method]
    if any(item.name == "data" for item in dataclasses.fields(kind)):
        options["data"] = splits.train_epoch(0)
    method = kind(**options)
    # what is refused is refused before any training
    method.prepare(source)
    method.fit_options(recipe.train["epochs"], _training(recipe.train))
    _make_folder(recipe, folder)

    def tuned(phase: str, model: Any, callbacks: Any = ()) -> Any:
        report = None if on_epoch_end is None else _named(on_epoch_end, phase)
        return fine_tune(
            model, splits.train_epoch, splits.validation, seed=recipe.seed, verbose=0,
            checkpoint=folder / f"{phase}.npz", callbacks=callbacks, on_epoch_end=report,
            **_training(getattr(recipe, phase)),
        )  # fmt: skip

    accuracy: dict[str, float] = {}
    seconds = 0.0
    if recipe.dense:
        seconds += tuned("dense", source).seconds
    if recipe.dense or recipe.model not in NETWORKS:
        accuracy["dense"] = _accuracy(source, splits.test)
    prepared = method.prepare(source)
    record = tuned("train", prepared, method.callbacks())
    seconds += record.seconds
    accuracy["trained"] = _accuracy(prepared, splits.test)
    save_model(prepared, folder / "trained.keras")
    small = _finished(method, prepared, folder)
    accuracy["pruned"] = _accuracy(small, splits.test)
    changed = difference(prepared, small, splits.train_epoch(0))
    if recipe.fine_tune:
        seconds += tuned("fine_tune", small).seconds
        accuracy["fine-tuned"] = _accuracy(small, splits.test)
    save_model(small, folder / "pruned.keras")
    before, after = measure(source), measure(small)
    report = TrainReport(
        recipe=recipe,
        accuracy=accuracy,
        macs=(int(before.macs or 0), int(after.macs or 0)),
        parameters=(before.parameters, after.parameters),
        difference=changed,
        widths=widths_of(record.history),
        seconds=seconds,
        output=str(folder),
    )
    if report.widths:
        full = {group.name: group.width for group in analyse(prepared)}
        figures.save(figures.structure_figure(report.widths, full), folder / "structure.png")
    with replacing(folder.resolve() / "report.json") as temporary:
        temporary.write_text(json.dumps(report.as_dict(), indent=2), encoding="utf-8")
    return report


def _finished(method: Any, prepared: Any, folder: Path) -> Any:
    """The smaller model; its plan is made once, and saved."""
    plan = method.plan(prepared)
    plan.save(folder / "plan.json")
    if isinstance(method, StructuredMethod):
        return method.carried_out(prepared, plan)
    return method.finish(prepared)


def widths_of(history: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """From the record of a training: group -> its width at the end of every epoch."""
    return {
        key.removeprefix("width/"): tuple(series)
        for key, series in history.items()
        if key.startswith("width/")
    }


def _named(function: Callable[[str, int, Any], None], phase: str) -> Callable[[int, Any], None]:
    return lambda epoch, values: function(phase, epoch, values)


def _training(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``fine_tune`` from a recipe's table."""
    given = dict(options)
    momentum, nesterov = given.pop("momentum", 0.9), given.pop("nesterov", False)
    if given.get("optimizer", "sgd") == "sgd" and (momentum != 0.9 or nesterov):
        import keras

        given["optimizer"] = keras.optimizers.SGD(momentum=momentum, nesterov=nesterov)
    if "milestones" in given:
        points, factor = [m / given["epochs"] for m in given.pop("milestones")], given.pop("factor")
        # Progress is epoch / epochs: a milestone is passed where it is reached.
        given["schedule"] = lambda p: factor ** sum(p >= point - 1e-9 for point in points)
    return given


def _network(recipe: Recipe, info: Any) -> Any:
    if recipe.model not in NETWORKS:
        return load_model(recipe.model)
    make, depth = NETWORKS[recipe.model]
    return make(
        depth,
        classes=info.classes,
        input_shape=info.input_shape,
        seed=recipe.seed,
        **recipe.network,
    )


def _check_folder(recipe: Recipe, folder: Path) -> None:
    """Raises :class:`ArgumentError` for a folder that has another recipe in it."""
    file = folder / _RECIPE
    if not file.exists():
        return
    present = json.loads(file.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(recipe.as_dict()))
    changed = [key for key in wanted if present.get(key) != wanted[key]]
    if changed:
        raise ArgumentError(
            f"Expected a folder of the same recipe, or a new one. Received: {str(folder)!r}, "
            f"whose recipe has another {', '.join(changed)}. Give another folder, or remove it."
        )


def _make_folder(recipe: Recipe, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"Expected a folder that can be made. Received: {str(folder)!r} ({error.strerror})."
        ) from error
    with replacing((folder / _RECIPE).resolve()) as temporary:
        temporary.write_text(json.dumps(recipe.as_dict(), indent=2), encoding="utf-8")


def _accuracy(model: Any, data: Any) -> float:
    right = total = 0
    for x, y in data:
        predicted = np.asarray(model(x, training=False)).argmax(-1)
        right += int((predicted == np.asarray(y).ravel()).sum())
        total += len(predicted)
    return right / total
