r"""First-order Taylor expansion of the loss.

Reference: Molchanov, Mallya, Tyree, Frosio and Kautz, "Importance Estimation for Neural Network
Pruning", CVPR 2019: with a gate :math:`z = 1` on a channel, the loss without it is to first order
:math:`E - \partial E / \partial z`, and the score is the square of that, averaged over batches.
The formula and the average are read in the authors' code; the paper's text was not at hand.

Departure: the authors put the gate behind a batch normalisation. Here it stands where the channel
is read, at the consumers, which is where a removed channel is masked. As a consumer is linear in
its kernel, the gate's gradient is a sum over the slices that read channel k,

.. math:: \partial E / \partial z_k = \sum_{w \in \text{slices}} w \, \partial E / \partial w,

so no gate has to be put into the model, and channels behind residual sums, depthwise convolutions
and gates are treated alike. For a plain convolution, batch normalisation and ReLU both are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.batches import iterate
from tfprune.criteria.scores import Normalize, Scores, Vector, normalized, over_other_axes
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph, Member
from tfprune.graph.trace import framework_module
from tfprune.losses import resolve_loss


@dataclass(frozen=True)
class Taylor:
    """Squared first-order change of the loss when a channel goes, averaged over batches.

    Needs TensorFlow as the Keras backend (or a tf_keras model), for the gradients.

    Args:
        data: labelled training data (never the test set): a ``tf.data.Dataset`` of batches
            ``(x, y)``, or a pair of arrays.
        loss: a function of (labels, outputs), or a Keras loss or its name; by default
            cross-entropy as the model's last activation and the labels suggest.
        batches: how many batches to use; ``None`` for all.
        batch_size: for arrays.
        normalize: what each group's scores are divided by. The paper compares raw scores across
            the network; the default does the same.
    """

    data: Any
    loss: Any = None
    batches: int | None = 30
    batch_size: int = 64
    normalize: Normalize = "none"

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group.

        Raises:
            ArgumentError: the model runs on another backend than TensorFlow.
            DataError: no labels, or no examples.
        """
        backend = framework_module(graph.framework).backend.backend()
        if backend != "tensorflow":
            raise ArgumentError(
                "Expected a model on TensorFlow, whose gradients the Taylor criterion takes. "
                f"Received: a model on the Keras backend {backend!r}. Set KERAS_BACKEND to "
                "tensorflow, or use a criterion without gradients, such as 'l1'."
            )
        readers: dict[str, list[Member]] = {
            group.name: [m for m in group.members if m.masked] for group in graph.prunable
        }
        variables = list(
            {id(m.variable): m.variable for members in readers.values() for m in members}.values()
        )
        position = {id(variable): i for i, variable in enumerate(variables)}
        total = {group.name: np.zeros(group.width) for group in graph.prunable}
        count = 0
        gradients = _gradient_function(graph.model, self.loss, variables)
        shape = getattr(graph.model, "input_shape", None)
        for x, y in iterate(
            self.data, batch_size=self.batch_size, limit=self.batches, labels=True,
            input_shape=shape,
        ):  # fmt: skip
            products = [
                np.asarray(gradient, np.float64) * np.asarray(variable).astype(np.float64)
                for gradient, variable in zip(gradients(x, y), variables, strict=True)
            ]
            for group in graph.prunable:
                change = np.zeros(group.width)
                for member in readers[group.name]:
                    product = products[position[id(member.variable)]]
                    per_position = product.sum(over_other_axes(product, member.axis))
                    np.add.at(change, member.channels, per_position[member.positions])
                total[group.name] += change**2
            count += 1
        values: dict[str, Vector] = {
            name: normalized(value / count, self.normalize) for name, value in total.items()
        }
        return Scores(values, f"first-order Taylor ({count} batches)")


def _gradient_function(model: Any, loss: Any, variables: list[Any]) -> Any:
    """A compiled function from a batch to the loss's gradients in some weights."""
    import tensorflow as tf

    raw = [getattr(variable, "value", variable) for variable in variables]
    raw = [variable() if callable(variable) else variable for variable in raw]
    raw = [v if isinstance(v, tf.Variable) else o for v, o in zip(raw, variables, strict=True)]
    objective: Any = None

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator,unused-ignore]
    def gradients(x: Any, y: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(raw)
            value = tf.reduce_mean(objective(y, model(x, training=False)))
        return tape.gradient(value, raw, unconnected_gradients="zero")

    def run(x: Any, y: Any) -> Any:
        nonlocal objective
        if objective is None:
            objective = resolve_loss(model, loss, y)
        return gradients(tf.nest.map_structure(tf.convert_to_tensor, x), tf.convert_to_tensor(y))

    return run
