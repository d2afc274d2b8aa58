r"""Influence: the predicted rise of the validation loss when a channel goes.

Reference: Koh and Liang, "Understanding Black-box Predictions via Influence Functions", ICML 2017
(arXiv:1703.04730), whose perturbation is a training example; there is no canonical paper that uses
it for channels. The definitions here are derived; the text of the paper was not at hand. Ancestors:
LeCun, Denker and Solla, "Optimal Brain Damage", 1990; Hassibi and Stork, "Optimal Brain Surgeon",
1993. With :math:`\phi_{n,c}` the gradient of example n's loss with respect to a gate on channel c
(:mod:`tfprune.criteria.gates`) and :math:`F = \frac 1 N \Phi^\top \Phi` within a group:

- ``"no_compensation"``: the second-order expansion in the gate,

  .. math:: \Delta L(c) = - \operatorname{mean}_n \phi_{n,c}
      + \tfrac 1 2 \operatorname{mean}_n \phi_{n,c}^2 .

- ``"compensation"``: the gates of the other channels of the group move as well, so as to undo what
  they can (optimal brain surgeon, with :math:`\lambda` = ``damping`` times the mean of F's
  diagonal),

  .. math:: \Delta L(c) = \tfrac 1 2 \big/ [(F + \lambda I)^{-1}]_{cc} .

  What the surviving gates become is folded into the kernels that read them: for the removed set R
  and the kept set K, :math:`m_K = 1 + (F + \lambda I)_{KK}^{-1} F_{KR} 1`, which minimises the
  damped quadratic with :math:`m_R = 0`. For one channel it is the update of Hassibi and Stork.

- ``"koh_liang"``: the other *parameters* move as well, towards the minimum of the training loss
  without the channel. To first order (:math:`g_\mathrm{val}` the gradient of the validation loss,
  H the Hessian of the training loss)

  .. math:: \Delta L(c) = \Delta L_\text{no compensation}(c)
      + \frac{\partial}{\partial m_c} s^\top \nabla_\theta L_\mathrm{train},
      \qquad s = (H + \lambda I)^{-1} g_\mathrm{val},

  with :math:`\lambda` = ``damping`` itself, s from conjugate gradients, and the second term for all
  channels of a group in one backward pass. If the parameters that scale the channel (its filter,
  its normalisation, the slices that read it) could move, they would undo a small change of the gate
  exactly, and the term would cancel the gradient; so they are held fixed, for all channels of a
  group at once, which takes one solution per group. Hundreds of times the work of the others.

Larger means keep; a negative score predicts that the loss falls when the channel goes.

Which data: examples that the network was *not* trained on. On its training data a network sits near
a minimum: all gradients are close to zero, whatever the channel is worth, and overfitting does not
show.

The expansion holds for small sets of channels; prune a little, score again, and so on, or use
:class:`~tfprune.criteria.ccp.CCP`, which takes them jointly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tfprune.cost import CostModel
from tfprune.criteria.curvature import response_of_parameters
from tfprune.criteria.gates import Matrix, Moments, Remembered, moments
from tfprune.criteria.scores import Scores, Vector, check_choice
from tfprune.criteria.selection import Indices, Quota, Selection
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph

Mode = Literal["no_compensation", "compensation", "koh_liang"]


@dataclass(frozen=True)
class Influence:
    """Predicted rise of the loss when a channel goes; needs TensorFlow, for the gradients.

    Args:
        data: labelled data that the network was not trained on, see
            :func:`tfprune.batches.iterate`; one to four thousand examples do.
        mode: what may make up for a missing channel: nothing, the gates of the others (these are
            then folded into kernels), or all other parameters. See the module's description.
        loss: a function of (labels, outputs) with one value per example, a Keras loss or its name;
            by default cross-entropy as the model's last activation and the labels suggest.
        batches: how many batches to use; ``None`` for all.
        batch_size: for arrays. The gradients need the model's activations for that many examples.
        damping: of the inverse, see the module's description; not used without compensation.
        gradient_term: ``False`` leaves the first-order term out, which gives a score by curvature
            alone (optimal brain damage). Not used with ``mode="compensation"``.
        per_mac: divide by the share of the model's MACs that the channel's removal saves, for
            ``order="global"``.
        train: labelled training data, for ``mode="koh_liang"`` alone.
        iterations: at most so many steps of conjugate gradients, for ``mode="koh_liang"``.
    """

    data: Any
    mode: Mode = "no_compensation"
    loss: Any = None
    batches: int | None = 16
    batch_size: int = 64
    damping: float = 0.1
    gradient_term: bool = True
    per_mac: bool = False
    train: Any = None
    iterations: int = 50
    _found: Remembered = field(default_factory=Remembered, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("no_compensation", "compensation", "koh_liang"))
        check_damping(self.damping)
        if self.iterations < 1:
            raise ArgumentError(
                f"Expected iterations of at least 1. Received: {self.iterations!r}."
            )
        if (self.train is None) == (self.mode == "koh_liang"):
            raise ArgumentError(
                "Expected train=(x_train, y_train) with mode='koh_liang', whose parameters move "
                f"on the training loss, and not otherwise. Received: mode={self.mode!r} "
                f"{'without' if self.train is None else 'with'} train."
            )

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group.

        Raises:
            ArgumentError: the model runs on another backend than TensorFlow, or the loss has no
                value per example.
            DataError: no labels, no examples, or gradients that are not finite.
        """
        found = self._moments(graph)
        values = self._values(graph, found)
        self._found.put(graph, (found, values))
        how = {"no_compensation": "", "compensation": ", gates compensated",
               "koh_liang": ", parameters compensated"}[self.mode]  # fmt: skip
        return Scores(values, f"influence on the loss ({found.examples} examples{how})")

    def select(self, graph: ChannelGraph, quotas: Mapping[str, Quota]) -> Selection:
        """The channels of highest score; with compensation, the kernels that make up for the rest.

        Right after a call on the same graph, its scores are used again.
        """
        if (remembered := self._found.take(graph)) is None:
            found = self._moments(graph)
            remembered = found, self._values(graph, found)
        found, values = remembered
        kept = {name: quota.best(values[name]) for name, quota in quotas.items()}
        if self.mode != "compensation":
            return Selection(kept)
        gates = {
            name: surviving_gates(found.second[name], indices, self.damping)
            for name, indices in kept.items()
        }
        note = "gates of the kept channels, folded into the kernels that read them"
        return Selection(kept, folded(graph, kept, gates), {"compensation": note})

    def _values(self, graph: ChannelGraph, found: Moments) -> dict[str, Vector]:
        if self.mode == "compensation":
            values = {n: compensated_rise(m, self.damping) for n, m in found.second.items()}
        else:
            values = {
                name: rise(found.mean[name], square, self.gradient_term)
                for name, square in found.second.items()
            }
        if self.mode == "koh_liang":
            moved = response_of_parameters(
                graph,
                self.data,
                self.train,
                self.loss,
                batches=self.batches,
                batch_size=self.batch_size,
                damping=self.damping,
                iterations=self.iterations,
            )
            values = {name: value + moved[name] for name, value in values.items()}
        return per_saved_macs(graph, values) if self.per_mac else values

    def _moments(self, graph: ChannelGraph) -> Moments:
        return moments(
            graph,
            self.data,
            self.loss,
            batches=self.batches,
            batch_size=self.batch_size,
            second="full" if self.mode == "compensation" else "diagonal",
        )


