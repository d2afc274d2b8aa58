r"""AOFP in training: random halves are tried while the network learns, and harmless ones removed.

Reference: X. Ding, G. Ding, Y. Guo, J. Han and C. Yan, "Approximated Oracle Filter Pruning for
Destructive CNN Width Optimization", ICML 2019 (PMLR 97:1607-1616), arXiv:1905.04748. The procedure
is read in the authors' code (PyTorch and TensorFlow 1); sheet B1. The search itself, the damage t
and where it is measured are told in :mod:`tfprune.criteria.aofp` and
:mod:`tfprune.criteria.damage`; the criterion there does the same on a network that stands still.

The network trains on plain cross-entropy along the *base path*, on which removed channels are zero
where they are read. Group number i of n begins at step :math:`\text{warmup} + i \lfloor
\text{steps\_per\_half} / n \rfloor`, so that the groups do not move all at once. From then on every
training step draws a random half of the group's search space, measures the damage of zeroing it,
and books it on the members; after ``steps_per_half`` such steps the half is over, and is accepted,
refined or given up. What is accepted is zero from that step on. When the MACs of what is left are
within the target, the training stops. Widths come out of theta and the stop, not out of a ratio.

Departures.

- Keras 3's callbacks do not see the training batch: damage is measured on batches of ``data``, in
  turn, with the weights just after the step. Give the training data.
- Damage is measured in inference mode (the authors' scoring path runs batch normalisation in
  training mode, and lets the ablated batch disturb its moving averages); without gradients.
- Groups of channels in the place of layers: a residual stream is one group with several readers, of
  which the largest damage counts; the authors leave it alone. Groups that are read inside layers
  (attention heads) or whose pruned network computes something else than the masked one (layer
  normalisation reads them) are left whole, and named in the result.
- The stop is tested after every move (as in the authors' TensorFlow code; their PyTorch code tests
  it after every epoch). MACs count as they do everywhere here.
- ``min_channels`` stay (one authors' code fails at one filter, the other skips the layer). A move
  that would leave fewer is refined.
- The offset of group i is by its place among those that are searched, not by the number of a layer.
- The authors double the learning rate of biases and keep weight decay off them; that is left to
  ``fine_tune``'s options.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import numpy as np
from numpy.typing import NDArray

from tfprune.allocation.steps import check_patterns, matches, protected_channels
from tfprune.arguments import check_whole
from tfprune.batches import iterate
from tfprune.cost import CostModel
from tfprune.criteria.aofp import Indices, Search, begin, decided, draw, goes_on, tallied
from tfprune.criteria.damage import Reader, readers_by_group
from tfprune.criteria.norm import L1
from tfprune.errors import ArgumentError, BudgetError, DataError, ModelError
from tfprune.graph import ChannelGraph, ChannelGroup, analyse
from tfprune.graph.copying import copy_model
from tfprune.graph.evaluate import evaluate, flatten
from tfprune.graph.labels import Labels
from tfprune.graph.plan import PruningPlan
from tfprune.graph.trace import Call
from tfprune.layers import Masks
from tfprune.methods.method import Method, MethodResult, plain_copy
from tfprune.protocols import fine_tune
from tfprune.surgery import apply
from tfprune.workers import gather


@dataclass(frozen=True)
class Move:
    """Channels that were removed at once.

    Attributes:
        step: number of the training step, from 1, after which they went.
        group: the group.
        channels: their indices.
        worst: the largest mean damage among them.
        macs: what was left after it, a fraction of the MACs at first.
    """

    step: int
    group: str
    channels: tuple[int, ...]
    worst: float
    macs: float


@dataclass(frozen=True)
class ApproximatedOracleResult(MethodResult):
    """What :meth:`ApproximatedOracle.run` returns.

    Attributes:
        macs: of the finished model, as a fraction of the given model's.
        reached: whether that is within the target. If not, the epochs were over before.
        moves: what was removed when. Of a run that went on from a checkpoint, those since then.
        skipped: groups that can be pruned and were not searched -> why, in words.
    """

    macs: float
    reached: bool
    moves: tuple[Move, ...]
    skipped: Mapping[str, str]


@dataclass(frozen=True)
class ApproximatedOracle(Method):
    """Trains, and removes filters that the next layer does not miss, down to a target of MACs.

    The result is a smaller model. The training ends in the step in which the target is met;
    afterwards fine-tune the result, as the paper does for 600 epochs. A move takes up to half of a
    group, so that what is left may be well below the target. For scores alone, on a network that is
    not trained meanwhile, see :class:`tfprune.criteria.aofp.AOFP`.

    The learning rate must not fall to 0 as long as the search goes on: a group that gave up passes
    the next time only because the weights have changed.

    *State.* The removed channels are in the model, as zeros in the weights that read them: training
    that is resumed keeps them. What was booked on the halves under way is held by the callback
    alone. Those halves begin anew, so that a resumed training is as good, but not bit for bit the
    same as one that was not interrupted.

    Args:
        macs: the target, as a fraction of the MACs of the model, in (0, 1). The paper's
            demonstrations keep 0.35 (VGG-16) and 0.5 (ResNet-56 on CIFAR-10).
        data: what damage is measured on: training data, whose labels are not used; read into
            memory.
        theta: a half is removed if its largest mean damage is below. The paper has 0.01; 0.05 for
            LeNet-5.
        steps_per_half: training steps between two decisions of a group. The paper has 1000; 400 for
            LeNet-5.
        warmup: training steps before the first group begins. The paper has 500; 100 for LeNet-5.
        min_channels: fewest channels that a group keeps.
        ignore: names or patterns of groups, or of layers whose output channels all stay.
        batches: how many batches of ``data`` to use; ``None`` for all.
        batch_size: for arrays. The paper measures on batches of 64.
        seed: of the random halves.

    Raises:
        ArgumentError: a value out of range.
    """

    macs: float
    data: Any
    theta: float = 0.01
    steps_per_half: int = 1000
    warmup: int = 500
    min_channels: int = 1
    ignore: Sequence[str] = ()
    batches: int | None = 64
    batch_size: int = 64
    seed: int = 0

    changes_masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("macs", "theta"):
            value = getattr(self, name)
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not number or not np.isfinite(value) or value <= 0:
                raise ArgumentError(f"Expected {name} as a positive number. Received: {value!r}.")
        if self.macs >= 1:
            raise ArgumentError(
                "Expected macs as a fraction of the model's MACs that is left, below 1. "
                f"Received: {self.macs!r}."
            )
        if self.data is None:
            raise ArgumentError(
                "Expected data to measure damage on. Received: none. Pass the training data."
            )
        for name, least in (
            ("steps_per_half", 1), ("warmup", 0), ("min_channels", 1), ("batch_size", 1),
            ("seed", 0),
        ):  # fmt: skip
            check_whole(name, getattr(self, name), least)
        if self.batches is not None:
            check_whole("batches", self.batches, 1)
        if isinstance(self.ignore, str):
            raise ArgumentError(
                "Expected ignore to be a list of names or patterns. Received the string "
                f"{self.ignore!r}: write ignore=[{self.ignore!r}]."
            )

    def prepare(self, model: Any) -> Any:
        """A copy of the model, ready to train.

        Raises:
            ModelError: no built Keras 3 model on TensorFlow, or one whose MACs are not a number.
            ArgumentError: ``ignore`` names nothing, or no group can be searched.
            BudgetError: the target is out of reach.
            DataError: the data are empty or do not fit the model.
        """
        if keras.backend.backend() != "tensorflow":
            raise ModelError(
                "Expected a model on TensorFlow, which measures damage while it trains. Received: "
                f"a model on the Keras backend {keras.backend.backend()!r}. Set KERAS_BACKEND to "
                "tensorflow, or use the criterion AOFP."
            )
        copy = plain_copy(model)
        targets = Targets(self, analyse(copy))
        if not targets.groups:
            raise ArgumentError(
                "Expected groups of channels to search. Received: a model without any"
                + "".join(f"; {name!r}: {why}" for name, why in targets.skipped.items())
                + ". print(tfprune.analyse(model)) says what can be pruned."
            )
        least = targets.fraction(targets.narrowest)
        if least > self.macs:
            raise BudgetError(
                f"Expected macs of at least {least:.4g}, which is left when every group that is "
                f"searched keeps {self.min_channels} channels. Received: {self.macs}."
            )
        shape = getattr(copy, "input_shape", None)
        next(iterate(self.data, batch_size=self.batch_size, limit=1, input_shape=shape))
        return copy

    def callbacks(self) -> list[Any]:
        """The search, which keeps removed channels at zero and stops the training."""
        return [HalvingSearch(self)]

    def plan(self, model: Any) -> PruningPlan:
        """The channels that are left of a model from :meth:`prepare`, trained."""
        targets = Targets(self, analyse(model))
        kept = targets.kept()
        notes = {
            "method": f"AOFP (theta={self.theta}, macs={self.macs})",
            "MACs left": f"{targets.fraction(kept):.4g}",
        }
        return PruningPlan.of(targets.graph, kept, notes)

    def finish(self, model: Any, data: Any = None, *, structured: bool = False) -> Any:
        """The smaller model, a new one that computes what ``model`` does.

        Args:
            model: from :meth:`prepare`, trained. It stays as it is.
            data: not used.
            structured: not used; channels are always removed for real.
        """
        copy = copy_model(model)
        return apply(copy, self.plan(copy))

    def run(
        self, model: Any, train: Any, validation: Any = None, *, epochs: int, **options: Any
    ) -> ApproximatedOracleResult:
        """Prepares, trains until the target is met or the epochs are over, and finishes.

        Args:
            model, train, validation, epochs, **options: as for :meth:`Method.run`.

        Returns:
            Model, record, MACs, and what was removed when. If the epochs are over before the
            target is met, the model is what there is by then, ``reached`` is ``False`` and a
            warning says so: train longer, or with a larger theta or fewer ``steps_per_half``.

        Raises:
            What :meth:`prepare` and ``fine_tune`` raise.
        """
        options = self.fit_options(epochs, dict(options))
        prepared = self.prepare(model)
        search = HalvingSearch(self)
        callbacks = [search, *options.pop("callbacks", ())]
        record = fine_tune(
            prepared, train, validation, epochs=epochs, callbacks=callbacks, **options
        )
        targets = Targets(self, analyse(prepared))
        macs = targets.fraction(targets.kept())
        reached = macs <= self.macs
        if not reached:
            warnings.warn(
                f"The epochs were over before the target was met: {macs:.4g} of the MACs are left, "
                f"{self.macs} were asked for. Train longer, or with a larger theta or fewer "
                "steps_per_half.",
                stacklevel=2,
            )
        finished = self.finish(prepared)
        sparsity = Masks.of_zeros(finished).sparsity
        return ApproximatedOracleResult(
            finished, record, sparsity, macs, reached, tuple(search.moves), targets.skipped
        )


class Targets:
    """The groups that are searched, and their base masks as the model has them.

    Attributes:
        graph: of the model in training.
        groups: in the order of the model.
        skipped: name of a group that can be pruned -> why it is not searched.
        readers: name -> the calls that read the group.
        fixed: name -> channels that always stay.
    """

    def __init__(self, method: ApproximatedOracle, graph: ChannelGraph) -> None:
        check_patterns(graph, method.ignore, "ignore")
        self.graph = graph
        self.readers: dict[str, tuple[Reader, ...]] = {}
        self.skipped: dict[str, str] = {}
        self._least = method.min_channels
        self._costs = CostModel(graph)
        self._full = self._costs.macs(self._costs.full_mask())
        found: list[ChannelGroup] = []
        readers = readers_by_group(graph)
        for group in graph.prunable:
            reason = _reason(group, method, readers.get(group.name, ()))
            if reason:
                self.skipped[group.name] = reason
            else:
                found.append(group)
                self.readers[group.name] = readers[group.name]
        self.groups = tuple(found)
        protected = protected_channels(graph, L1()(graph), self._costs)
        self.fixed = {
            group.name: np.flatnonzero(protected[group.channel_ids]) for group in self.groups
        }

    def fraction(self, kept: Mapping[str, Indices]) -> float:
        """The MACs that are left, as a fraction."""
        return self._costs.macs(self._costs.graph.keep_mask(kept)) / self._full

    @property
    def narrowest(self) -> dict[str, Indices]:
        """As few channels as may stay."""
        return {group.name: self._filled(group, np.zeros(0, np.int64)) for group in self.groups}

    def kept(self) -> dict[str, Indices]:
        """The channels that somebody reads: not all weights that read them are zero."""
        result: dict[str, Indices] = {}
        for group in self.groups:
            read = np.zeros(group.width, bool)
            for member in group.members:
                if member.masked:
                    value = np.moveaxis(np.asarray(member.variable), member.axis, 0)
                    used = value[member.positions].reshape(len(member.positions), -1).any(1)
                    np.logical_or.at(read, member.channels, used)
            result[group.name] = self._filled(group, np.flatnonzero(read))
        return result

    def masks(self, kept: Mapping[str, Indices]) -> list[tuple[Any, NDArray[np.bool_]]]:
        """Weights of which a part is zero on the base path, and which part is not."""
        found: dict[int, tuple[Any, NDArray[np.bool_]]] = {}
        for group in self.groups:
            gone = np.ones(group.width, bool)
            gone[kept[group.name]] = False
            for member in group.members:
                positions = member.positions[gone[member.channels]]
                if member.masked and len(positions):
                    variable = member.variable
                    shape = tuple(int(size) for size in variable.shape)
                    _, mask = found.setdefault(id(variable), (variable, np.ones(shape, bool)))
                    np.moveaxis(mask, member.axis, 0)[positions] = False
        return list(found.values())

    def _filled(self, group: ChannelGroup, kept: Indices) -> Indices:
        """With the fixed channels, and others by index where there are too few."""
        kept = np.union1d(kept, self.fixed[group.name])
        more = np.setdiff1d(np.arange(group.width), kept)
        missing = min(self._least, group.width) - len(kept)
        return np.union1d(kept, more[: max(0, missing)])


def _reason(group: ChannelGroup, method: ApproximatedOracle, readers: Sequence[Reader]) -> str:
    if any(matches(group, pattern) for pattern in method.ignore):
        return "it is to be ignored"
    if not group.exact:
        return f"the pruned model would differ: {group.inexact_reason}"
    if not readers:
        return "it is read inside a layer, or by none"
    if group.width <= method.min_channels:
        return "it has no more channels than have to stay"
    return ""


class HalvingSearch(keras.callbacks.Callback):  # type: ignore[misc]
    """The search, a step of it after every training batch.

    Attributes:
        moves: what was removed so far.

    Args:
        method: the hyper-parameters.
    """

    def __init__(self, method: ApproximatedOracle) -> None:
        super().__init__()
        self._method = method
        self.moves: list[Move] = []

    def on_train_begin(self, logs: Any = None) -> None:
        """Finds out where the search stands from the model's weights and the optimizer's step.

        Raises:
            ArgumentError: several training steps per execution, between which nothing could be
                masked.
        """
        method = self._method
        if getattr(self.model, "steps_per_execution", 1) != 1:
            raise ArgumentError(
                "Expected a model compiled with steps_per_execution=1, as channels are masked "
                f"after every step. Received: {self.model.steps_per_execution}."
            )
        shape = getattr(self.model, "input_shape", None)
        examples = gather(
            method.data, batches=method.batches, batch_size=method.batch_size, input_shape=shape
        )
        self._batches = [[np.asarray(part) for part in flatten(x)] for x, _ in examples.batches()]
        self._targets = Targets(method, analyse(self.model))
        self._measure = damage_function(self._targets)
        self._step = int(self.model.optimizer.iterations)
        groups = self._targets.groups
        self._starts = starts(len(groups), method.warmup, method.steps_per_half)
        kept = self._targets.kept()
        self._searches = {
            group.name: begin(
                group.width,
                kept[group.name],
                np.setdiff1d(kept[group.name], self._targets.fixed[group.name]),
            )
            for group in groups
        }
        self._remask()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Masks what the optimizer has moved, and takes a step in every group that has begun.

        Raises:
            DataError: activations that are not finite.
        """
        self._step += 1
        self._mask()
        if not self._reached:
            self._advance()
        if self._reached:
            self.model.stop_training = True

    def _advance(self) -> None:
        method = self._method
        dropped: dict[str, Indices] = {}
        for number, (name, search) in enumerate(self._searches.items()):
            if self._step > self._starts[number] and goes_on(search, method.min_channels):
                # Of the step and the group alone, so that a resumed training draws the same.
                random = np.random.default_rng((method.seed, self._step, number))
                dropped[name] = draw(random, search.space)
        if not dropped:
            return
        found = self._measure(self._batches[self._step % len(self._batches)], dropped)
        for name, indices in dropped.items():
            search = tallied(self._searches[name], indices, found[name])
            if search.steps == method.steps_per_half:
                search = self._decide(name, search)
            self._searches[name] = search
            if self._reached:
                return

    def _decide(self, name: str, search: Search) -> Search:
        method = self._method
        after, decision, worst = decided(
            search, method.theta, method.min_channels, self._targets.fixed[name]
        )
        if decision == "accept":
            self._searches[name] = after
            self._remask()
            gone = np.setdiff1d(search.alive, after.alive)
            channels = tuple(int(i) for i in gone)
            self.moves.append(Move(self._step, name, channels, worst, self._macs))
        return after

    def _remask(self) -> None:
        """Takes the masks, and the MACs, from the searches."""
        alive = {name: search.alive for name, search in self._searches.items()}
        self._macs = self._targets.fraction(alive)
        self._reached = self._macs <= self._method.macs
        self._masked = [
            (variable, keras.ops.convert_to_tensor(mask))
            for variable, mask in self._targets.masks(alive)
        ]
        self._mask()

    def _mask(self) -> None:
        for variable, mask in self._masked:
            value = keras.ops.convert_to_tensor(variable)
            variable.assign(keras.ops.where(mask, value, keras.ops.zeros_like(value)))


