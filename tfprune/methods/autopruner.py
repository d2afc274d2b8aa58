r"""AutoPruner: gates behind the activations learn which channels stay while the network trains.

Reference: J.-H. Luo and J. Wu, "AutoPruner: An End-to-End Trainable Filter Pruning Method for
Efficient Deep Model Inference", Pattern Recognition 107:107461, 2020, arXiv:1805.08941. Gate, loss
and adaptive rules are read in the authors' code; the paper's text was not at hand. Sheet B4.

For each channel group a gate looks at the tensor X through which the group is first read, averaged
over the batch and pooled, and gives one value per channel,

.. math:: v = \sigma\bigl(\alpha\,(W^\top \bar x + b)\bigr),

which multiplies the channel wherever it is read. W and b train together with the network's weights,
on

.. math:: L + \sum_l \lambda_l \Bigl( \frac{\lVert v_l \rVert_1}{C_l} - r_l \Bigr)^2,

r being the fraction of channels to *keep*. The slope :math:`\alpha` grows as training goes on, so
that the values drift to 0 or 1. Every ``every`` steps, for each gate:

- its *code* is the average of 1[v > 0.5] since the last; a channel of more than 0.5 stays;
- :math:`\lambda = 100\,|r - kept|`, kept being the fraction that stays;
- the rest of the slope's schedule is raised by ``alpha_raise`` if, after ``grace`` steps, less than
  0.9 of the values are below 0.2 or above 0.8;
- and by as much again if the fraction that goes is at least a limit, which starts at 0.95 and falls
  by 0.05 with each time, though not below 1 - r.

In inference mode the gates multiply with the stored code, 0 or 1: what is validated is the network
that would be left. At the end of every epoch the code is made that of the plan
(:class:`StoreChoice`).

*What equals what.* A channel of code 0 is zero wherever it is read, which is what removal makes of
it; one of code 1 is untouched. So in inference mode the network with gates, its code being the
plan's, computes what the finished one does, up to rounding: ``StructuredResult.difference`` is
rounding after :meth:`AutoPruner.run`. It does not say what binarisation itself cost. For that look
at the training loss against the validation loss, and at ``decided`` in the logs: values that are
neither 0 nor 1 at the end were parts of the network that training saw.

*How much goes.* With ``keep`` r is the same everywhere, and the code decides, which leaves about
this fraction. With ``macs`` or ``pruning_ratio`` the uniform allocation of :func:`tfprune.plan`
says beforehand how many channels each group keeps; that makes r for each, and in the end exactly as
many stay: those with code 1 first, and among equals those of larger mean v.

*Plans* are made for the network without gates, which has the names and groups of the given one: a
plan can be applied to it, saved, and carried to another. Its groups are those of the network with
gates, so that MACs and widths under a plan can be read from the graph of either.

Groups that are left alone, see :meth:`AutoPruner.left`: those read inside of a layer (heads of
attention, states of recurrent layers) or across whose channels statistics are taken (layer and
group normalisation), as zeros are no removal there; those read in several models, in one that is
called more than once or in a nested sequential one, which have no room for a gate; those of which
the first layer that reads them does not see all channels equally often.

Departures.

- The gate looks at what the first reader gets: behind a pooling layer, if there is one in between.
  Theirs stands right behind the activation.
- Maps of more than 14x14 pixels are averaged to 7x7 after the maximum pooling: W would have 51
  million entries in VGG-16's first layer. ``map_size`` is the side. Behind a flatten, the
  positions of a channel are averaged to 49 at most, without a maximum.
- All gates train at once, as in the authors' code for MobileNetV2; for VGG and ResNet they go layer
  by layer and stage by stage, which ``ignore`` and several runs do. Each gate has its own lambda,
  and its own additions to alpha.
- A depthwise convolution counts as a reader, so that v multiplies its input and, before the layer
  that reads the channel, its output, as in their MobileNetV2. A squared v is no different at 0 and
  1. Their rule for that network's last epoch is left out.
- Coupled channels (a residual stream) have one gate; theirs have none.
- A code of exactly 0.5 is 0; theirs is 0.5.
- On several devices each has its own v, as theirs, but code, lambda and alpha are averages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import keras
import numpy as np

from tfprune import allocation
from tfprune.arguments import check_whole
from tfprune.cost import CostModel
from tfprune.criteria.gates import readings_of
from tfprune.criteria.scores import Scores
from tfprune.errors import ArgumentError, ModelError
from tfprune.graph import ChannelGraph, ChannelGroup, analyse
from tfprune.graph.copying import copy_model
from tfprune.graph.plan import PruningPlan
from tfprune.graph.trace import Call, ends_of, framework_of, is_model, is_plain, is_sequential
from tfprune.layers.batch_gate import (
    GateRules,
    GateSite,
    Place,
    gates_of,
    with_gates,
    without_gates,
)
from tfprune.layers.distribution import strategy_scope
from tfprune.layers.method_model import MethodModel, require_tensorflow
from tfprune.layers.updates import MethodUpdate
from tfprune.methods.structured import StructuredMethod
from tfprune.surgery import apply


@dataclass(frozen=True)
class AutoPruner(StructuredMethod):
    """Trains gates together with the network, and removes the channels whose gates are shut.

    Use large batches: a gate looks at their average.

    Args:
        alpha_steps: training steps over which alpha grows linearly from one end to the other. The
            authors let it grow over the whole training (5 epochs, MobileNetV2).
        keep: r, the fraction of channels to keep, about; give it, ``macs`` or ``pruning_ratio``.
        alpha: alpha at first and from ``alpha_steps`` on. The authors have 0.1 to 100 for
            MobileNetV2, 1 to 100 for ResNet-50, 0.1 to 2 for VGG-16.
        alpha_every: alpha changes once in so many steps; theirs 1, 100 and 100.
        alpha_raise: what the adaptive rules add to alpha each time; 0 for never. Theirs: 1 for
            ResNet-50, 0.1 for VGG-16.
        grace: steps before undecided values raise alpha; ``None`` for an eighth of
            ``alpha_steps``, as in their VGG-16.
        penalty: lambda, at first if it is adaptive.
        adaptive_penalty: whether lambda is set anew with every code, as for VGG and ResNet, or
            stays, as for MobileNetV2.
        every: training steps from one code to the next.
        map_size: longest side of the pooled map that a gate sees. A gate has about C^2 map_size^2
            weights for C channels; 1 for the mean of the whole map.
        seed: of the gates' first weights.
        macs, pruning_ratio, round_to, min_channels, ignore: see :class:`StructuredMethod`.

    Raises:
        ArgumentError: none or several of ``keep``, ``macs`` and ``pruning_ratio``, or a value out
            of range.
    """

    alpha_steps: int
    keep: float | None = None
    alpha: tuple[float, float] = (0.1, 100.0)
    alpha_every: int = 1
    alpha_raise: float = 1.0
    grace: int | None = None
    penalty: float = 10.0
    adaptive_penalty: bool = True
    every: int = 20
    map_size: int = 7
    seed: int = 0

    order: ClassVar[str] = "uniform"
    # Scores are the bit of the code plus the mean of v.
    threshold: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [self.keep, self.macs, self.pruning_ratio]
        if sum(value is not None for value in given) != 1:
            raise ArgumentError(
                "Expected one of keep, macs and pruning_ratio. Received: "
                f"{'several' if any(value is not None for value in given) else 'none'}."
            )
        if self.keep is not None and not 0 < self.keep < 1:
            raise ArgumentError(f"Expected keep between 0 and 1. Received: {self.keep!r}.")
        for name in ("alpha_steps", "alpha_every", "every", "map_size"):
            check_whole(name, getattr(self, name), 1)
        if self.grace is not None:
            check_whole("grace", self.grace, 0)
        check_whole("seed", self.seed, 0)
        if len(self.alpha) != 2 or not 0 < self.alpha[0] <= self.alpha[1] < np.inf:
            raise ArgumentError(
                "Expected alpha as two positive numbers, the second not smaller. Received: "
                f"{self.alpha!r}."
            )
        for name in ("alpha_raise", "penalty"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ArgumentError(
                    f"Expected {name} as a number from 0. Received: {getattr(self, name)!r}."
                )

    def update(self) -> MethodUpdate:
        """Nothing but figures for the logs: the gates are layers with a loss."""
        return GateFigures()

    def left(self, model: Any) -> dict[str, str]:
        """The groups that could be pruned but get no gate: name -> the reason in words.

        Args:
            model: without gates.
        """
        return _sites(analyse(_functional(model)))[1]

    def prepare(self, model: Any) -> Any:
        """A copy of the model with gates; a sequential model becomes a functional one.

        Raises:
            ModelError: gates would stand in a part that is frozen, or change the order in which
                channels are found.
            And what :class:`StructuredMethod` raises.
        """
        if isinstance(model, MethodModel):
            return super().prepare(model)
        require_tensorflow()
        graph = analyse(_functional(model))
        keep = self.targets(graph)
        sites = _sites(graph)[0]
        if not keep:
            raise ArgumentError(
                f"Expected channels that AutoPruner can act on. Received: {model.name!r}, which "
                "has none. print(tfprune.analyse(model)) says what can be pruned, and "
                "AutoPruner.left(model) what has no room for gates."
            )
        prepared = super().prepare(
            with_gates(
                graph,
                {name: sites[name] for name in keep},
                keep,
                rules=self.rules(),
                map_size=self.map_size,
                seed=self.seed,
            )
        )
        training = {id(variable) for variable in prepared.trainable_variables}
        for name, gate in gates_of(prepared).items():
            if id(gate.kernel) not in training:
                raise ModelError(
                    f"Expected channels of layers that train. Received: {name!r} of "
                    f"{model.name!r}, which is read in a model with trainable=False, where a gate "
                    "would not learn. Set trainable=True, or name the layer in ignore."
                )
        if _signature(graph) != _signature(analyse(prepared)):
            raise ModelError(
                "Expected a model whose channels are found in the same order with gates in it. "
                f"Received: {model.name!r}, where branches that meet change places. Name their "
                "layers in ignore."
            )
        return prepared

    def targets(self, graph: ChannelGraph) -> dict[str, float]:
        """r by the name of each group that gets a gate.

        Args:
            graph: of the model without gates.

        Raises:
            ArgumentError: ``ignore`` names nothing.
            BudgetError: the MACs are out of reach.
        """
        allocation.check_patterns(graph, self.ignore, "ignore")
        served = _sites(graph)[0].keys()
        equal = Scores({g.name: np.full(g.width, 2.0) for g in graph.prunable}, "any")
        if self.keep is None:
            plan = self._decide(graph, equal, served)
            return {name: len(kept) / graph[name].width for name, kept in plan.kept.items()}
        chains = allocation.chains(graph, equal, self._constraints(), CostModel(graph))
        names = [chain.group.name for chain in chains if len(chain.widths) > 1]
        return {name: self.keep for name in names if name in served}

    def rules(self) -> GateRules:
        """How slope and penalty change."""
        return GateRules(
            alpha=(self.alpha[0], self.alpha[1]),
            alpha_steps=self.alpha_steps,
            alpha_every=self.alpha_every,
            alpha_raise=self.alpha_raise,
            grace=self.alpha_steps // 8 if self.grace is None else self.grace,
            penalty=self.penalty,
            adaptive_penalty=self.adaptive_penalty,
            every=self.every,
        )

    def callbacks(self) -> list[Any]:
        """What writes the logs, then what stores the plan's code."""
        return [*super().callbacks(), StoreChoice(self)]

    def scores(self, graph: ChannelGraph) -> Scores:
        """1 for channels that the code keeps, plus the mean of v; 2 for those without a gate."""
        gates = gates_of(graph.model)
        values = {group.name: np.full(group.width, 2.0) for group in graph.prunable}
        for name, gate in gates.items():
            code, mean = gate.judged()
            values[name] = (code > 0.5) + mean
        return Scores(values, "gate (AutoPruner)")

    def decide(self, graph: ChannelGraph, scores: Scores) -> PruningPlan:
        """The channels that go by these scores, for the model with gates."""
        return self._decide(graph, scores, gates_of(graph.model).keys())

    def _decide(self, graph: ChannelGraph, scores: Scores, served: Collection[str]) -> PruningPlan:
        """As in the frame, where all groups stay whole that are not served by a gate."""
        rest = [group.name for group in graph.prunable if group.name not in served]
        method = replace(self, ignore=(*self.ignore, *rest))
        plan = StructuredMethod.decide(method, graph, scores)
        return plan.noted({"method": self.describe()})

    def choice(self, graph: ChannelGraph) -> PruningPlan:
        """Which channels would go if training ended now; the plan is for the model without gates.

        Args:
            graph: of a model from :meth:`prepare`.

        Raises:
            BudgetError: the MACs are out of reach.
        """
        plan = self.decide(graph, self.scores(graph))
        return PruningPlan.of(analyse(without_gates(graph.model)), plan.kept, plan.notes)

    def plan(self, model: Any) -> PruningPlan:
        """What would be done if training ended now, for the model without gates.

        Args:
            model: from :meth:`prepare`, trained, or its analysed graph.

        Raises:
            ModelError: the gates have never seen a batch.
            BudgetError: the MACs are out of reach.
        """
        graph = model if isinstance(model, ChannelGraph) else analyse(model)
        if not any(gate.steps_made for gate in gates_of(graph.model).values()):
            raise ModelError(
                "Expected a model whose gates were trained. Received: "
                f"{graph.model.name!r}, which has made no training step."
            )
        return super().plan(graph)

    def carried_out(self, model: Any, plan: PruningPlan) -> Any:
        """The smaller model, without gates."""
        return apply(without_gates(model), plan)