def rise(mean: Vector, square: Vector, gradient_term: bool = True) -> Vector:
    """Second-order prediction of the loss's rise when a gate goes from one to zero.

    Args:
        mean: mean gate gradients, shape ``(channels,)``.
        square: their mean squares, of the same shape.
        gradient_term: whether the first order counts.
    """
    return 0.5 * square - mean if gradient_term else 0.5 * square


def compensated_rise(fisher: Matrix, damping: float) -> Vector:
    """The same, if the other gates may move; zeros for a matrix of zeros.

    Args:
        fisher: positive semi-definite, shape ``(channels, channels)``.
        damping: added to the diagonal, in units of its mean; positive.
    """
    damped = _damped(fisher, damping)
    if damped is None:
        return np.zeros(len(fisher))
    return np.asarray(0.5 / np.diag(np.linalg.inv(damped)))


def surviving_gates(fisher: Matrix, kept: Indices, damping: float) -> Vector:
    """What the kept gates should be once all others are zero, shape ``(len(kept),)``.

    Args:
        fisher, damping: as for :func:`compensated_rise`.
        kept: sorted indices.
    """
    damped = _damped(fisher, damping)
    if damped is None:
        return np.ones(len(kept))
    removed = np.setdiff1d(np.arange(len(fisher)), kept)
    pull = fisher[np.ix_(kept, removed)].sum(1)
    return np.asarray(1 + np.linalg.solve(damped[np.ix_(kept, kept)], pull))


