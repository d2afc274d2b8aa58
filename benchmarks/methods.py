"""All training-time methods on one network, to the same MACs, beside two baselines.

One dense network is trained once. From there every method trains for the same epochs in its own
way, is cut to the MACs asked for, and is fine-tuned for the same epochs. The baselines:

- *L1, one shot*: the dense network trains on for as many epochs without any method, is cut by L1
  norms (all groups alike), and is fine-tuned; so it has had the same epochs.
- *Scratch-B*: the structure that L1 left, and that of each method named with ``--scratch``, trained
  from random weights for as much computation as the dense network has had in all.

An interrupted run goes on from ``--work``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

import tfprune
from benchmarks.common import circumstances, write
from tfprune import methods
from tfprune.cost import measure
from tfprune.methods.structured import difference
from tfprune.protocols import recalibrate_batch_norm, scratch_b
from tfprune.recipes import widths_of
from tfprune.reports import figures
from tfprune.reports.text import percent, table
from tfprune.writing import replacing

MACS = 0.5


@dataclass(frozen=True)
class Stage:
    """What a method's settings may depend on.

    Attributes:
        data: training images and labels, arrays.
        steps: training steps in an epoch.
        epochs: of the training by the method.
        macs: of the network.
        network: the dense network, trained.
    """

    network: Any
    data: Any
    steps: int
    epochs: int
    macs: int


SETTINGS: Mapping[str, Callable[[Stage], Any]] = {
    "slimming": lambda s: methods.NetworkSlimming(4e-3, macs=MACS),
    "SSS": lambda s: methods.SparseStructureSelection(5e-3, macs=MACS, weight_decay=5e-4),
    "SFP": lambda s: methods.SoftFilterPruning(macs=MACS),
    "ISTA": lambda s: methods.ISTA(5e-3, alpha=0.1, macs=MACS),
    "AutoPruner": lambda s: methods.AutoPruner(
        s.steps * s.epochs, macs=MACS, alpha=(0.1, 20.0), penalty=10.0
    ),
    "DCP": lambda s: methods.DiscriminationAwarePruning(
        s.data, macs=MACS, batches=8, batch_size=64, per_pick=8, steps=8
    ),
    "C-SGD": lambda s: methods.CentripetalSGD(1.0, macs=MACS, weight_decay=5e-4),
    "CFP": lambda s: methods.FilterCorrelation(
        macs=MACS, episodes=s.epochs // 2, episode_epochs=1, absorb=True
    ),
    "SSR": lambda s: methods.SSR(
        0.01, every=s.steps // 4, weights=methods.SSR.even_weights(s.network), macs=MACS
    ),
    "MorphNet": lambda s: methods.MorphNet(strength=3 / s.macs, macs=MACS),
    "growing regularisation": lambda s: methods.GrowingRegularisation(
        2.0 / s.steps, every=1, ceiling=4.0, penalised="group", macs=MACS
    ),
    "group norm (DepGraph)": lambda s: methods.GroupNormSparsity(3e-3, macs=MACS),
    "GDP": lambda s: methods.GlobalDynamicPruning(
        s.data, macs=MACS, every=s.steps // 2, batches=20, batch_size=64,
        frozen_after=s.epochs // 2,
    ),
}  # fmt: skip
"""Name -> the method as it is run here. Strengths are for trainings of some hundred steps.

Those of SSS, SSR and the group norm were set again after a first table (README.md).
"""


OWN_RULES = (
    methods.NetworkSlimming,
    methods.SparseStructureSelection,
    methods.ISTA,
    methods.SSR,
    methods.MorphNet,
)
"""What decides by a threshold where nothing is asked for."""


@dataclass(frozen=True)
class Row:
    """One method; accuracies are fractions of the test set.

    Attributes:
        macs: that are left, as a fraction.
        trained, cut, recalibrated, tuned: accuracy after the method's training, straight after the
            cut, with the statistics of batch normalisation estimated anew, and fine-tuned.
        difference: the largest between the outputs of the trained and the cut network.
        own: what the method takes by its own rule, without the budget: MACs that are left, as a
            fraction, and the difference; empty where it has no rule of its own.
        seconds: of the method's training.
        widths: group -> width at the end of each epoch.
    """

    macs: float
    trained: float
    cut: float
    recalibrated: float
    tuned: float
    difference: float
    own: tuple[float, float] | tuple[()]
    seconds: float
    widths: Mapping[str, tuple[float, ...]]


def vgg(seed: int, shape: Any, classes: int) -> Any:
    """VGG-16 of a quarter of its width."""
    widths = ((16,) * 2, (32,) * 2, (64,) * 3, (128,) * 3, (128,) * 3)
    return tfprune.zoo.vgg_cifar(16, widths=widths, input_shape=shape, classes=classes, seed=seed)


def resnet(seed: int, shape: Any, classes: int) -> Any:
    """ResNet-20 with shortcuts of type A."""
    return tfprune.zoo.resnet_cifar(20, input_shape=shape, classes=classes, seed=seed)


NETWORKS = {"vgg16-quarter": vgg, "resnet20": resnet}


def accuracy(model: Any, data: Any) -> float:
    """Top-1 accuracy."""
    x, y = data
    return float((model.predict(x, batch_size=256, verbose=0).argmax(-1) == y).mean())


def arrays(dataset: Any) -> tuple[Any, Any]:
    """All examples of a dataset."""
    parts = list(dataset.as_numpy_iterator())
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


class Results:
    """Finished rows in a file, so that an interrupted run goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """What is known under the key, or else made and kept."""
        if key not in self.values:
            started = time.perf_counter()
            self.values[key] = make()
            print(f"{key}: {time.perf_counter() - started:.0f} s", flush=True)
            with replacing(self._path.resolve()) as temporary:
                temporary.write_text(json.dumps(self.values))
        return self.values[key]