def starts(count: int, warmup: int, steps_per_half: int) -> list[int]:
    """The step before each of ``count`` groups' first: warmup + i floor(steps_per_half / count)."""
    return [warmup + i * (steps_per_half // count) for i in range(count)]


def damage_function(targets: Targets) -> Any:
    """A function from a batch and dropped channels by group to the damage by group.

    One compiled pass gives the base path and the ends of all scoring paths.
    """
    import tensorflow as tf

    by_call: dict[int, list[tuple[str, Reader]]] = {}
    for name, several in targets.readers.items():
        for reader in several:
            by_call.setdefault(id(reader.call), []).append((name, reader))

    @tf.function(autograph=False)  # type: ignore[untyped-decorator,unused-ignore]
    def measure(batch: Any, factors: Any) -> Any:
        found: dict[str, list[Any]] = {name: [] for name in targets.readers}

        def unscaled(tensor: Any, axis: int, index: Labels) -> Any:
            return tensor

        def observe(call: Call, tensors: Sequence[Any]) -> None:
            for name, reader in by_call.get(id(call), ()):

                def scaled(tensor: Any, axis: int, index: Labels, name: str = name) -> Any:
                    shape = [1] * len(tensor.shape)
                    shape[axis] = len(index)
                    factor = tf.reshape(tf.gather(factors[name], index), shape)
                    return tensor * tf.cast(factor, tensor.dtype)

                base = tf.cast(reader.output(tensors, unscaled), tf.float32)
                ablated = tf.cast(reader.output(tensors, scaled), tf.float32)
                moved = tf.reduce_sum(tf.square(base - ablated))
                energy = tf.reduce_sum(tf.square(base))
                # As in tfprune.criteria.damage, for an output that is zero throughout.
                alone = tf.cast(moved > 0, tf.float32)
                found[name].append(tf.where(energy > 0, moved / energy, alone))

        evaluate(targets.graph, batch, observe=observe)
        return {name: tf.reduce_max(tf.stack(values)) for name, values in found.items()}

    def run(batch: Sequence[Any], dropped: Mapping[str, Indices]) -> dict[str, float]:
        factors = {}
        for group in targets.groups:
            factor = np.ones(group.width + 1, np.float32)
            factor[1 + dropped.get(group.name, np.zeros(0, np.int64))] = 0
            factors[group.name] = tf.constant(factor)
        values = measure([tf.constant(part) for part in batch], factors)
        result = {name: float(values[name]) for name in dropped}
        if not np.isfinite(list(result.values())).all():
            raise DataError(
                "Expected finite activations. Received: NaN or infinity. The learning rate may be "
                "too high; look at the data, too."
            )
        return result

    return run
