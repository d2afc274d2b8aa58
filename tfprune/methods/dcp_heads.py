r"""Extra classifiers at intermediate depths, and a model that trains with them.

Zhuang et al., NeurIPS 2018: :math:`L_S^p` is the cross-entropy of a head
:math:`\mathrm{Linear}(\mathrm{GAP}(\mathrm{ReLU}(\mathrm{BN}(O^p))))` at the output :math:`O^p` of
some layer; see :mod:`tfprune.methods.dcp`.

The heads are weights of the method's update, not layers of the graph: the model's channels, its
plan and its outputs are those of the network alone. While it trains, the same functional graph is
run with the sites as further outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph
from tfprune.graph.rules.convolution import (
    convolution,
    depthwise_convolution,
    separable_convolution,
    transposed_convolution,
)
from tfprune.graph.rules.registry import find_rule
from tfprune.graph.trace import Ref, ends_of
from tfprune.layers.method_model import MethodModel
from tfprune.layers.updates import MethodUpdate
from tfprune.methods.dcp_selection import Program, program_of

_CONVOLUTIONS = (
    convolution, depthwise_convolution, separable_convolution, transposed_convolution,
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """Where a head may stand.

    Attributes:
        ref: the tensor, an output of an operation of the outermost model.
        op: the operation.
        axis: of the channels.
        depth: convolutions on the longest path from the inputs to it.
    """

    ref: Ref
    op: Any
    axis: int
    depth: int


def candidates(graph: ChannelGraph) -> list[Site]:
    """The tensors that a head may read, in the order of the model.

    They are outputs of convolutions, and of operations that join several tensors (additions,
    concatenations), with axes besides batch and channels, through which everything passes: no path
    leads around them. Such a head judges all that comes before it.
    """
    program = program_of(graph)
    depth = depths(program)
    last = {number: i for i, step in enumerate(program.steps) for number in step.inputs}
    last.update(dict.fromkeys(program.outputs, len(program.steps)))
    keys = {number: key for key, number in program.numbers.items()}
    shared: dict[int, int] = {}
    for step in program.steps:
        shared[id(step.call.op)] = shared.get(id(step.call.op), 0) + 1
    found = []
    # The last step that reads anything made so far.
    reach = max((last.get(number, -1) for number in program.inputs), default=-1)
    for i, step in enumerate(program.steps):
        if (
            reach <= i
            and len(step.outputs) == 1
            and step.outputs[0] in keys
            and step.outputs[0] not in program.outputs
            and shared[id(step.call.op)] == 1
            and (len(set(step.inputs)) > 1 or find_rule(step.call.op)[0] in _CONVOLUTIONS)
        ):
            ref = step.call.outputs[0]
            tracked = [
                axis
                for axis, labels in enumerate(graph.record.tensors[ref.key])
                if labels is not None
            ]
            if len(tracked) == 1 and len(ref.shape) > 2 and ref.key == keys[step.outputs[0]]:
                found.append(Site(ref, step.call.op, tracked[0], depth[step.outputs[0]]))
        reach = max([reach, *(last.get(number, -1) for number in step.outputs)])
    return found


def depths(program: Program) -> dict[int, int]:
    """Convolutions on the longest path to every tensor, by its number."""
    depth = dict.fromkeys(program.inputs, 0)
    for step in program.steps:
        before = max((depth[number] for number in step.inputs), default=0)
        here = before + (find_rule(step.call.op)[0] in _CONVOLUTIONS)
        depth.update(dict.fromkeys(step.outputs, here))
    return depth


def sites_of(graph: ChannelGraph, count: int) -> list[Site]:
    """``count`` sites evenly in depth, in the order of the model.

    The i-th is the candidate whose depth is nearest to ``i / (count + 1)`` of the network's; of
    several the last, which stands behind an addition rather than in front of it.

    Raises:
        ArgumentError: the model has fewer.
    """
    possible = candidates(graph)
    if len(possible) < count:
        raise ArgumentError(
            f"Expected a network with places for {count} extra losses: outputs of convolutions, or "
            f"sums, that no path leads around, outside nested models. Received: "
            f"{graph.model.name!r}, which has {len(possible)}. Use fewer losses."
        )
    whole = max(depths(program_of(graph)).values())
    chosen: list[int] = []
    for number in range(1, count + 1):
        aim = whole * number / (count + 1)
        first = chosen[-1] + 1 if chosen else 0
        # Enough are left for those to come.
        free = range(first, len(possible) - (count - number))
        chosen.append(min(free, key=lambda i: (abs(possible[i].depth - aim), -i)))
    return [possible[i] for i in chosen]


@keras.saving.register_keras_serializable(package="tfprune")
class StageHeads(MethodUpdate):
    """The extra classifiers.

    Attributes:
        sites: where they stand, of the model that this is bound to.
        heads: the classifiers in the same order: each maps the site's tensor to logits, float32.

    Args:
        losses: how many.
        alternating: whether steps on the extra losses and on the model's own take turns.
    """

    def __init__(self, losses: int, alternating: bool, **kwargs: Any) -> None:
        super().__init__(**{"trainable": True, **kwargs})
        self.losses_count = losses
        self.alternating = alternating

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {"losses": self.losses_count, "alternating": self.alternating}

    def bind(self, graph: ChannelGraph) -> None:
        """Finds the sites and makes the heads.

        Raises:
            ArgumentError: there are too few sites, or the model is no classifier.
        """
        classes = classes_of(graph.model)
        sites = sites_of(graph, self.losses_count)
        self.heads = [
            Head(classes, site.axis, seed=number, name=f"head_{number}")
            for number, site in enumerate(sites)
        ]
        for head, site in zip(self.heads, sites, strict=True):
            head.build(site.ref.shape)
        self.hold(sites=sites)

    @property
    def sites(self) -> Sequence[Site]:
        """Where the heads stand."""
        found: Sequence[Site] = self.held.sites
        return found


@keras.saving.register_keras_serializable(package="tfprune")
class Head(keras.layers.Layer):  # type: ignore[misc]
    """``Linear(GAP(ReLU(BN(x))))``, in float32.

    Args:
        classes: number of logits.
        axis: of the channels.
        seed: of the first weights.
    """

    def __init__(self, classes: int, axis: int, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})
        self.classes, self.axis, self.seed = classes, axis, seed
        self.normalisation = keras.layers.BatchNormalization(axis=axis, dtype="float32")
        start = keras.initializers.GlorotUniform(seed=seed)
        self.classifier = keras.layers.Dense(classes, kernel_initializer=start, dtype="float32")

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        own = {"classes": self.classes, "axis": self.axis, "seed": self.seed}
        return {**super().get_config(), **own}

    def build(self, shape: Any) -> None:
        """Makes the weights, for a tensor of this shape."""
        self.normalisation.build(shape)
        self.classifier.build((shape[0], shape[self.axis]))

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Logits, shape (batch, classes)."""
        value = ops.relu(self.normalisation(inputs, training=training))
        places = [axis for axis in range(1, len(inputs.shape)) if axis != self.axis]
        return self.classifier(ops.mean(value, axis=places))


