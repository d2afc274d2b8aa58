r"""Global and dynamic filter pruning: one mask over all filters, chosen again while they train.

Reference: S. Lin, R. Ji, Y. Li, Y. Wu, F. Huang and B. Zhang, "Accelerating Convolutional Networks
via Global & Dynamic Filter Pruning", IJCAI 2018, pp. 2425-2432. The procedure is read in the
authors' code (TensorFlow 1); the paper's text was not at hand, and what it says of the gradient is
from memory. Sheet B8.3.

.. math:: \min_{W, m} L(m \odot W) \quad \text{s.t.} \quad \lVert m \rVert_0 \le \beta \sum_l C_l

is solved by turns. Every ``every`` steps the mask is lifted, every filter of every layer gets its
saliency

.. math:: \Theta_j = \Big| \sum_{w \in F_j} w \, \frac{\partial L}{\partial w} \Big|

(its bias among the w), averaged over ``batches`` batches, and the filters of largest saliency in
the whole network make the new mask. In between, the network computes with :math:`m \odot W`. With
``recovery="straight-through"`` the gradient of the masked product moves W itself, as the paper has
it: a masked filter goes on learning. With ``"rescoring"`` it stands still, as in the authors' code,
and can only come back because of its saliency.

*What equals what.* Behind the filters, the scales and shifts of batch normalisation and whatever
else follows the channel are masked with it. A masked channel is zero everywhere, where activations
of zero are zero, and the finished model then computes what the trained one does, up to rounding.

Departures.

- The authors mask kernel and bias alone; batch normalisation's beta would revive the channel.
- The mean saliency ranks; the authors' code averages it, and ranks by the last batch's.
- Saliency is measured in training mode, as moving statistics of masked channels say nothing.
- ``min_channels`` of every group stay; in the authors' code a layer may vanish.
- Coupled channels are one filter: the sum runs over all weights that make the channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from tfprune.arguments import check_whole
from tfprune.criteria.scores import Scores
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph, analyse
from tfprune.graph.copying import copy_model
from tfprune.graph.plan import PruningPlan
from tfprune.graph.trace import raw_variable
from tfprune.layers.distribution import strategy_scope
from tfprune.layers.per_channel import Axis
from tfprune.layers.updates import Gradients, MethodUpdate
from tfprune.losses import resolve_loss
from tfprune.methods.examples import labelled
from tfprune.methods.structured import StructuredMethod

Recovery = Literal["straight-through", "rescoring"]


@dataclass(frozen=True)
class GlobalDynamicPruning(StructuredMethod):
    """Masks the filters of lowest saliency in the whole network, and chooses again as it trains.

    Args:
        data: training data with labels, on which saliency is measured.
        every: training steps between two choices; the authors have 500.
        batches: batches of ``data`` that a saliency is averaged over; the authors have 100.
        batch_size: for arrays; the authors have 32.
        frozen_after: number of the epoch, from 0, from which on the mask stays; ``None`` for never.
        recovery: see above.
        loss: a Keras loss; ``None`` infers the cross-entropy from the last layer and the labels.
        macs, pruning_ratio, round_to, min_channels, ignore: see :class:`StructuredMethod`; the
            authors keep 0.5 to 0.7 of the filters.

    Raises:
        ArgumentError: neither ``macs`` nor ``pruning_ratio``, or a value out of range.
    """

    data: Any = field(repr=False)
    every: int = 500
    batches: int = 100
    batch_size: int = 32
    frozen_after: int | None = None
    recovery: Recovery = "straight-through"
    loss: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.macs is None and self.pruning_ratio is None:
            raise ArgumentError(
                "Expected macs or pruning_ratio: how much to mask. Received: neither."
            )
        for name in ("every", "batches", "batch_size"):
            check_whole(name, getattr(self, name), 1)
        if self.frozen_after is not None:
            check_whole("frozen_after", self.frozen_after, 0)
        if self.recovery not in ("straight-through", "rescoring"):
            raise ArgumentError(
                "Expected recovery as 'straight-through' or 'rescoring'. "
                f"Received: {self.recovery!r}."
            )

    def update(self) -> MethodUpdate:
        """The masks, and the weights behind them."""
        return DynamicMasks(self.recovery)

    def prepare(self, model: Any) -> Any:
        """A copy of the model with masks of ones; the first are chosen when training begins.

        Raises:
            DataError: the data are empty, have no labels or do not fit.
            And what :class:`StructuredMethod` raises.
        """
        next(self.examples(model))
        return super().prepare(model)

    def callbacks(self) -> list[Any]:
        """What chooses the masks, before what writes the logs."""
        return [ChooseMasks(self), *super().callbacks()]

    def scores(self, graph: ChannelGraph) -> Scores:
        """1 for channels that are not masked, 0 for those that are."""
        return Scores(graph.model.update.masks(), "mask")

    def choice(self, graph: ChannelGraph) -> PruningPlan:
        """The channels that are not masked stay."""
        masks = graph.model.update.masks()
        kept = {name: np.flatnonzero(mask) for name, mask in masks.items()}
        return PruningPlan.of(graph, kept, {"method": self.describe()})

    def saliency(self, model: Any) -> dict[str, Any]:
        """The mean of Theta over the batches, by group: float64, shape ``(width,)``.

        Args:
            model: on TensorFlow; it is only read.
        """
        return Saliency(self, model)(model)

    def examples(self, model: Any) -> Iterator[tuple[Any, Any]]:
        """The batches that saliency is averaged over.

        Raises:
            DataError: none, without labels, or of another shape than the model's inputs.
        """
        return labelled(
            self.data,
            model,
            "measure saliency on",
            batch_size=self.batch_size,
            batches=self.batches,
        )


@keras.saving.register_keras_serializable(package="tfprune")
class DynamicMasks(MethodUpdate):
    """Keeps the weights behind the masks, and moves them with the gradients of the masked ones.

    Args:
        recovery: whether masked filters learn.
    """

    def __init__(self, recovery: Recovery, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recovery = recovery

    def get_config(self) -> dict[str, Any]:
        """The recovery."""
        return {"recovery": self.recovery}

    def bind(self, graph: ChannelGraph) -> None:
        """Makes a mask for every group, and a copy of all weights that make or follow channels."""
        masks = {
            group.name: self.state(f"mask_{number}", np.ones(group.width, np.float32))
            for number, group in enumerate(graph.prunable)
        }
        weights: dict[int, tuple[Any, Any, list[tuple[Axis, Any]]]] = {}
        for group in graph.prunable:
            for member in (*group.producers, *group.followers):
                variable = member.variable
                if not variable.trainable:
                    continue
                if id(variable) not in weights:
                    full = self.state(f"full_{len(weights)}", np.asarray(variable))
                    weights[id(variable)] = variable, full, []
                axis = Axis(member, group.width)
                weights[id(variable)][2].append((axis, masks[group.name]))
        self.hold(masks=masks, weights=weights)

    def gradients(self, gradients: Gradients, learning_rate: Any) -> Gradients:
        """Those of masked weights are zero, unless they learn."""
        if self.recovery == "straight-through":
            return gradients
        masked = {
            key: gradients[key] * _multiplier(axes)
            for key, (_, _, axes) in self.held.weights.items()
            if key in gradients
        }
        return {**gradients, **masked}

    def update(self, gradients: Gradients, learning_rate: Any) -> None:
        """Moves the weights behind the masks as the optimizer moved the masked ones."""
        for variable, full, axes in self.held.weights.values():
            mask = _multiplier(axes)
            after = ops.convert_to_tensor(variable)
            # A masked weight was zero before the step: where it is now is how far it moved.
            full.assign(ops.where(mask > 0, after, full + after))
            variable.assign(full * mask)

    def lift(self) -> None:
        """Gives the model the weights behind the masks."""
        for variable, full, _ in self.held.weights.values():
            variable.assign(full)

    def mask(self, kept: Mapping[str, Any]) -> None:
        """Masks all channels but these; groups that are not named keep all."""
        for name, state in self.held.masks.items():
            mask = np.ones(tuple(state.shape), np.float32)
            if name in kept:
                mask[:] = 0
                mask[list(kept[name])] = 1
            state.assign(mask)
        for variable, full, axes in self.held.weights.values():
            variable.assign(full * _multiplier(axes))

    def masks(self) -> dict[str, Any]:
        """The masks by group: float64, shape ``(width,)``."""
        return {k: np.asarray(state).astype(np.float64) for k, state in self.held.masks.items()}

    def figures(self) -> Mapping[str, float]:
        """The fraction of channels that is masked."""
        values = np.concatenate([*self.masks().values(), np.ones(0)])
        return {"masked": float((values == 0).mean()) if values.size else 0.0}


def _multiplier(axes: list[tuple[Axis, Any]]) -> Any:
    product: Any = 1.0
    for axis, mask in axes:
        product = product * axis.spread(ops.convert_to_tensor(mask), elsewhere=1.0)
    return product


class Saliency:
    """Measures saliency on a copy, which is one device's whatever the model is distributed over.

    Args:
        method: the data and the loss.
        model: to copy.
    """

    def __init__(self, method: GlobalDynamicPruning, model: Any) -> None:
        self._method = method
        self._copy = copy_model(model)
        self._graph = analyse(self._copy)
        self._measure: Any = None

    def __call__(self, model: Any) -> dict[str, Any]:
        """The saliency of every filter of the model that was copied, as it is now."""
        for source, copy in zip(model.layers, self._copy.layers, strict=True):
            for before, after in zip(source.variables, copy.variables, strict=True):
                after.assign(np.asarray(before))
        total: list[Any] = []
        count = 0
        for x, y in self._method.examples(self._copy):
            if self._measure is None:
                loss = resolve_loss(self._copy, self._method.loss, y)
                self._measure = _saliencies(self._graph, loss)
            found = self._measure(x, y)
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
            count += 1
        return {
            group.name: np.asarray(values, np.float64) / count
            for group, values in zip(self._graph.prunable, total, strict=True)
        }


def _saliencies(graph: ChannelGraph, objective: Any) -> Any:
    """A function from a batch to Theta of every prunable group."""
    import tensorflow as tf

    model = graph.model
    axes = [
        [Axis(member, group.width) for member in group.producers if member.variable.trainable]
        for group in graph.prunable
    ]
    raw = {
        id(axis.variable): raw_variable(axis.variable) for members in axes for axis in members
    }  # fmt: skip

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator,unused-ignore]
    def measure(x: Any, y: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(list(raw.values()))
            loss = tf.reduce_mean(objective(y, model(x, training=True)))
        found = tape.gradient(loss, list(raw.values()), unconnected_gradients="zero")
        gradient = dict(zip(raw, found, strict=True))
        return [
            tf.abs(
                tf.add_n(
                    [
                        axis.total(raw[id(axis.variable)] * gradient[id(axis.variable)])
                        for axis in members
                    ]
                )
            )
            for members in axes
        ]

    return measure


class ChooseMasks(keras.callbacks.Callback):  # type: ignore[misc]
    """Chooses the masks anew before the first step and after every ``every`` steps.

    Args:
        method: the hyper-parameters.
    """

    def __init__(self, method: GlobalDynamicPruning) -> None:
        super().__init__()
        self._method = method
        self._graph: ChannelGraph | None = None
        self._saliency: Saliency | None = None
        self._frozen = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Chooses the first masks, unless training goes on from a checkpoint.

        Raises:
            ArgumentError: several training steps per execution.
        """
        if getattr(self.model, "steps_per_execution", 1) != 1:
            raise ArgumentError(
                "Expected a model compiled with steps_per_execution=1, as masks change between "
                f"steps. Received: {self.model.steps_per_execution}."
            )
        self._graph = analyse(self.model)
        if self._steps() == 0:
            self._choose()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes whether the masks may still change."""
        last = self._method.frozen_after
        self._frozen = last is not None and epoch >= last

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Chooses where it is time."""
        if not self._frozen and self._steps() % self._method.every == 0:
            self._choose()

    def _steps(self) -> int:
        return int(np.asarray(self.model.optimizer.iterations))

    def _choose(self) -> None:
        graph, update = self._graph, self.model.update
        if graph is None:
            return
        with strategy_scope(self.model):
            update.lift()
        if self._saliency is None:
            self._saliency = Saliency(self._method, self.model)
        scores = Scores(self._saliency(self.model), "saliency")
        with strategy_scope(self.model):
            update.mask(self._method.decide(graph, scores).kept)
