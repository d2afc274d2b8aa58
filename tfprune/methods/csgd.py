r"""Centripetal SGD: filters of a cluster are trained to be equal, and one of each then stays.

Reference: X. Ding, G. Ding, Y. Guo and J. Han, "Centripetal SGD for Pruning Very Deep Convolutional
Networks with Complicated Structure", CVPR 2019, pp. 4943-4953, arXiv:1904.03837. The rules are read
in the authors' code (DingXiaoH/Centripetal-SGD); the paper's text was not at hand. Sheet B6.

The widths are decided before training. The filters of a layer fall into as many clusters, and
filter :math:`F_j` of cluster :math:`H` is trained by :math:`F_j \leftarrow F_j + \tau\,\Delta F_j`,

.. math:: \Delta F_j = -\frac{1}{|H|} \sum_{k \in H} \frac{\partial L}{\partial F_k} - \eta F_j
   + \epsilon \Big(\frac{1}{|H|} \sum_{k \in H} F_k - F_j\Big)

with learning rate :math:`\tau`, weight decay :math:`\eta` and strength :math:`\epsilon`. This is a
gradient, :math:`P G + \eta F + \epsilon (F - P F)` with the cluster mean :math:`P`, which the
optimizer gets in the place of :math:`G`. Scales, offsets and biases follow the same rule with
:math:`\epsilon / 10` and without decay (from the authors' code). A filter that is alone in its
cluster is trained by ordinary SGD with weight decay.

*Coupled channels* (a residual stream) share one clustering, that of the *pacesetter*, the first
kernel of the model that makes them; all others that make them follow it. So do depthwise filters.

*How fast.* Within a cluster the gradient is common. So the deviations from the cluster's mean
shrink by exactly :math:`1 - \tau(\eta + \epsilon)` per step, whatever the data, and with momentum
:math:`m` by about :math:`1 - \tau(\eta + \epsilon)/(1 - m)`. Scales and biases need ten times as
many steps: for deviations to fall to a fraction :math:`\delta` choose :math:`\epsilon`, learning
rates and epochs so that :math:`\sum_t \tau_t\,\epsilon / 10 \ge (1 - m) \ln(1/\delta)`. Once the
filters coincide, the statistics of batch normalisation do so at their own momentum. The logs of
every epoch show the sums of squared deviations.

*What equals what.* The smaller network computes exactly (to rounding) what the trained one
would with every weight that makes or accompanies clustered channels replaced by its cluster's mean
:math:`P W`. If all members are equal, that is the trained network: nothing is lost, and no
fine-tuning is needed. Otherwise the networks differ by :math:`f(W) - f(P W)`, for layers
:math:`h_l = \phi(W_l h_{l-1})` with a 1-Lipschitz :math:`\phi` at most
:math:`\|d_l\| \le \|W_l\| \|d_{l-1}\| + \|W_l - P W_l\| \|h'_{l-1}\|`, which is linear in the
deviations. Batch normalisation divides by deviations that may be small; there is no such number for
networks with it, and ``StructuredResult.difference`` measures.

Departures.

- The authors keep the first filter of a cluster and drop what deviates. Here the first one stays,
  too, but gets the cluster's mean in all its weights and statistics; and there is a warning if
  deviations are not small when channels are merged.
- Normalisations across channels (layer, group) count channels: their groups are left alone. So are
  groups whose channels go different ways, and layers that are not trained. The plan's notes say so.
- ``macs`` and ``pruning_ratio`` take the same part of every group, as the paper does, here after
  rounding to whole channels.
- Adam and its kind scale every weight by itself, which pulls equal filters apart: SGD only.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from tfprune import allocation
from tfprune.allocation.steps import matches
from tfprune.arguments import check_whole
from tfprune.criteria.scores import Scores
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph, ChannelGroup
from tfprune.graph import analyse as analyse_model
from tfprune.graph.groups import Indices, Member
from tfprune.graph.plan import PruningPlan
from tfprune.layers.updates import Gradients, MethodUpdate
from tfprune.methods.merging import check_any, left_alone, notes_on, uniform_widths
from tfprune.methods.structured import StructuredMethod
from tfprune.surgery import check_finite
from tfprune.surgery.merging import merged, occurrences

CLUSTERINGS = ("kmeans", "even", "biased")


@dataclass(frozen=True)
class CentripetalSGD(StructuredMethod):
    """Trains the filters of a cluster to be equal, and merges them.

    Give one of ``macs``, ``pruning_ratio`` (here of every group) and ``widths``.

    Args:
        strength: epsilon, the pull towards the mean of the cluster. The authors have 3e-3 for
            CIFAR-10 with 600 epochs from a learning rate of 3e-2, and 0.05 for ResNet-50 with 70
            epochs from 3e-3; fewer steps need more, see above.
        weight_decay: eta, of all kernels, clustered or not. ``fine_tune`` gets none.
        clustering: ``"kmeans"`` of the flattened kernels; ``"even"``: runs of neighbours whose
            sizes differ by at most one; ``"biased"``: the first cluster takes all in excess.
        widths: group or layer name, or pattern -> channels that stay; the last pattern that matches
            counts. Other groups keep all.
        vector_strength: the strength for scales, offsets and biases, as a part of ``strength``.
        seed: of k-means.
        macs, pruning_ratio, round_to, min_channels, ignore: see :class:`StructuredMethod`.

    Raises:
        ArgumentError: a value out of range, or not exactly one of the three.
    """

    strength: float = 3e-3
    weight_decay: float = 1e-4
    clustering: str = "kmeans"
    widths: Mapping[str, int] | None = None
    vector_strength: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        given = sum(x is not None for x in (self.macs, self.pruning_ratio, self.widths))
        if given != 1:
            raise ArgumentError(
                "Expected one of macs, pruning_ratio and widths: C-SGD decides before training how "
                f"many channels stay. Received: {given or 'none'} of them."
            )
        for name in ("strength", "vector_strength"):
            value = getattr(self, name)
            if not np.isfinite(value) or value <= 0:
                raise ArgumentError(f"Expected a positive {name}. Received: {value!r}.")
        if not np.isfinite(self.weight_decay) or self.weight_decay < 0:
            raise ArgumentError(f"Expected a weight_decay from 0. Received: {self.weight_decay!r}.")
        if self.clustering not in CLUSTERINGS:
            raise ArgumentError(
                f"Expected clustering to be one of {', '.join(CLUSTERINGS)}. Received: "
                f"{self.clustering!r}."
            )
        check_whole("seed", self.seed, 0)

    def update(self) -> MethodUpdate:
        """The centripetal gradients."""
        return CentripetalUpdate(self.strength, self.weight_decay, self.vector_strength)

    def prepare(self, model: Any) -> Any:
        """A copy of the model whose filters are clustered."""
        prepared = super().prepare(model)
        graph = analyse_model(prepared)
        prepared.update.assign(self.clusters(graph))
        return prepared

    def check(self, graph: ChannelGraph) -> None:
        """Raises what :meth:`prepare` raises."""
        check_any(graph, type(self).__name__)
        self._kept_widths(graph)

    def clusters(self, graph: ChannelGraph) -> dict[str, Indices]:
        """The number of every channel's cluster, by the weights as they are now.

        Args:
            graph: of the model before training.

        Returns:
            Group name -> int array of shape ``(width,)`` for every group that loses channels.
            Clusters are numbered by their first channels.

        Raises:
            ArgumentError, BudgetError: as :meth:`prepare`.
        """
        check_finite(graph.model)
        return {
            name: clustered(pacesetter(graph[name]), width, self.clustering, self.seed)
            for name, width in self._kept_widths(graph).items()
        }

    def scores(self, graph: ChannelGraph) -> Scores:
        """1 for the first channel of every cluster, 0 for the others."""
        clusters = clusters_of(graph)
        values = {group.name: np.ones(group.width) for group in graph.prunable}
        for name, numbers in clusters.items():
            values[name] = np.zeros(len(numbers))
            values[name][np.unique(numbers, return_index=True)[1]] = 1.0
        return Scores(values, "centripetal SGD")

    def choice(self, graph: ChannelGraph) -> PruningPlan:
        """The first channel of every cluster.

        Args:
            graph: of a model from :meth:`prepare`.
        """
        clusters = clusters_of(graph)
        kept = {name: np.unique(c, return_index=True)[1] for name, c in clusters.items()}
        return PruningPlan.of(graph, kept, {"method": self.describe(), **notes_on(graph)})

    def values(self, graph: ChannelGraph, plan: PruningPlan) -> Mapping[str, Any]:
        """The means of clusters, and their sums in what reads them."""
        return merged(graph, clusters_of(graph), average=True)[1]

    def carried_out(self, model: Any, plan: PruningPlan) -> Any:
        """The smaller model.

        Warns if deviations from the means of clusters, as a norm, are more than a hundredth of the
        weights: the smaller model is then another than the trained one.
        """
        finished = super().carried_out(model, plan)
        relative = model.update.relative_deviation()
        if relative > 1e-2:
            warnings.warn(
                f"Filters of a cluster still differ by {relative:.1%} of their norm, and have been "
                "replaced by their mean. Train for more epochs, or with a larger strength or "
                "learning rate; or fine-tune the result.",
                stacklevel=2,
            )
        return finished

    def callbacks(self) -> list[Any]:
        """What refuses other optimizers than SGD, and what writes to the logs."""
        return [RequireSGD(), *super().callbacks()]

    def fit_options(self, epochs: int, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("weight_decay"):
            raise ArgumentError(
                "Expected no weight_decay for fine_tune: CentripetalSGD(weight_decay=...) has its "
                f"own, of kernels only. Received: {options['weight_decay']!r}."
            )
        check_optimizer(options.get("optimizer", "sgd"))
        rate = options.get("learning_rate", 1e-3)
        if rate * (self.strength + self.weight_decay) > 1:
            raise ArgumentError(
                "Expected learning_rate * (strength + weight_decay) of at most 1: deviations are "
                "multiplied with 1 minus it in every step. Received: "
                f"{rate:g} * {self.strength + self.weight_decay:g}."
            )
        return super().fit_options(epochs, options)

    def _kept_widths(self, graph: ChannelGraph) -> dict[str, int]:
        """Group name -> channels that stay, for the groups that lose some."""
        if self.widths is None:
            return uniform_widths(graph, self)
        allocation.check_patterns(graph, self.ignore, "ignore")
        return self._given_widths(graph, self.widths)

    def _given_widths(self, graph: ChannelGraph, widths: Mapping[str, int]) -> dict[str, int]:
        allocation.check_patterns(graph, list(widths), "widths")
        reasons = {group.name: group.reason for group in graph} | left_alone(graph)
        chosen: dict[str, int] = {}
        for pattern, width in widths.items():
            check_whole(f"widths[{pattern!r}]", width, 1)
            for group in (g for g in graph.groups if matches(g, pattern)):
                if any(matches(group, ignored) for ignored in self.ignore):
                    continue
                why = reasons[group.name]
                if width > group.width or (why and width < group.width):
                    raise ArgumentError(
                        f"Expected widths within reach. Received: {width} of the {group.width} "
                        f"channels of {group.name!r}"
                        + (f", which all stay: {why}." if why else ".")
                    )
                chosen[group.name] = width
        losing = {name: width for name, width in chosen.items() if width < graph[name].width}
        if not losing:
            raise ArgumentError(
                f"Expected widths that remove channels. Received: {dict(widths)!r}, with which "
                "every group stays whole."
            )
        return losing


@keras.saving.register_keras_serializable(package="tfprune")
class CentripetalUpdate(MethodUpdate):
    """Averages gradients within clusters, and adds the pull to the cluster's mean and the decay.

    Args:
        strength: epsilon.
        weight_decay: eta, of kernels.
        vector_strength: part of ``strength`` for scales, offsets and biases.
    """

    def __init__(
        self, strength: float, weight_decay: float, vector_strength: float = 0.1, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.strength = strength
        self.weight_decay = weight_decay
        self.vector_strength = vector_strength

    def get_config(self) -> dict[str, Any]:
        """The three numbers."""
        return {
            "strength": self.strength,
            "weight_decay": self.weight_decay,
            "vector_strength": self.vector_strength,
        }

    def bind(self, graph: ChannelGraph) -> None:
        """Makes a state of clusters, all of one channel, for every group that can be merged."""
        reasons = left_alone(graph)
        groups = [group for group in graph.prunable if group.name not in reasons]
        # int64, as Keras's own counters: TensorFlow keeps int32 variables off the GPU.
        clusters = {
            group.name: self.state(f"clusters_{number}", np.arange(group.width), dtype="int64")
            for number, group in enumerate(groups)
        }
        members: dict[int, dict[int, list[tuple[Member, ChannelGroup]]]] = {}
        for group in groups:
            for member in (*group.producers, *group.followers):
                axes = members.setdefault(id(member.variable), {})
                axes.setdefault(member.axis, []).append((member, group))
        tied = {
            key: _Tied(
                [_TiedAxis(parts, [clusters[g.name] for _, g in parts]) for parts in axes.values()]
            )
            for key, axes in members.items()
        }
        vectors = {
            key for key, site in graph.record.sites.items()
            if len(site.variable.shape) == 1 or not site.scored
        }  # fmt: skip
        weights = [
            (v, tied.get(id(v)), id(v) in vectors or len(v.shape) == 1)
            for v in graph.model.trainable_variables
        ]
        self.hold(clusters=clusters, weights=weights, statistics=[
            (tied[key], graph.record.sites[key].variable)
            for key in tied if not graph.record.sites[key].variable.trainable
        ])  # fmt: skip

    def assign(self, clusters: Mapping[str, Any]) -> None:
        """Sets the clusters of the groups that are named; the others' channels are all alone."""
        for name, state in self.held.clusters.items():
            state.assign(np.asarray(clusters.get(name, np.arange(int(state.shape[0]))), np.int64))

    def clusters(self) -> dict[str, Indices]:
        """The clusters of the groups that lose channels."""
        arrays = {name: np.asarray(state) for name, state in self.held.clusters.items()}
        return {name: a for name, a in arrays.items() if len(np.unique(a)) < len(a)}

    def gradients(self, gradients: Gradients, learning_rate: Any) -> Gradients:
        """P G + eta F + epsilon (F - P F)."""
        changed: Gradients = {}
        for variable, tied, is_vector in self.held.weights:
            if id(variable) not in gradients:
                continue
            gradient = gradients[id(variable)]
            decay = 0.0 if is_vector else self.weight_decay
            weight = ops.cast(variable, gradient.dtype)
            if tied is None:
                changed[id(variable)] = gradient + decay * weight
                continue
            pull = self.strength * (self.vector_strength if is_vector else 1.0)
            mean = tied.mean(gradient - pull * weight)
            changed[id(variable)] = mean + (decay + pull) * weight
        return {**gradients, **changed}

    def figures(self) -> Mapping[str, float]:
        """Sums of squared deviations from the cluster's mean: of weights, and of statistics."""
        return {
            "cluster_deviation": sum(_squared_deviation(*pair) for pair in self._tied()),
            "statistics_deviation": sum(_squared_deviation(*p) for p in self.held.statistics),
        }

    def relative_deviation(self) -> float:
        """The norm of all deviations over the norm of the same weights."""
        whole = sum(float((np.asarray(v).astype(np.float64) ** 2).sum()) for _, v in self._tied())
        deviation = sum(_squared_deviation(*pair) for pair in self._tied())
        return float(np.sqrt(deviation / whole)) if whole else 0.0

    def _tied(self) -> list[tuple[_Tied, Any]]:
        return [(tied, v) for v, tied, _ in self.held.weights if tied is not None]


