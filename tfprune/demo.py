"""The main job from end to end: train, prune, fine-tune, export, compare."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfprune import allocation, zoo
from tfprune.data import NAMES, load
from tfprune.errors import ArgumentError
from tfprune.litert import export
from tfprune.protocols import fine_tune, recalibrate_batch_norm
from tfprune.pruning import plan as make_plan
from tfprune.reports import figures
from tfprune.reports.comparison import Comparison, compare
from tfprune.reports.text import percent
from tfprune.saving import save_model
from tfprune.surgery import Verification, verify
from tfprune.writing import replacing


@dataclass(frozen=True)
class DemoReport:
    """What the demo did.

    Attributes:
        dataset: name, and where it is from.
        comparison: dense and pruned, float32 and int8, side by side.
        verification: masked ≡ pruned on the trained model.
        pruned_accuracy: top-1 on the validation data straight after pruning, before fine-tuning.
        seconds: wall time.
        output: the folder that holds the models, the plan and the plots.
        protocol: epochs, learning rates and seed, in words.
    """

    dataset: str
    comparison: Comparison
    verification: Verification
    pruned_accuracy: float
    seconds: float
    output: str
    protocol: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "dataset": self.dataset,
            "protocol": self.protocol,
            "pruned_accuracy": self.pruned_accuracy,
            "relative_difference": self.verification.relative,
            "seconds": self.seconds,
            "output": self.output,
            **self.comparison.as_dict(),
        }

    def __str__(self) -> str:
        return (
            f"{self.dataset}\n{self.protocol}\n\n{self.comparison}\n\n"
            f"{self.verification}\n"
            f"Straight after pruning {percent(self.pruned_accuracy)} of the validation images were "
            "right; the table is after fine-tuning.\n"
            f"{self.seconds:.0f} s. Models, plan and plots are in {self.output}; see also "
            f"tfprune inspect {Path(self.output) / 'dense.keras'}"
        )


def demo(
    dataset: str = "digits",
    output: str | os.PathLike[str] = "tfprune-demo",
    *,
    macs: float = 0.5,
    epochs: int = 20,
    subset: int | None = None,
    seed: int = 0,
    gpu: bool | str = "auto",
    verbose: int = 1,
) -> DemoReport:
    """Trains a small ResNet, prunes it to half its MACs, fine-tunes, exports and compares.

    Args:
        dataset: ``"digits"`` (scikit-learn's handwritten digits, nothing to download: a ResNet-14
            of doubled width) or a name that :func:`tfprune.data.load` knows (a ResNet-20).
        output: folder for models, plan and plots; made if it is not there.
        macs: budget, as a fraction of the dense model's.
        epochs: of training; fine-tuning takes half as many.
        subset: use only this many training images.
        seed: of weights and data order.
        gpu: whether to run on the GPU delegate: True, False, or ``"auto"``.
        verbose: 1 shows the steps on standard error, and bars if that is a terminal.

    Raises:
        ArgumentError: an unknown data set, or a folder that cannot be written.
        DataError: the data set cannot be had.
    """
    start = time.perf_counter()
    if dataset not in NAMES:
        raise ArgumentError(f"Expected one of {', '.join(NAMES)}. Received: {dataset!r}.")
    note = _Notes(verbose)
    with _folder(output) as folder:
        note("load TensorFlow and the data")
        splits = load(dataset, batch_size=64, augment=dataset != "digits", subset=subset, seed=seed)
    info = splits.info

    note(f"data: {info.source}")
    if dataset == "digits":
        # Wide enough that the kernels, not the overhead of a call, make the latency.
        dense = zoo.digits_resnet(14, widths=(32, 64, 128), seed=seed)
        round_to = allocation.PRESETS["cpu_fp32"]
    else:
        dense = zoo.resnet_cifar(20, input_shape=info.input_shape, classes=info.classes, seed=seed)
        # Narrow networks need fine steps; the multiples of the GPU are the finest that pay.
        round_to = allocation.PRESETS["gpu"]
    note(f"train {dense.name}, {_epochs(epochs)}")
    with note.training(epochs) as report:
        fine_tune(
            dense, splits.train_epoch, splits.validation, epochs=epochs, learning_rate=0.05,
            schedule="cosine", weight_decay=1e-4, seed=seed, verbose=0, on_epoch_end=report,
        )  # fmt: skip
    save_model(dense, folder / "dense.keras")

    note(f"prune to {percent(macs, 0)} of the MACs")
    pruning = make_plan(dense, macs=macs, criterion="l1", round_to=round_to)
    pruning.save(folder / "plan.json")
    small = pruning.apply(dense)
    verification = verify(dense, pruning, pruned=small)
    recalibrate_batch_norm(small, splits.train)
    pruned_accuracy = _accuracy(small, splits.validation)
    tuning = max(1, epochs // 2)
    note(f"fine-tune, {_epochs(tuning)}")
    with note.training(tuning) as report:
        fine_tune(
            small, splits.train_epoch, splits.validation, epochs=tuning, learning_rate=0.02,
            schedule="cosine", weight_decay=1e-4, seed=seed, verbose=0, on_epoch_end=report,
        )  # fmt: skip
    save_model(small, folder / "pruned.keras")

    note("export to LiteRT, float32 and int8")
    exports: dict[str, Any] = {}
    for name, model in (("dense", dense), ("pruned", small)):
        for kind in (None, "int8"):
            label = f"{name} {kind or 'float32'}"
            path = folder / f"{name}{'_int8' if kind else ''}.tflite"
            export(model, path, quantize=kind, calibration=splits.train if kind else None)
            exports[label] = (model, path)
    note("measure accuracy and latency")
    comparison = compare(exports, splits.test, gpu=gpu, verbose=int(note.at_a_terminal))
    figures.save(figures.comparison_figure(comparison), folder / "comparison.png")
    figures.save(figures.widths_figure(pruning), folder / "widths.png")

    report_ = DemoReport(
        dataset=f"{info.name}: {info.source}",
        comparison=comparison,
        verification=verification,
        pruned_accuracy=pruned_accuracy,
        seconds=time.perf_counter() - start,
        output=str(folder),
        protocol=(
            f"{dense.name}, {info.counts['train']:,} training images, {_epochs(epochs)} at 0.05 "
            f"(cosine), pruned by L1 norm, {_epochs(tuning)} at 0.02 (cosine), seed {seed}; the "
            "test set was used for the table only"
        ),
    )
    with replacing(folder.resolve() / "report.json") as temporary:
        temporary.write_text(json.dumps(report_.as_dict(), indent=2), encoding="utf-8")
    return report_


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' if number > 1 else ''}"


@contextmanager
def _folder(output: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that can be written; if the block fails, an empty one is not left behind."""
    folder = Path(output)
    there = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ArgumentError(
            f"Expected a folder that can be written. Received: {str(folder)!r} ({error.strerror})."
        ) from error
    try:
        yield folder
    except BaseException:
        if not there:
            with suppress(OSError):
                folder.rmdir()
        raise