def _damped(fisher: Matrix, damping: float) -> Matrix | None:
    """``None`` if the matrix is zero: then no gate does anything."""
    size = float(np.diag(fisher).mean())
    return fisher + damping * size * np.eye(len(fisher)) if size > 0 else None


def folded(
    graph: ChannelGraph, kept: Mapping[str, Indices], gates: Mapping[str, Vector]
) -> dict[str, NDArray[Any]]:
    """Gates of kept channels, multiplied onto the slices of the weights that read them.

    Args:
        graph: the analysed model.
        kept: group name -> sorted indices of the channels that stay.
        gates: group name -> one number per kept channel.

    Returns:
        For ``PruningPlan.values``: full name -> the kept part of the weight, its new values.
    """
    keep = graph.keep(kept)
    channel_gates = np.ones(len(graph.solution.frozen))
    for name, values in gates.items():
        channel_gates[graph[name].channel_ids[kept[name]]] = values
    concerned = {
        id(member.variable) for name in gates for member in graph[name].members if member.masked
    }
    result: dict[str, NDArray[Any]] = {}
    for site in graph.record.sites.values():
        if id(site.variable) not in concerned:
            continue
        value = np.asarray(site.variable)
        dtype, value = value.dtype, value.astype(np.float64)
        for axis, labels in enumerate(site.labels):
            if labels is None:
                continue
            stays = keep(labels)
            value = np.compress(stays, value, axis)
            if axis in site.masked:
                shape = [1] * value.ndim
                shape[axis] = -1
                value = value * channel_gates[graph.channels(labels[stays])].reshape(shape)
        factor = 1.0 if site.scale is None else site.scale(keep)
        result[site.full_name] = (value * factor).astype(dtype)
    return result


def per_saved_macs(graph: ChannelGraph, values: Mapping[str, Vector]) -> dict[str, Vector]:
    """Scores divided by the share of the model's MACs that a channel saves.

    Raises:
        ModelError: the model leaves sizes free, so that its MACs are not known.
        ArgumentError: a channel saves none.
    """
    costs = CostModel(graph)
    mask = costs.full_mask()
    whole = costs.macs(mask)
    result: dict[str, Vector] = {}
    for name, scores in values.items():
        saved = np.empty(len(scores))
        for index, channel in enumerate(graph[name].channel_ids):
            mask[channel] = False
            saved[index] = whole - costs.macs(mask)
            mask[channel] = True
        if not (saved > 0).all():
            raise ArgumentError(
                f"Expected channels whose removal saves MACs, with per_mac=True. Received: group "
                f"{name!r}, where some save none. Leave per_mac out."
            )
        result[name] = scores / (saved / whole)
    return result


def check_damping(damping: float) -> None:
    """Raises :class:`ArgumentError` unless the damping is positive and finite."""
    if not (np.isfinite(damping) and damping > 0):
        raise ArgumentError(
            f"Expected a positive damping: the matrix to invert is singular without. Received: "
            f"{damping!r}. Use 0.1, or 0.01 for less."
        )
