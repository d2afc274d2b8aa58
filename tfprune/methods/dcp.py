r"""Discrimination-aware channel pruning (DCP): channels are added where the loss asks for them.

Reference: Z. Zhuang, M. Tan, B. Zhuang, J. Liu, Y. Guo, Q. Wu, J. Huang and J. Zhu,
"Discrimination-aware Channel Pruning for Deep Neural Networks", NeurIPS 2018, pp. 875-886,
arXiv:1810.11809. Paper and supplement are read, and the authors' code for what they leave open.
Sheet B8.5.

*Training.* P extra classifiers stand evenly in depth, each with the loss

.. math:: L_S^p = \mathrm{CE}(\mathrm{Linear}(\mathrm{GAP}(\mathrm{ReLU}(\mathrm{BN}(O^p)))), y),

so that intermediate features tell the classes apart. With ``training="alternating"``, as the paper
has it, every batch makes two steps of all parameters, on the extra losses and on the network's own
loss; with ``"joint"`` one on their sum. See :mod:`tfprune.methods.dcp_heads`.

*Selection* (Algorithm 2), at the end, with batch normalisation frozen. Layer after layer, with all
in front of it in its final state: the kernel that reads the channels is set to zero; then, until
:math:`\kappa` channels are chosen, the one is added of which the gradient
:math:`\lVert \partial L / \partial W_j \rVert_F` over the data is largest, its slice takes the
trained values, and some steps of SGD move the slices that are chosen so far. The loss is

.. math:: L = L_M + \lambda L_S^p, \qquad
    L_M = \frac{1}{2 Q} \lVert O^{base} - O \rVert_F^2,

with the layer's Q outputs in front of its activation, in the unpruned network and in the present
one, and the first extra loss behind it (behind the last of them the network's own). Without a
request (DCP-Adapt) a layer is done when :math:`|L_{t-1} - L_t| \le \epsilon L_0`.

*What equals what.* The finished network is the trained one with the new kernels and zeros for the
channels that are gone: equal to rounding (``tfprune.verify`` proves it). Against the network as it
was trained there is no bound: ``StructuredResult.difference`` is measured. Fine-tune afterwards, as
the paper does: 400 epochs on CIFAR-10 with a rate of 0.1, a tenth at 160 and at 240.

Departures.

- The extra losses train all at once, and all layers are pruned afterwards, as in the authors' code;
  the paper's text takes turns, stage by stage. The code weights the losses by their sizes and
  divides the learning rates by the weights; here all weights are 1.
- The two steps of a batch share their optimizer, and so its momentum and its count of iterations.
  Penalties on weights (``weight_decay``) belong to the second step.
- Heads stand only where everything passes (:func:`tfprune.methods.dcp_heads.candidates`), and not
  inside nested models.
- Coupled channels, and channels that several layers read, are chosen once: the squared norms of all
  readers' slices are summed, and their errors. The loss is the first one behind all of them. The
  authors leave residual streams alone, which ``ignore`` does.
- The score of a channel is the norm of its whole slice, as in the paper; the code sums norms of the
  slices of every output.
- Outputs of a layer that are removed already (those of a stream) have no part in its error.
- ``min_channels`` of every group stay; in the code a block may vanish.
- The paper's SGD for the kernels has a weight decay of 1e-4; here it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from tfprune import allocation
from tfprune.allocation import Budget
from tfprune.arguments import check_whole
from tfprune.cost import CostModel
from tfprune.criteria.reconstruction.readers import Reader, owners_of, readers_in, readers_of
from tfprune.criteria.scores import Scores
from tfprune.errors import ArgumentError, ModelError
from tfprune.graph import ChannelGraph, ChannelGroup, analyse
from tfprune.graph.copying import copy_model
from tfprune.graph.evaluate import flatten
from tfprune.graph.labels import Keep
from tfprune.graph.plan import PruningPlan
from tfprune.layers.method_model import MethodModel, require_tensorflow
from tfprune.layers.updates import MethodUpdate
from tfprune.losses import resolve_loss
from tfprune.methods.dcp_heads import StagedModel, StageHeads, classes_of, cross_entropy
from tfprune.methods.dcp_selection import (
    Aim,
    Growth,
    Head,
    Problem,
    Settings,
    first_behind,
    grow,
    kappa,
    program_of,
    slice_norms,
)
from tfprune.methods.examples import labelled
from tfprune.methods.structured import (
    StructuredMethod,
)
from tfprune.pruning import plan as plan_of

Training = Literal["alternating", "joint"]


@dataclass(frozen=True)
class DiscriminationAwarePruning(StructuredMethod):
    """Trains with extra losses in between, and then chooses channels greedily by the gradient.

    With ``macs`` or ``pruning_ratio`` every layer loses the same fraction of its channels:
    ``pruning_ratio`` keeps ``width - floor(width * pruning_ratio)`` of each. With neither,
    ``epsilon`` decides for every layer, at the end: until then the logs show the whole network.

    Only channels that convolutions and dense layers alone read, with the kernel's input axis, are
    chosen; all others stay. Layers that cannot lose anything keep their kernels.

    The selection holds activations of ``batches * batch_size`` examples in memory, see
    :mod:`tfprune.methods.dcp_selection`, and takes for every pick a pass over them and ``steps``
    steps of SGD. It is the same whenever it is repeated: nothing in it is random.

    Args:
        data: training data with labels, by which channels are chosen. The paper takes all of
            CIFAR-10, and 10,000 images of ImageNet.
        extra_losses: P. The paper has 3 for ResNet-50 and ResNet-56, 2 for VGG and ResNet-18; as a
            rule of thumb one for 5 to 10 layers.
        training: see above.
        discrimination: lambda, 1 in the paper; 0 leaves the reconstruction error alone.
        epsilon: of the stopping rule, used where nothing is asked for. The paper has 0.1, 0.01 and
            0.001.
        per_pick: channels that are added at once; 1 in the paper, more are faster.
        steps: of SGD after every pick; ``None`` for one pass over the batches, as the authors do.
        selection_rate: learning rate of these, 0.01 in the authors' code. Where activations are
            large it is too much: the plan's notes tell how the loss fell.
        selection_momentum: Nesterov's momentum of these.
        batches: how many batches of ``data`` are used; ``None`` for all.
        batch_size: for arrays.
        loss: the network's own in the selection, a Keras loss; ``None`` infers the cross-entropy
            from the last layer and the labels.
        macs, pruning_ratio, round_to, min_channels, ignore: see :class:`StructuredMethod`. The
            paper removes 30, 50 and 70 % of the channels.

    Raises:
        ArgumentError: a value out of range.
    """

    data: Any = field(repr=False)
    extra_losses: int = 2
    training: Training = "alternating"
    discrimination: float = 1.0
    epsilon: float = 0.01
    per_pick: int = 1
    steps: int | None = None
    selection_rate: float = 0.01
    selection_momentum: float = 0.9
    batches: int | None = 64
    batch_size: int = 128
    loss: Any = None

    changes_masks: ClassVar[bool] = False
    order: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("extra_losses", 1), ("per_pick", 1), ("batch_size", 1)):
            check_whole(name, getattr(self, name), least)
        if self.steps is not None:
            check_whole("steps", self.steps, 0)
        if self.batches is not None:
            check_whole("batches", self.batches, 1)
        if self.training not in ("alternating", "joint"):
            raise ArgumentError(
                f"Expected training as 'alternating' or 'joint'. Received: {self.training!r}."
            )
        _check_number("discrimination", self.discrimination, 0.0, np.inf)
        _check_number("epsilon", self.epsilon, 0.0, 1.0)
        _check_number("selection_rate", self.selection_rate, 0.0, np.inf)
        _check_number("selection_momentum", self.selection_momentum, 0.0, 1.0)
        if self.selection_rate == 0:
            raise ArgumentError("Expected a positive selection_rate. Received: 0.")

    def update(self) -> MethodUpdate:
        """The heads."""
        return StageHeads(self.extra_losses, self.training == "alternating")

    def prepare(self, model: Any) -> Any:
        """A copy of the model with heads beside it, which it trains with.

        Raises:
            ModelError: no built functional or sequential Keras 3 model on TensorFlow.
            ArgumentError: no classifier with one output, too few places for heads, or nothing to
                choose.
            DataError: the data are empty, have no labels or do not fit.
            BudgetError: the MACs are out of reach.
        """
        require_tensorflow()
        if isinstance(model, MethodModel):
            raise ModelError(
                "Expected a plain model. Received one that trains by a method already. Finish that "
                "method first."
            )
        next(self.examples(model))
        prepared = StagedModel.of(model, self.update())
        classes_of(prepared)
        self.check(analyse(prepared))
        return prepared

    def examples(self, model: Any) -> Iterator[tuple[Any, Any]]:
        """The batches by which channels are chosen.

        Raises:
            DataError: none, without labels, or of another shape than the model's inputs.
        """
        return labelled(
            self.data, model, "choose channels by", batch_size=self.batch_size, batches=self.batches
        )

    def scores(self, graph: ChannelGraph) -> Scores:
        """The norms of the slices that read each channel.

        They do not decide how many channels go. Where some of a group's channels must stay, they
        tell which.
        """
        readers = readers_of(graph)
        return Scores(
            {
                group.name: slice_norms(
                    [
                        (reader.kernel, reader.input_axis, owners_of(reader, group))
                        for reader in readers_in(group, readers)
                    ],
                    group.width,
                )
                for group in graph.prunable
            },
            "norm of the slices that read",
        )

    def decide(self, graph: ChannelGraph, scores: Scores) -> PruningPlan:
        """How many channels go, and which by these scores: the selection chooses as many others."""
        notes = {"method": self.describe()}
        if self.macs is not None:
            return plan_of(
                graph,
                macs=self.macs,
                criterion=lambda _: scores,
                order=self.order,
                round_to=self.round_to,
                min_channels=self.min_channels,
                ignore=self._ignored(graph),
            ).noted(notes)
        chain_list = self._chains(graph, scores)
        ratio = self.pruning_ratio or 0.0
        taken = {
            i: chain.at_most(kappa(chain.group.width, ratio)) for i, chain in enumerate(chain_list)
        }
        return PruningPlan.of(graph, allocation.kept_by_steps(chain_list, taken), notes)

    def plan(self, model: Any) -> PruningPlan:
        """Chooses the channels, and new kernels for what reads them.

        Args:
            model: from :meth:`prepare`, trained, or its analysed graph. It stays as it is.

        Raises:
            ModelError: the model is not from :meth:`prepare`.
            DataError: the data, or a loss that is not finite.
            BudgetError: the MACs are out of reach.
        """
        graph = model if isinstance(model, ChannelGraph) else analyse(model)
        if not isinstance(getattr(graph.model, "update", None), StageHeads):
            raise ModelError(
                "Expected a model from prepare(), which has the extra losses. "
                f"Received: {graph.model.name!r}."
            )
        scores = self.scores(graph)
        choice = self.decide(graph, scores)
        costs = CostModel(graph)
        protected = allocation.protected_channels(graph, scores, costs)

        def aim(name: str, widths: Sequence[int]) -> Aim:
            fixed = np.flatnonzero(protected[graph[name].channel_ids])
            return Aim(tuple(sorted(widths)), fixed)

        if self._asked:
            aims = {name: aim(name, [len(kept)]) for name, kept in choice.kept.items()}
        else:
            chain_list = self._chains(graph, scores)
            aims = {chain.group.name: aim(chain.group.name, chain.widths) for chain in chain_list}
        selection = Selection(self, graph)
        kept = selection.choose(aims)
        allocation.check_met(Budget(self.macs), kept, costs)
        losses = "; ".join(
            f"{name}: {growth.losses[0]:.4g} to {growth.losses[-1]:.4g}"
            for name, growth in selection.growths.items()
        )
        notes = {**choice.notes, "loss without any channel, and at the end": losses}
        return PruningPlan.of(graph, kept, notes, selection.values(kept))

    @property
    def settings(self) -> Settings:
        """How channels are added; steps may still be open."""
        return Settings(
            weight=self.discrimination,
            per_pick=self.per_pick,
            steps=-1 if self.steps is None else self.steps,
            learning_rate=self.selection_rate,
            momentum=self.selection_momentum,
            epsilon=None if self._asked else self.epsilon,
        )

    @property
    def _asked(self) -> bool:
        return self.macs is not None or self.pruning_ratio is not None

    def _chains(self, graph: ChannelGraph, scores: Scores) -> list[allocation.Chain]:
        constraints = replace(self._constraints(), ignore=self._ignored(graph))
        return allocation.chains(graph, scores, constraints, CostModel(graph))

    def _ignored(self, graph: ChannelGraph) -> list[str]:
        """``ignore``, and the groups that cannot be chosen by what reads them."""
        allocation.check_patterns(graph, self.ignore, "ignore")
        readers = readers_of(graph)
        left = [group.name for group in graph.prunable if not selectable(group, readers)]
        if len(left) == len(graph.prunable):
            raise ArgumentError(
                "Expected channels that convolutions or dense layers read. Received: "
                f"{graph.model.name!r}, which has none that could be removed. "
                "print(tfprune.analyse(model)) says what can be pruned."
            )
        return [*self.ignore, *left]


def selectable(group: ChannelGroup, readers: Mapping[str, Reader]) -> bool:
    """Whether a group's channels are read along input axes of kernels alone, by one at least."""
    axes = {(id(r.site.variable), r.input_axis) for r in readers.values()}
    reading = [member for member in group.members if member.masked]
    return (
        group.exact
        and bool(reading)
        and all((id(member.variable), member.axis) in axes for member in reading)
    )