class _TiedAxis:
    """One axis of a weight, with what is needed to average over clusters along it.

    Args:
        parts: the members that share the axis, each with its group.
        clusters: the state weight of each of the groups.
    """

    def __init__(
        self, parts: Sequence[tuple[Member, ChannelGroup]], clusters: Sequence[Any]
    ) -> None:
        member = parts[0][0]
        self.axis = member.axis
        self._clusters = clusters
        size = int(member.variable.shape[member.axis])
        self._offsets = np.cumsum([0, *(group.width for _, group in parts)])
        channel = np.full(size, -1, np.int64)
        for offset, (part, _) in zip(self._offsets, parts, strict=False):
            channel[part.positions] = offset + part.channels
        number = occurrences(channel)
        # Positions of other channels are segments of their own, behind those of clusters.
        self._per_channel = int(number[channel >= 0].max(initial=0)) + 1
        behind = int(self._offsets[-1]) * self._per_channel
        alone = channel < 0
        self._segments = behind + int(alone.sum())
        self._channel = np.where(alone, 0, channel)
        self._factor = np.where(alone, 0, self._per_channel)
        self._added = np.where(alone, behind + np.cumsum(alone) - 1, number)

    def mean(self, value: Any) -> Any:
        """Every slice along the axis replaced by its cluster's mean."""
        numbers = ops.concatenate(
            [
                ops.cast(state, "int64") + int(offset)
                for state, offset in zip(self._clusters, self._offsets, strict=False)
            ]
        )
        index = ops.take(numbers, self._channel) * self._factor + self._added
        index = ops.cast(index, "int32")
        rows = ops.moveaxis(value, self.axis, 0)
        shape = ops.shape(rows)
        rows = ops.reshape(rows, (shape[0], -1))
        total = ops.segment_sum(rows, index, num_segments=self._segments)
        count = ops.segment_sum(ops.ones_like(rows[:, :1]), index, num_segments=self._segments)
        mean = ops.take(total / ops.maximum(count, 1.0), index, axis=0)
        return ops.moveaxis(ops.reshape(mean, shape), 0, self.axis)