class Bench:
    """The protocol."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.splits = tfprune.data.load(
            options.dataset, subset=11_000, validation=1 / 11, augment=True, batch_size=64,
            seed=options.seed, data_dir=options.data_dir,
        )  # fmt: skip
        self.test = arrays(self.splits.test)
        options.work.mkdir(parents=True, exist_ok=True)
        self.results = Results(options.work / "results.json")
        self.dense = self._dense()

    def _dense(self) -> Any:
        path = self.options.work / "dense.keras"
        if not path.exists():
            info = self.splits.info
            model = NETWORKS[self.options.network](
                self.options.seed, info.input_shape, info.classes
            )
            self.train(model, self.options.dense, 0.05, schedule="cosine")
            model.save(path)
        return keras.models.load_model(path, compile=False)

    def train(self, model: Any, epochs: int, rate: float, callbacks: Any = (), **more: Any) -> Any:
        """A training as all have it here."""
        return tfprune.fine_tune(
            model, self.splits.train_epoch, epochs=epochs, learning_rate=rate,
            seed=self.options.seed, verbose=0, callbacks=callbacks,
            **{"weight_decay": 5e-4, **more},
        )  # fmt: skip

    def by_method(self, name: str) -> dict[str, Any]:
        """A row."""
        stage = Stage(
            network=self.dense,
            data=arrays(self.splits.train_epoch(0)),
            steps=self.splits.info.steps["train"],
            epochs=self.options.train,
            macs=measure(self.dense).macs or 1,
        )
        method = SETTINGS[name](stage)
        prepared = method.prepare(self.dense)
        # These have the same weight decay, as a part of their own rules.
        own = {"weight_decay": 0.0} if name in ("C-SGD", "SSS") else {}
        record = self.train(prepared, self.options.train, 0.02, method.callbacks(), **own)
        small = method.finish(prepared, stage.data)
        return self._row(prepared, small, record, name, self._by_own_rule(method, prepared))

    def _by_own_rule(self, method: Any, prepared: Any) -> Any:
        if type(method) not in OWN_RULES:
            return ()
        free = dataclasses.replace(method, macs=None)
        small = free.finish(prepared)
        return self._share(small), difference(prepared, small, self.splits.train_epoch(0))

    def _share(self, small: Any) -> float:
        return (measure(small).macs or 0) / (measure(self.dense).macs or 1)

    def one_shot(self) -> dict[str, Any]:
        """The baseline that trains on, is cut by L1 norms and fine-tuned."""
        model = tfprune.methods.plain_copy(self.dense)
        record = self.train(model, self.options.train, 0.02)
        small = tfprune.prune(model, macs=MACS, criterion="l1", round_to=1)
        return self._row(model, small, record, "L1")

    def _row(
        self, trained: Any, small: Any, record: Any, name: str, own: Any = ()
    ) -> dict[str, Any]:
        test = self.test
        cut = accuracy(small, test)
        changed = difference(trained, small, self.splits.train_epoch(0))
        recalibrated = keras.models.clone_model(small)
        recalibrated.set_weights(small.get_weights())
        recalibrate_batch_norm(recalibrated, self.splits.train_epoch(0))
        again = accuracy(recalibrated, test)
        self.train(small, self.options.tune, 0.02, schedule="cosine")
        small.save(self.options.work / f"{name}.keras")
        return dataclasses.asdict(
            Row(
                self._share(small), accuracy(trained, test), cut, again, accuracy(small, test),
                changed, own, record.seconds, widths_of(record.history),
            )
        )  # fmt: skip

    def scratch(self, name: str) -> float:
        """Accuracy of a finished structure trained from random weights."""
        small = keras.models.load_model(self.options.work / f"{name}.keras", compile=False)
        epochs = self.options.dense + self.options.train + self.options.tune
        record = scratch_b(
            small, self.splits.train_epoch, dense=self.dense, epochs=epochs, learning_rate=0.05,
            schedule="cosine", weight_decay=5e-4, seed=self.options.seed, verbose=0,
        )  # fmt: skip
        return accuracy(record.model, self.test)


def report(
    bench: Bench, rows: Mapping[str, Any], scratch: Mapping[str, float], dense: float
) -> str:
    """The page as Markdown."""
    options, info = bench.options, bench.splits.info
    plain = rows["L1, one shot"]["seconds"]
    head = (
        "method", "MACs", "trained", "cut", "recal.", "tuned", "Scratch-B", "difference",
        "own rule", "time",
    )  # fmt: skip
    cells = [
        (
            name, percent(r["macs"]), *(percent(r[k]) for k in ("trained", "cut")),
            percent(r["recalibrated"]), percent(r["tuned"]),
            percent(scratch[name]) if name in scratch else "",
            f"{r['difference']:.1e}", own_rule(r["own"]), f"{r['seconds'] / plain:.2f}",
        )
        for name, r in rows.items()
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"# Training-time methods: {options.network} on {options.dataset}",
            f"{info.counts['train']:,} training images, shifted and flipped, batches of 64; SGD "
            f"with momentum 0.9 and L2 decay 5e-4, seed {options.seed}. The dense network is "
            f"trained for {options.dense} epochs (0.05, cosine) and has {percent(dense)}. From "
            f"there every row trains for {options.train} epochs at 0.02 in its way, is cut to "
            f"{percent(MACS, 0)} of the MACs, and is fine-tuned for {options.tune} epochs (0.02, "
            "cosine). **trained**, **cut**, **recal.**, **tuned**: accuracy on the "
            f"{info.counts['test']:,} test images, by which no epoch and no channel was chosen, "
            "after each of these (recal.: statistics of batch normalisation estimated anew, for "
            "this column only); one seed, so differences of a point or two mean nothing. "
            "**Scratch-B**: the same structure from random weights, for as much computation as "
            f"the dense network's {options.dense + options.train + options.tune} epochs. "
            "**difference**: the largest between outputs of the trained and the cut network, over "
            "the largest output. "
            "**own rule**: MACs and difference by the threshold that the method has where no "
            "budget is given. "
            "**time**: the method's training over the plain one of L1, one shot.",
            table(head, cells, right=head[1:], markdown=True),
            circumstances("benchmarks.methods", [
                f"--work DIR --network {options.network} --dataset {options.dataset}",
                f"--dense {options.dense} --train {options.train} --tune {options.tune}",
                f"--scratch {shlex.join(options.scratch)}",
            ]),
        ]
    )  # fmt: skip


def own_rule(found: Any) -> str:
    """A cell: MACs and difference."""
    return f"{percent(found[0])}: {found[1]:.1e}" if found else ""


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--network", choices=tuple(NETWORKS), default="vgg16-quarter")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", help="where TFDS keeps data; by default its own choice")
    parser.add_argument("--dense", type=int, default=8, help="epochs (default 8)")
    parser.add_argument("--train", type=int, default=4, help="epochs by the method (default 4)")
    parser.add_argument("--tune", type=int, default=3, help="epochs (default 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of methods; by default all")
    parser.add_argument(
        "--scratch", nargs="*", default=["L1, one shot"], help="rows whose structures to train"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for what is finished")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--figures", type=Path, help="folder for figures of the structures")
    parser.add_argument("--plots", nargs="*", default=["slimming"], help="rows to draw there")
    options = parser.parse_args()
    bench = Bench(options)
    results = bench.results
    dense = results.get("dense", lambda: accuracy(bench.dense, bench.test))
    rows = {"L1, one shot": results.get("L1, one shot", bench.one_shot)}
    for name in options.only or SETTINGS:
        rows[name] = results.get(name, lambda n=name: bench.by_method(n))
    scratch = {
        name: results.get(
            f"{name}: Scratch-B", lambda n=name: bench.scratch("L1" if n == "L1, one shot" else n)
        )
        for name in options.scratch
        if name in rows
    }
    if options.figures:
        full = {group.name: group.width for group in tfprune.analyse(bench.dense)}
        for name in options.plots:
            figures.save(
                figures.structure_figure(rows[name]["widths"], full),
                options.figures / f"methods-{name.lower()}.png",
            )
    write(report(bench, rows, scratch, dense), options.output)


if __name__ == "__main__":
    main()
