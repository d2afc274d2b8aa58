r"""ISTA: proximal steps take scales of batch normalisation to zero; constant channels are absorbed.

Reference: J. Ye, X. Lu, Z. Lin and J. Z. Wang, "Rethinking the Smaller-Norm-Less-Informative
Assumption in Channel Pruning of Convolution Layers", ICLR 2018, arXiv:1802.00124. The algorithm is
read in the paper, but for the formula of the penalty, which is from the authors' code and recalled.
Sheet B5.

A norm of kernels says nothing in front of batch normalisation, which undoes any factor on them. So
only scales :math:`\gamma` are penalised, by :math:`\rho \sum_l \lambda_l \lVert \gamma_l \rVert_1`,
and they are updated by soft thresholding, which makes them exactly zero:

.. math::
    \gamma \leftarrow \operatorname{prox}_{\mu \rho \lambda_l}(\gamma - \mu\,\partial L / \partial
    \gamma), \qquad \operatorname{prox}_\eta(x) = \operatorname{sign}(x) \max(|x| - \eta, 0),

with the step's learning rate :math:`\mu`, without momentum or weight decay: momentum would take
zeros away from zero again, and an adaptive optimizer would scale gradient and threshold unlike. All
other weights are the optimizer's.

*The penalty of a channel* is the memory that it takes, over the size of the input image:

.. math::
    \lambda_l = \frac{1}{I_w I_h} \Bigl[ k^l_w k^l_h c^{l-1}
        + \sum_{l' \in T(l)} k^{l'}_w k^{l'}_h c^{l'} + I^l_w I^l_h \Bigr]:

its own filter, its slices in the kernels T(l) that read it, and its map. For coupled channels (a
residual stream, a depthwise convolution) all filters, slices and maps behind scales are added up,
and shared out evenly among the scales: the channel can go when all are zero, and only the sum of
their penalties buys that. With one scale that is the formula above. Slices behind a flatten are as
large as they are. An "image" is all of the input but its channels: T steps of a sequence, 1 for
rows of features, the largest of several inputs.

*Rescaling*, for networks that are trained already: gamma and beta are multiplied by ``alpha``, the
slices that read these channels divided by it, and both undone at the end
(:mod:`tfprune.methods.rescaling`). The function stays as it is, but scales are nearer to zero for
the same penalty. The paper wants :math:`|\alpha\gamma| \approx 100 \mu \rho \lambda_l`. It works
where everything in between is positively homogeneous; other groups are left as they are, with a
warning.

*What equals what.* A channel whose scales are all zero is f(beta) wherever it is read. That is
absorbed into biases, or moving means of batch normalisation (:mod:`tfprune.surgery.constants`).
Without ``macs`` or ``pruning_ratio`` only such channels go. Then the finished model equals the
trained one in inference mode, up to float32 rounding, if every layer that reads lost channels is
dense, has 1x1 kernels or no padding; the plan's note ``constants`` says whether. With padding, the
border sees zeros in the one and constants in the other: no bound, ``StructuredResult.difference``
measures it, and the paper fine-tunes.

With ``macs`` or ``pruning_ratio`` the smallest scales go even if they are not zero yet. They are
taken as zero: the finished model equals the trained one with those scales at zero, on the same
terms; what that changes is in ``difference``.

Departures.

- All channels can go that are read behind scales only; in the authors' networks the residual stream
  and the first layer are left out. ``ignore`` leaves out layers; they are not penalised then.
- A layer keeps ``min_channels``.
- Penalties and regularisers of the user's own on gamma are part of L.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from tfprune.allocation.steps import matches
from tfprune.criteria.scores import Scores, Vector
from tfprune.errors import ArgumentError, ModelError
from tfprune.graph import ChannelGraph, ChannelGroup, analyse
from tfprune.graph.copying import copy_model
from tfprune.graph.plan import PruningPlan
from tfprune.layers.per_channel import Axis
from tfprune.layers.updates import Gradients, MethodUpdate
from tfprune.methods.rescaling import rescale, scale_flow
from tfprune.methods.slimming import largest_scale, scales_of
from tfprune.methods.structured import StructuredMethod
from tfprune.surgery import apply
from tfprune.surgery.constants import Absorption, absorbed


@dataclass(frozen=True)
class ISTA(StructuredMethod):
    """Trains scales of batch normalisation by proximal steps, and removes channels at zero.

    Choose ``penalty`` so that the penalty (``scale_penalty`` in the logs) is about as large as the
    loss at first. If it falls steadily but no scale reaches zero, lower ``alpha``; if all do, lower
    ``penalty``; if the loss stalls, lower either or the learning rate (the paper's advice).

    Args:
        penalty: rho. The paper has 0.001 to 0.01 for ResNet-20 on CIFAR-10 from scratch at a
            learning rate of 0.1, and 0.1 for a trained ResNet-101 on ImageNet at 0.001.
        alpha: of the rescaling; 1 leaves scales as they are, for trainings from scratch. The paper
            has 0.1, 0.01 and 0.001 for trained networks.
        macs, pruning_ratio, round_to, min_channels, ignore: see :class:`StructuredMethod`. Without
            ``macs`` and ``pruning_ratio`` channels go whose scales are exactly zero.

    Raises:
        ArgumentError: a value out of range.
    """

    penalty: float = 1e-3
    alpha: float = 1.0

    threshold: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("penalty", math.inf), ("alpha", 1.0)):
            value = getattr(self, name)
            if not np.isfinite(value) or not 0 < value <= most:
                upper = "" if most == math.inf else f" of at most {most:g}"
                raise ArgumentError(f"Expected a positive {name}{upper}. Received: {value!r}.")

    def update(self) -> MethodUpdate:
        """The scales' part of a training step."""
        return ProximalScales(self.penalty, self.alpha, self.ignore)

    def acts_on(self, group: ChannelGroup) -> bool:
        """Whether there is a batch normalisation with scales behind the group."""
        return bool(scales_of(group))

    def check(self, graph: ChannelGraph) -> None:
        """As :meth:`StructuredMethod.check`; and that scales decide over something."""
        if not any(flow.guarded for flow in scale_flow(graph).values()):
            raise ArgumentError(
                "Expected channels that are read behind scales of batch normalisation only. "
                f"Received: {graph.model.name!r}, which has none. Give BatchNormalization layers "
                "scale=True."
            )
        super().check(graph)

    def prepare(self, model: Any) -> Any:
        """A copy of the model that trains by this method, rescaled by ``alpha``.

        Raises:
            What :meth:`StructuredMethod.prepare` raises; ``ModelError`` for inputs of free size;
            ``ArgumentError`` if ``alpha`` is given and reaches no group.
        """
        prepared = super().prepare(model)
        if self.alpha != 1:
            flows = scale_flow(analyse(prepared))
            held = {name: flow.obstacle for name, flow in flows.items() if flow.obstacle}
            if len(held) == len(flows):
                raise ArgumentError(
                    f"Expected groups that can be rescaled by alpha. Received: {model.name!r}, "
                    f"which has none: {_listed(held)}. Leave alpha at 1."
                )
            if held:
                warnings.warn(
                    f"alpha={self.alpha:g} does not reach {len(held)} of {len(flows)} groups: "
                    f"{_listed(held)}. Their scales stay as they are.",
                    stacklevel=2,
                )
            rescale(flows.values(), self.alpha)
        return prepared

    def scores(self, graph: ChannelGraph) -> Scores:
        """The largest scale of every channel, as it is without ``alpha``."""
        found = largest_scale(graph)
        flows = scale_flow(graph)
        reached = {name for name, flow in flows.items() if not flow.obstacle}
        alpha = _alpha_of(graph.model)
        values = {n: found[n] / alpha if n in reached else found[n] for n in found}
        return Scores(values, found.criterion)

    def plan(self, model: Any) -> PruningPlan:
        """What would go if training ended now, with new biases and moving means.

        Args:
            model: from :meth:`prepare`, or its analysed graph.

        Raises:
            BudgetError: the MACs are out of reach.
        """
        graph = model if isinstance(model, ChannelGraph) else analyse(model)
        plan = self.decide(graph, self.scores(graph))
        found = self.absorption(graph, plan)
        return plan.with_values(graph, found.values).noted({"constants": str(found)})

    def absorption(self, graph: ChannelGraph, plan: PruningPlan) -> Absorption:
        """What lost channels contribute when their scales are zero, and where it goes."""
        with _silenced(graph, plan):
            return absorbed(graph, plan.kept)

    def values(self, graph: ChannelGraph, plan: PruningPlan) -> Mapping[str, Any]:
        """New biases and moving means, with what lost channels contributed."""
        return self.absorption(graph, plan).values

    def carried_out(self, model: Any, plan: PruningPlan) -> Any:
        """The smaller model, its scales as large as without ``alpha``."""
        copy, alpha = copy_model(model), _alpha_of(model)
        if alpha != 1:
            rescale(scale_flow(analyse(copy)).values(), 1 / alpha)
        return apply(copy, plan)

    def decide(self, graph: ChannelGraph, scores: Scores) -> PruningPlan:
        """Leaves groups alone that are read elsewhere than behind scales."""
        flows = scale_flow(graph)
        left = [name for name, flow in flows.items() if not flow.guarded]
        narrowed = replace(self, ignore=[*self.ignore, *left])
        plan = super(ISTA, narrowed).decide(graph, scores)
        return plan.noted({"method": self.describe()})


@keras.saving.register_keras_serializable(package="tfprune")
class ProximalScales(MethodUpdate):
    """Proximal gradient steps for scales of batch normalisation.

    Args:
        penalty: rho.
        alpha: by which the model was rescaled; it changes no step.
        ignore: patterns of groups whose scales are left to the optimizer.
    """

    def __init__(
        self, penalty: float, alpha: float = 1.0, ignore: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.penalty = penalty
        self.alpha = alpha
        self.ignore = list(ignore)

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {"penalty": self.penalty, "alpha": self.alpha, "ignore": list(self.ignore)}

    def bind(self, graph: ChannelGraph) -> None:
        """Finds the scales, and what each costs."""
        flows = scale_flow(graph)
        groups = [
            graph[name]
            for name, flow in flows.items()
            if flow.guarded and not any(matches(graph[name], pattern) for pattern in self.ignore)
        ]
        costs = channel_costs(graph, groups)
        found: dict[int, tuple[Any, Any]] = {}
        for group in groups:
            for member in scales_of(group):
                gamma = member.variable
                if gamma.trainable:
                    # Positions of groups that cannot go cost nothing.
                    _, weights = found.setdefault(
                        id(gamma), (gamma, np.zeros(gamma.shape, np.float32))
                    )
                    weights[member.positions] = costs[group.name]
        self.hold(scales=list(found.values()))

    @property
    def owned(self) -> Sequence[Any]:
        """The scales."""
        return [gamma for gamma, _ in self.held.scales]

    def update(self, gradients: Gradients, learning_rate: Any) -> None:
        """A gradient step, then soft thresholding."""
        for gamma, weights in self.held.scales:
            if id(gamma) not in gradients:
                continue
            rate = ops.cast(learning_rate, gamma.dtype)
            moved = gamma - rate * ops.cast(gradients[id(gamma)], gamma.dtype)
            shrink = rate * ops.convert_to_tensor(self.penalty * weights, gamma.dtype)
            gamma.assign(ops.sign(moved) * ops.maximum(ops.abs(moved) - shrink, 0))

    def figures(self) -> Mapping[str, float]:
        """The penalty's value, and the fraction of scales that are zero."""
        pairs = [(np.abs(np.asarray(gamma)), weights) for gamma, weights in self.held.scales]
        zeros = sum(int((value == 0).sum()) for value, _ in pairs)
        return {
            "scale_penalty": self.penalty * float(sum((v * w).sum() for v, w in pairs)),
            "zero_scales": zeros / max(1, sum(value.size for value, _ in pairs)),
        }


def channel_costs(graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> dict[str, float]:
    """Lambda of every group: what one of its scales is charged for, in images.

    Args:
        graph: the analysed model.
        groups: of this graph, with scales.

    Returns:
        Group name -> values in filters, slices and maps of one channel, over the size of the input
        and the number of the channel's scales.

    Raises:
        ModelError: an input or a map has a free size.
    """
    image = max(
        _positions(ref.shape, _channel_axis(graph, ref.shape)) for ref in graph.trace.inputs
    )
    maps = {member.path: 0 for group in groups for member in scales_of(group)}
    for traced in graph.record.traces.values():
        for call in traced.calls:
            path = graph.record.paths.get(id(call.op), "")
            if path in maps:
                maps[path] += _positions(call.outputs[0].shape, call.op.axis)
    result = {}
    for group in groups:
        kernels = sum(
            Axis(member, group.width).size
            for member in group.members
            if member.scored and member.weight != "gamma"
        )
        # Behind a flatten one channel has several scales in one weight.
        scales = [(m.path, len(m.positions) / group.width) for m in scales_of(group)]
        area = sum(maps[path] * count for path, count in scales)
        result[group.name] = (kernels + area) / (image * sum(count for _, count in scales))
    return result


def _positions(shape: Sequence[int | None], axis: Any) -> int:
    """The product of the sizes of a tensor without the batch and the channels."""
    (channels,) = [axis] if isinstance(axis, int) else list(axis)
    sizes = [size for number, size in enumerate(shape) if number not in (0, channels % len(shape))]
    if any(size is None for size in sizes):
        raise ModelError(
            f"Expected inputs and maps of a fixed size, by which channels are charged. Received: "
            f"one of shape {tuple(shape)}. Make the model with the size that it will have."
        )
    return math.prod(size for size in sizes if size is not None)


def _channel_axis(graph: ChannelGraph, shape: Sequence[int | None]) -> int:
    """The axis of an input's channels, by what the layers say."""
    formats = {getattr(op, "data_format", None) for op in graph.record.ops.values()}
    return 1 if len(shape) > 2 and "channels_first" in formats else len(shape) - 1


def _alpha_of(model: Any) -> float:
    """By how much a prepared model is rescaled."""
    return float(getattr(getattr(model, "update", None), "alpha", 1.0))


def _silenced(graph: ChannelGraph, plan: PruningPlan) -> Any:
    """A context in which the scales of all lost channels are zero."""
    values: dict[int, tuple[Any, Vector]] = {}
    for name, kept in plan.kept.items():
        gone = np.setdiff1d(np.arange(graph[name].width), kept)
        for member in scales_of(graph[name]):
            gamma = member.variable
            _, value = values.setdefault(id(gamma), (gamma, np.asarray(gamma).copy()))
            value[member.positions[np.isin(member.channels, gone)]] = 0
    mapping = [(gamma, ops.convert_to_tensor(value)) for gamma, value in values.values()]
    return keras.StatelessScope(state_mapping=mapping)


def _listed(reasons: Mapping[str, str]) -> str:
    shown = [f"{name} ({why})" for name, why in list(reasons.items())[:3]]
    return ", ".join(shown) + (", ..." if len(reasons) > 3 else "")