def _accuracy(model: Any, data: Any) -> float:
    right = total = 0
    for x, y in data:
        predicted = model(x, training=False).numpy().argmax(-1)
        right += int((predicted == y.numpy().ravel()).sum())
        total += len(predicted)
    return right / total


class _Notes:
    """Progress on standard error."""

    def __init__(self, verbose: int) -> None:
        self._verbose = verbose
        self._console: Any = None
        if verbose:
            from rich.console import Console

            self._console = Console(stderr=True)

    def __call__(self, text: str) -> None:
        if self._console is not None:
            self._console.print(f"• {text}", highlight=False, markup=False, soft_wrap=True)

    @property
    def at_a_terminal(self) -> bool:
        """Whether somebody watches, so that bars may move."""
        return self._console is not None and bool(self._console.is_terminal)

    @contextmanager
    def training(self, epochs: int) -> Iterator[Any]:
        """A progress bar over epochs; yields the callback that moves it."""
        if not self.at_a_terminal:
            yield None
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), TextColumn("{task.completed}/{task.total} epochs"),
                   TextColumn("{task.description}"), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task("", total=epochs)

            def report(epoch: int, values: Any) -> None:
                text = f"validation accuracy {percent(values.get('val_accuracy'))}"
                bar.update(task, completed=epoch + 1, description=text)

            yield report