class _Tied:
    """All axes of a weight along which slices are tied."""

    def __init__(self, axes: Sequence[_TiedAxis]) -> None:
        self._axes = axes

    def mean(self, value: Any) -> Any:
        for axis in self._axes:
            value = axis.mean(value)
        return value


class RequireSGD(keras.callbacks.Callback):  # type: ignore[misc]
    """Refuses, before the first step, optimizers that would pull equal filters apart."""

    def on_train_begin(self, logs: Any = None) -> None:
        """Looks at the optimizer that the model was compiled with."""
        optimizer = self.model.optimizer
        while not isinstance(optimizer, keras.optimizers.SGD):
            inner = getattr(optimizer, "inner", getattr(optimizer, "inner_optimizer", None))
            if inner is None:
                break
            optimizer = inner
        check_optimizer(optimizer)


def check_optimizer(optimizer: Any) -> None:
    """Raises :class:`ArgumentError` unless it is SGD that treats the members of a cluster alike."""
    name = optimizer if isinstance(optimizer, str) else type(optimizer).__name__
    wanted = (
        "Expected SGD, with or without momentum: all members of a cluster must make equal steps."
    )
    if isinstance(optimizer, str):
        if optimizer.lower() != "sgd":
            raise ArgumentError(f"{wanted} Received: {name!r}.")
        return
    if not isinstance(optimizer, keras.optimizers.SGD):
        raise ArgumentError(f"{wanted} Received: {name}.")
    for setting in ("clipvalue", "weight_decay"):
        if getattr(optimizer, setting, None):
            raise ArgumentError(
                f"{wanted} Received: SGD with {setting}={getattr(optimizer, setting)!r}. "
                "CentripetalSGD has a weight_decay of its own; clipnorm is fine."
            )