class Selection:
    """Algorithm 2, group after group in the order of their first readers.

    Attributes:
        growths: group name -> what was chosen in which order, and the losses.

    Args:
        method: the hyper-parameters and the data.
        graph: of a model from ``prepare``, trained. It is copied, as it may be distributed.
    """

    def __init__(self, method: DiscriminationAwarePruning, graph: ChannelGraph) -> None:
        self.growths: dict[str, Growth] = {}
        base, self._work = (analyse(copy_model(graph.model)) for _ in range(2))
        self._base, self._program = program_of(base), program_of(self._work)
        self._readers = readers_of(self._work)
        self._touched: dict[str, Reader] = {}
        self._batches = [(flatten(x), y) for x, y in method.examples(graph.model)]
        self._settings = method.settings
        if method.steps is None:
            self._settings = replace(self._settings, steps=len(self._batches))
        self._loss = resolve_loss(base.model, method.loss, self._batches[0][1])
        update = graph.model.update
        self._heads = StageHeads.from_config(update.get_config())
        self._heads.bind(base)
        for source, copy in zip(update.variables, self._heads.variables, strict=True):
            copy.assign(np.asarray(source))

    def choose(self, aims: Mapping[str, Aim]) -> dict[str, Any]:
        """Sorted indices of the channels that stay, by name of the group.

        Args:
            aims: of the groups that may lose channels.

        Raises:
            DataError: a loss that is not finite.
        """
        kept: dict[str, Any] = {}
        readers = {name: readers_in(self._work[name], self._readers) for name in aims}
        for name in sorted(aims, key=lambda name: readers[name][0].number):
            group = self._work[name]
            problem = self._problem(group, readers[name], self._work.keep(kept))
            growth = grow(problem, group.width, aims[name], self._settings)
            self.growths[name] = growth
            if len(growth.order) == group.width:
                problem.restore()
                continue
            kept[name] = np.sort(np.array(growth.order, np.int64))
            self._touched.update({reader.path: reader for reader in readers[name]})
        return kept

    def values(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """The kernels that were trained, as ``PruningPlan.values``."""
        keep = self._work.keep(kept)
        return {r.site.full_name: _kept_part(r, keep) for r in self._touched.values()}

    def _problem(self, group: ChannelGroup, readers: Sequence[Reader], keep: Keep) -> Problem:
        weight = self._settings.weight
        wanted, head = self._head(readers) if weight else ((), None)
        outputs = {
            reader.path: np.ones(reader.site.variable.shape[-1], bool)
            if (labels := reader.site.labels[-1]) is None
            else keep(labels)
            for reader in readers
        }
        return Problem(
            self._base, self._program, readers, group, outputs, wanted, head, weight, self._batches
        )

    def _head(self, readers: Sequence[Reader]) -> tuple[Sequence[int], Head]:
        """The first loss behind the readers, and the tensors that it takes."""
        # The numbers of both copies' tensors are the same, their keys are not.
        refs = [site.ref for site in self._heads.sites]
        numbers = [self._base.numbers[ref.key] for ref in refs]
        place = first_behind(self._program, numbers, readers)
        if place == len(numbers):
            return self._program.outputs, self._last
        return [numbers[place]], _loss_of(self._heads.heads[place])

    def _last(self, tensors: Sequence[Any], y: Any) -> Any:
        import tensorflow as tf

        return tf.cast(tf.reduce_mean(self._loss(y, tensors[0])), tf.float32)


def _loss_of(head: Any) -> Callable[[Sequence[Any], Any], Any]:
    return lambda tensors, y: cross_entropy(y, head(tensors[0], training=False))


def _kept_part(reader: Reader, keep: Keep) -> Any:
    site = reader.site
    value = np.asarray(site.variable)
    index = [
        np.arange(size) if labels is None else np.flatnonzero(keep(labels))
        for size, labels in zip(value.shape, site.labels, strict=True)
    ]
    name = value.dtype.name
    return value[np.ix_(*index)].astype(name if name in ("float16", "float64") else "float32")


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not np.isfinite(value) or not least <= value < most:
        raise ArgumentError(
            f"Expected {name} as a number from {least:g} to below {most:g}. Received: {value!r}."
        )
