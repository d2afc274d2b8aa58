"""What training-time methods for channels share: they end in scores, a plan and a smaller model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import keras
import numpy as np

from tfprune import allocation
from tfprune.allocation import Budget, Constraints
from tfprune.allocation.steps import matches
from tfprune.arguments import check_whole
from tfprune.batches import iterate
from tfprune.cost import CostModel
from tfprune.criteria.scores import Scores
from tfprune.errors import ArgumentError, ModelError
from tfprune.graph import ChannelGraph, ChannelGroup, analyse
from tfprune.graph.blocks import removal, weights_gone
from tfprune.graph.copying import copy_model
from tfprune.graph.evaluate import flatten
from tfprune.graph.masking import predict_on
from tfprune.graph.plan import PruningPlan
from tfprune.layers import Masks
from tfprune.layers.method_model import MethodModel, require_tensorflow
from tfprune.layers.updates import MethodUpdate
from tfprune.methods.method import Method, MethodResult
from tfprune.protocols import fine_tune
from tfprune.pruning import plan as plan_of
from tfprune.surgery import apply


@dataclass(frozen=True)
class StructuredResult(MethodResult):
    """What :meth:`StructuredMethod.run` returns.

    Attributes:
        plan: what was removed.
        macs: of the finished model, as a fraction of the given model's.
        difference: between the trained model's outputs and the finished model's on one batch of
            training data, in inference mode: the largest, over the largest output.
        trained: the model as it was trained, before anything was removed.
    """

    plan: PruningPlan
    macs: float
    difference: float
    trained: Any = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class StructuredMethod(Method):
    """A method that finds out while it trains which channels to remove.

    How much goes is either asked for, by ``macs`` or ``pruning_ratio``: the channels that training
    has left worth least go first, wherever they are. Or the method's own rule decides, which each
    method tells.

    Args:
        macs: MACs that are left, as a fraction of the model's (``0.5``) or a number.
        pruning_ratio: the fraction of all channels to remove, of all groups together.
        round_to: kept widths are multiples of this, see :func:`tfprune.plan`.
        min_channels: fewest channels that a group keeps.
        ignore: names or patterns of groups, or of layers whose output channels all stay.

    Raises:
        ArgumentError: both ``macs`` and ``pruning_ratio``, or a value out of range.
    """

    macs: float | int | None = None
    pruning_ratio: float | None = None
    round_to: int | str = 1
    min_channels: int = 1
    ignore: Sequence[str] = ()

    changes_masks: ClassVar[bool] = True

    threshold: ClassVar[float] = 0.0
    """Where neither is asked for: channels whose scores are not above this go."""

    def __post_init__(self) -> None:
        if self.macs is not None and self.pruning_ratio is not None:
            raise ArgumentError("Expected macs or pruning_ratio. Received: both.")
        if self.pruning_ratio is not None:
            allocation.check_ratio(self.pruning_ratio)
        Budget(self.macs)
        self._constraints()

    order: ClassVar[str] = "global"
    """In which order channels go, where something is asked for."""

    @abstractmethod
    def update(self) -> MethodUpdate:
        """What the method does in every training step; not bound to a model yet."""

    @abstractmethod
    def scores(self, graph: ChannelGraph) -> Scores:
        """What training has left every channel worth; larger means keep.

        Args:
            graph: of a model from :meth:`prepare`, trained.
        """

    def ratio(self, graph: ChannelGraph) -> float | Mapping[str, float] | None:
        """The ``pruning_ratio`` for :func:`tfprune.plan`."""
        return self.pruning_ratio

    def acts_on(self, group: ChannelGroup) -> bool:
        """Whether the method can judge this group's channels; the others all stay."""
        return True

    def values(self, graph: ChannelGraph, plan: PruningPlan) -> Mapping[str, Any]:
        """New values for weights of the smaller model (``PruningPlan.values``)."""
        return {}

    def prepare(self, model: Any) -> Any:
        """A copy of the model that trains by this method.

        Raises:
            ModelError: no built functional or sequential Keras 3 model on TensorFlow.
            ArgumentError: ``ignore`` names nothing, or the model has nothing that the method can
                act on.
            BudgetError: the MACs are out of reach.
        """
        require_tensorflow()
        if isinstance(model, MethodModel):
            raise ModelError(
                "Expected a plain model. Received one that trains by a method already. Finish that "
                "method first."
            )
        prepared = MethodModel.of(model, self.update())
        self.check(analyse(prepared))
        return prepared

    def check(self, graph: ChannelGraph) -> None:
        """Raises what :meth:`prepare` raises, before any training.

        Args:
            graph: of the prepared model.
        """
        if not any(self.acts_on(group) for group in graph.prunable):
            raise ArgumentError(
                f"Expected channels that {type(self).__name__} can act on. Received: "
                f"{graph.model.name!r}, which has none. print(tfprune.analyse(model)) says what "
                "can be pruned."
            )
        self.decide(graph, Scores({g.name: np.ones(g.width) for g in graph.prunable}, "any"))

    def callbacks(self) -> list[Any]:
        """What writes to the logs of every epoch how the structure emerges."""
        return [StructureLog(self)]

    def choice(self, graph: ChannelGraph) -> PruningPlan:
        """Which channels would go if training ended now: the plan without new values.

        Args:
            graph: of a model from :meth:`prepare`.

        Raises:
            BudgetError: the MACs are out of reach.
        """
        return self.decide(graph, self.scores(graph))

    def plan(self, model: Any) -> PruningPlan:
        """What would be done if training ended now.

        Args:
            model: from :meth:`prepare`, or its analysed graph.

        Raises:
            BudgetError: the MACs are out of reach.
        """
        graph = model if isinstance(model, ChannelGraph) else analyse(model)
        plan = self.choice(graph)
        values = self.values(graph, plan)
        return plan.with_values(graph, values) if values else plan

    def finish(self, model: Any, data: Any = None, *, structured: bool = True) -> Any:
        """The smaller model, a new uncompiled one without anything of the method in it.

        It is a functional model, also where the given one was sequential.

        Args:
            model: from :meth:`prepare`, trained. It stays as it is.
            data: training data, for methods that look at data at the end.
            structured: not used; channels are always removed for real.
        """
        return self.carried_out(model, self.plan(model))

    def carried_out(self, model: Any, plan: PruningPlan) -> Any:
        """The smaller model that a plan from :meth:`plan` makes; see :meth:`finish`."""
        return apply(copy_model(model), plan)

    def run(
        self, model: Any, train: Any, validation: Any = None, *, epochs: int, **options: Any
    ) -> StructuredResult:
        """Prepares, trains with :func:`tfprune.fine_tune`, and finishes.

        Fine-tune the result afterwards where the paper does.

        Args:
            model, train, validation, epochs, **options: as for :meth:`Method.run`.

        Raises:
            What :meth:`prepare` and ``fine_tune`` raise.
        """
        options = self.fit_options(epochs, dict(options))
        prepared = self.prepare(model)
        callbacks = [*self.callbacks(), *options.pop("callbacks", ())]
        record = fine_tune(
            prepared, train, validation, epochs=epochs, callbacks=callbacks, **options
        )
        graph = analyse(prepared)
        plan = self.plan(graph)
        finished = self.carried_out(prepared, plan)
        return StructuredResult(
            model=finished,
            record=record,
            sparsity=Masks.of_zeros(finished).sparsity,
            plan=plan,
            macs=macs_left(graph, plan),
            difference=difference(prepared, finished, train),
            trained=prepared,
        )

    def decide(self, graph: ChannelGraph, scores: Scores) -> PruningPlan:
        """The channels that go by these scores: as many as are asked for, or by the threshold."""
        allocation.check_patterns(graph, self.ignore, "ignore")
        left = [group.name for group in graph.prunable if not self.acts_on(group)]
        constraints = replace(self._constraints(), ignore=[*self.ignore, *left])
        notes = {"method": self.describe()}
        if self.macs is not None or self.pruning_ratio is not None:
            return plan_of(
                graph,
                self.ratio(graph),
                macs=self.macs,
                criterion=lambda _: scores,
                order=self.order,
                round_to=constraints.round_to,
                min_channels=constraints.min_channels,
                ignore=constraints.ignore,
            ).noted(notes)
        chain_list = allocation.chains(graph, scores, constraints, CostModel(graph))
        return PruningPlan.of(graph, allocation.above(chain_list, self.threshold), notes)

    def describe(self) -> str:
        """Name and hyper-parameters, for the plan's notes."""
        shown = [
            f"{item.name}={getattr(self, item.name)!r}"
            for item in fields(self)
            if item.repr and getattr(self, item.name) != item.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _constraints(self) -> Constraints:
        check_whole("min_channels", self.min_channels, 1)
        return Constraints(self.round_to, self.min_channels, 1.0, self.ignore)


class StructureLog(keras.callbacks.Callback):  # type: ignore[misc]
    """Writes to the logs at the end of every epoch what would be left if training ended there.

    Entries: ``macs`` and ``channels``, fractions of the whole model's; ``width/<group>`` for every
    group that can be pruned; and the method's own figures. ``History``, ``CSVLogger``,
    ``TensorBoard`` and ``fine_tune``'s record and checkpoint have them from there, like any metric.

    Args:
        method: whose model is trained.
    """

    def __init__(self, method: StructuredMethod) -> None:
        super().__init__()
        self._method = method
        self._graph: ChannelGraph | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the entries of this epoch."""
        if logs is None:
            return
        if self._graph is None or self._graph.model is not self.model:
            self._graph = analyse(self.model)
        graph = self._graph
        plan = self._method.choice(graph)
        widths = widths_left(graph, plan)
        whole = sum(group.width for group in graph.prunable)
        logs["macs"] = macs_left(graph, plan)
        logs["channels"] = sum(widths.values()) / max(whole, 1)
        logs.update({f"width/{name}": float(width) for name, width in widths.items()})
        logs.update(self.model.update.figures())


def widths_left(graph: ChannelGraph, plan: PruningPlan) -> dict[str, int]:
    """Group name -> channels after a plan; 0 for a group inside a block that goes."""
    gone = weights_gone(graph, removal(graph, plan.blocks))
    return {
        group.name: 0
        if all(id(member.variable) in gone for member in group.producers)
        else len(plan.kept.get(group.name, range(group.width)))
        for group in graph.prunable
    }


def macs_left(graph: ChannelGraph, plan: PruningPlan) -> float:
    """The MACs after a plan, as a fraction of the model's.

    Raises:
        ModelError: the MACs of the model are not a number.
    """
    whole, left = CostModel(graph), CostModel(graph, plan.blocks)
    return left.macs(graph.keep_mask(plan.kept)) / whole.macs(whole.full_mask())


def difference(before: Any, after: Any, data: Any) -> float:
    """The largest difference of outputs on one batch of data, over the largest output."""
    data = data(0) if callable(data) else data
    shape = getattr(before, "input_shape", None)
    ((x, _),) = iterate(data, batch_size=64, limit=1, input_shape=shape)
    batch = [np.asarray(part) for part in flatten(x)]
    first, second = (
        [np.asarray(y, np.float64) for y in predict_on(model, batch)] for model in (before, after)
    )
    largest = max(float(np.max(np.abs(y), initial=0.0)) for y in first)
    worst = max(
        float(np.max(np.abs(a - b), initial=0.0)) for a, b in zip(first, second, strict=True)
    )
    return worst / largest if largest else worst


def penalised_groups(graph: ChannelGraph, ignore: Sequence[str]) -> list[ChannelGroup]:
    """The groups that may lose channels and that no pattern of ``ignore`` names."""
    return [
        group for group in graph.prunable if not any(matches(group, pattern) for pattern in ignore)
    ]