def clusters_of(graph: ChannelGraph) -> dict[str, Indices]:
    """The clusters of a model that :meth:`CentripetalSGD.prepare` made."""
    update = getattr(graph.model, "update", None)
    if not isinstance(update, CentripetalUpdate):
        raise ArgumentError(
            f"Expected a model from CentripetalSGD.prepare. Received: {graph.model.name!r}, which "
            "has no clusters."
        )
    return update.clusters()


def pacesetter(group: ChannelGroup) -> Any:
    """The kernel that decides a group's clusters, flattened: float64 array ``(width, n)``.

    The first kernel of the model that makes the channels.
    """
    member = next(m for m in group.producers if m.scored)
    value = np.moveaxis(np.asarray(member.variable).astype(np.float64), member.axis, 0)
    order = np.argsort(member.channels, kind="stable")
    return value[member.positions[order]].reshape(group.width, -1)


def clustered(filters: Any, count: int, how: str = "kmeans", seed: int = 0) -> Indices:
    """Exactly ``count`` clusters of filters.

    Args:
        filters: array of shape ``(width, n)``.
        count: clusters, from 1 to the width.
        how: ``"kmeans"`` (scikit-learn's, the best of ten starts), ``"even"`` or ``"biased"``.
        seed: of k-means.

    Returns:
        int64 array of shape ``(width,)``: numbers from 0, in the order of their first filters.
    """
    width = len(filters)
    if how == "even":
        parts = np.array_split(np.arange(width), count)  # the first ones are larger
        return np.repeat(np.arange(count), [len(part) for part in parts])
    if how == "biased":
        return np.maximum(np.arange(width) - (width - count), 0)
    if count == width:
        return np.arange(width)
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Fewer different filters than clusters: seen to below.
        warnings.simplefilter("ignore", ConvergenceWarning)
        numbers = KMeans(count, n_init=10, random_state=seed).fit(filters).labels_.astype(np.int64)
    while len(np.unique(numbers)) < count:
        sizes = np.bincount(numbers)
        last = np.flatnonzero(numbers == sizes.argmax())[-1]
        numbers[last] = numbers.max() + 1
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _squared_deviation(tied: _Tied, variable: Any) -> float:
    value = ops.cast(variable, "float32")
    deviation = ops.convert_to_numpy(value - tied.mean(value)).astype(np.float64)
    return float((deviation**2).sum())