@keras.saving.register_keras_serializable(package="tfprune")
class GateFigures(MethodUpdate):
    """Changes nothing in a training step; says how far the gates are."""

    def bind(self, graph: ChannelGraph) -> None:
        """Finds the gates."""
        self.hold(gates=list(gates_of(graph.model).values()))

    def figures(self) -> Mapping[str, float]:
        """Means over gates or channels.

        ``alpha`` and ``gate_penalty`` (lambda); ``decided``: the share of mean values below 0.2 or
        above 0.8; ``kept_by_code``: the share of channels that the last code keeps.
        """
        gates = self.held.gates
        judged = [gate.judged() for gate in gates]
        code, mean = (np.concatenate([pair[i] for pair in judged]) for i in (0, 1))
        return {
            "alpha": float(np.mean([gate.alpha for gate in gates])),
            "gate_penalty": float(np.mean([np.asarray(gate.state.penalty) for gate in gates])),
            "decided": float(np.mean((mean < 0.2) | (mean > 0.8))),
            "kept_by_code": float(np.mean(code > 0.5)),
        }


class StoreChoice(keras.callbacks.Callback):  # type: ignore[misc]
    """Makes the stored code that of the plan, at the end of every epoch.

    The model then computes in inference mode what the finished one would. Training does not read
    the code, and the next one takes its place.

    Args:
        method: whose model is trained.
    """

    def __init__(self, method: AutoPruner) -> None:
        super().__init__()
        self._method = method
        self._graph: ChannelGraph | None = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stores it."""
        if self._graph is None or self._graph.model is not self.model:
            self._graph = analyse(self.model)
        kept = self._method.decide(self._graph, self._method.scores(self._graph)).kept
        with strategy_scope(self.model):
            for name, gate in gates_of(self.model).items():
                code = np.ones(self._graph[name].width, np.float32)
                if name in kept:
                    code[:] = 0
                    code[list(kept[name])] = 1
                gate.state.code.assign(code)


def _functional(model: Any) -> Any:
    """A sequential model as a functional one, a copy; others as they are."""
    if framework_of(model) == "keras" and is_sequential(model) and is_plain(model):
        copy = copy_model(model)
        return keras.Model(*ends_of(copy), name=model.name)
    return model


def _sites(graph: ChannelGraph) -> tuple[dict[str, GateSite], dict[str, str]]:
    """Where gates can stand, by group; and why the other prunable groups have none."""
    readings, inside = readings_of(graph)
    order: dict[int, int] = {}
    home: dict[int, int] = {}
    for key, traced in graph.record.traces.items():
        for call in traced.calls:
            order[id(call)] = len(order)
            home[id(call)] = key
    called = Counter(
        id(call.op)
        for traced in graph.record.traces.values()
        for call in traced.calls
        if is_model(call.op)
    )
    closed = {
        key
        for key, traced in graph.record.traces.items()
        if called[key] > 1 or (traced.model is not graph.model and is_sequential(traced.model))
    }
    places: dict[str, dict[Any, Place]] = {}
    for call, number, axis, names in [
        *((r.call, r.number, r.axis, r.groups) for r in readings),
        *_depthwise(graph),
    ]:
        for name in names:
            place = _place(graph, graph[name], call, number, axis)
            places.setdefault(name, {}).setdefault((id(call), place.ref.key, axis), place)
    sites: dict[str, GateSite] = {}
    left: dict[str, str] = {}
    for group in graph.prunable:
        found = sorted(places.get(group.name, {}).values(), key=lambda p: order[id(p.call)])
        homes = {home[id(place.call)] for place in found}
        reason = ""
        if group.name in inside or not found:
            reason = "it is read inside of a layer"
        elif not group.exact:
            reason = f"statistics are taken across its channels: {group.inexact_reason}"
        elif len(homes) > 1:
            reason = "it is read in several nested models"
        elif homes & closed:
            reason = "it is read in a nested model that is sequential or called more than once"
        else:
            seen = np.bincount(
                found[0].channels[found[0].channels >= 0], minlength=group.width
            )  # fmt: skip
            if seen.min() != seen.max():
                reason = f"{found[0].call.op.name!r}, the first to read it, sees it in part"
        if reason:
            left[group.name] = reason
        else:
            sites[group.name] = GateSite(group.name, group.width, tuple(found))
    return sites, left


def _place(graph: ChannelGraph, group: ChannelGroup, call: Call, number: int, axis: int) -> Place:
    ref = call.inputs[number]
    labels: Any = graph.record.tensors[ref.key][axis]
    channels = graph.channels(labels)
    mine = graph.group_of[channels] == list(graph).index(group)
    return Place(call, ref, axis, np.where(mine, graph.index_of[channels], -1))


def _depthwise(graph: ChannelGraph) -> list[tuple[Call, int, int, tuple[str, ...]]]:
    """Calls of depthwise convolutions: (call, input, axis, groups)."""
    found = []
    kernels = {
        member.path: member
        for group in graph.prunable
        for member in group.followers
        if member.weight == "kernel"
    }
    for traced in graph.record.traces.values():
        for call in traced.calls:
            if is_model(call.op) or graph.record.paths.get(id(call.op), "") not in kernels:
                continue
            for axis, labels in enumerate(graph.record.tensors[call.inputs[0].key]):
                if labels is None:
                    continue
                owners = np.unique(graph.group_of[graph.channels(labels)])
                groups = [graph.groups[number] for number in owners if number >= 0]
                names = tuple(group.name for group in groups if group.prunable)
                found.append((call, 0, axis, names))
    return found


def _signature(graph: ChannelGraph) -> list[Any]:
    """The groups, with what each channel's producers are."""
    return [
        (
            group.name,
            group.prunable,
            [
                (m.full_name, m.axis, m.positions.tolist(), m.channels.tolist())
                for m in group.producers
            ],
        )
        for group in graph
    ]