def classes_of(model: Any) -> int:
    """The number of a classifier's outputs.

    Raises:
        ArgumentError: the model is none.
    """
    shape = getattr(model, "output_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[-1] is None:
        raise ArgumentError(
            "Expected a classifier with one output of shape (batch, classes), beside which the "
            f"extra losses make sense. Received: {model.name!r}, whose output shape is {shape}."
        )
    return int(shape[-1])


def cross_entropy(labels: Any, logits: Any, sample_weight: Any = None) -> Any:
    """The mean cross-entropy of logits for class numbers or one-hot labels.

    One logit is that of a yes-or-no question.
    """
    losses, classes = keras.losses, int(logits.shape[-1])
    if classes == 1:
        labels = ops.reshape(labels, (-1, 1))
        return losses.BinaryCrossentropy(from_logits=True)(labels, logits, sample_weight)
    one_hot = len(labels.shape) == 2 and labels.shape[-1] == classes
    kind = losses.CategoricalCrossentropy if one_hot else losses.SparseCategoricalCrossentropy
    return kind(from_logits=True)(labels, logits, sample_weight)


@keras.saving.register_keras_serializable(package="tfprune")
class StagedModel(MethodModel):
    """A :class:`MethodModel` that learns from the heads of its :class:`StageHeads` as well.

    It is compiled, fitted on (x, y), saved and loaded as any. Called, evaluated and analysed, it is
    the network without heads.
    """

    _tapped: Any = None
    _listening = False
    _logits: Sequence[Any] = ()

    def attach(self, update: MethodUpdate) -> None:
        """Binds the update and finds the tensors that its heads read."""
        super().attach(update)
        tensors = [site.op.output for site in update.sites]
        inputs, output = ends_of(self)
        tapped = keras.Model(inputs, [output, *tensors])
        # Not tracked: its layers are the model's.
        object.__setattr__(self, "_tapped", tapped)

    def call(self, inputs: Any, training: Any = None, mask: Any = None, **kwargs: Any) -> Any:
        """The outputs. In a training step with heads, their logits are kept for the loss."""
        if not self._listening:
            return super().call(inputs, training=training, mask=mask, **kwargs)
        output, *tensors = self._tapped(inputs, training=training)
        heads = getattr(self.update, "heads", ())
        logits = [head(x, training=training) for head, x in zip(heads, tensors, strict=True)]
        object.__setattr__(self, "_logits", logits)
        return output

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None,
        training: bool = True,
    ) -> Any:  # fmt: skip
        """The compiled loss, and in a joint training step the heads' losses."""
        loss = super().compute_loss(x, y, y_pred, sample_weight, training=training)
        if self._listening and training:
            loss = loss + self._extra(y, sample_weight)
        return loss

    def train_step(self, data: Any) -> Any:
        """One step on all losses, or two: on the extra losses, then on the model's own."""
        update = self.update
        if not isinstance(update, StageHeads):
            return super().train_step(data)
        if not update.alternating:
            with self._with_heads():
                return super().train_step(data)
        import tensorflow as tf

        weights = self.trainable_weights
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with self._with_heads(), tf.GradientTape() as tape:
            self(x, training=True)
            loss = self.optimizer.scale_loss(self._extra(y, sample_weight))
        pairs = zip(tape.gradient(loss, weights), weights, strict=True)
        # What lies behind the last head has no gradient, and no momentum either.
        self.optimizer.apply_gradients([pair for pair in pairs if pair[0] is not None])
        return super().train_step(data)

    @contextlib.contextmanager
    def _with_heads(self) -> Iterator[None]:
        object.__setattr__(self, "_listening", True)
        try:
            yield
        finally:
            object.__setattr__(self, "_listening", False)
            object.__setattr__(self, "_logits", ())

    def _extra(self, y: Any, sample_weight: Any) -> Any:
        return sum(cross_entropy(y, z, sample_weight) for z in self._logits)
