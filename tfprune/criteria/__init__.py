"""Criteria: what a channel is worth. Each is a callable from a channel graph to scores.

Criteria know groups and weights, not slicing; how many channels go is the allocation's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tfprune.criteria.activation import ActivationMean, APoZ
from tfprune.criteria.aofp import AOFP
from tfprune.criteria.batch_norm_scale import BatchNormScale
from tfprune.criteria.ccp import CCP
from tfprune.criteria.chip import CHIP
from tfprune.criteria.fpgm import FPGM
from tfprune.criteria.greedy_norm import GreedyL1
from tfprune.criteria.group_norm import GroupNorm
from tfprune.criteria.hrank import HRank
from tfprune.criteria.influence import Influence
from tfprune.criteria.lasso import Lasso
from tfprune.criteria.nisp import NISP
from tfprune.criteria.norm import L1, L2
from tfprune.criteria.random import Random
from tfprune.criteria.reconstructed import Reconstructed
from tfprune.criteria.scores import Criterion, Scores
from tfprune.criteria.selection import Quota, Selection, Selector
from tfprune.criteria.taylor import Taylor
from tfprune.criteria.thinet import ThiNet
from tfprune.errors import ArgumentError

_WITHOUT_DATA: dict[str, Callable[[], Criterion]] = {
    "l1": L1,
    "greedy_l1": GreedyL1,
    "l2": L2,
    "bn_scale": BatchNormScale,
    "fpgm": FPGM,
    "group_norm": GroupNorm,
    "random": Random,
}
_WITH_DATA: dict[str, Callable[[Any], Criterion]] = {
    "taylor": Taylor,
    "activation_mean": ActivationMean,
    "apoz": APoZ,
    "hrank": HRank,
    "chip": CHIP,
    "nisp": NISP,
    "influence": Influence,
    "ccp": CCP,
    "aofp": AOFP,
    "thinet": ThiNet,
    "lasso": Lasso,
}

__all__ = [
    "AOFP",
    "CCP",
    "CHIP",
    "FPGM",
    "L1",
    "L2",
    "APoZ",
    "ActivationMean",
    "BatchNormScale",
    "Criterion",
    "GreedyL1",
    "GroupNorm",
    "HRank",
    "Lasso",
    "Quota",
    "Random",
    "Reconstructed",
    "Scores",
    "Selection",
    "Selector",
    "Taylor",
    "ThiNet",
    "get",
    "names",
]


def names() -> tuple[str, ...]:
    """The names that :func:`get` knows."""
    return (*_WITHOUT_DATA, *_WITH_DATA)


def get(criterion: Any, data: Any = None) -> Criterion:
    """A criterion from a name or an object.

    Args:
        criterion: a name such as ``"l1"``, or any callable from a graph to scores.
        data: for the names that need data, such as ``"taylor"`` or ``"thinet"``.

    Raises:
        ArgumentError: an unknown name (the message lists the known ones), a name that needs data
            without any, or something that cannot be called.
    """
    if callable(criterion) and not isinstance(criterion, type):
        return criterion  # type: ignore[no-any-return]
    if criterion in _WITHOUT_DATA:
        return _WITHOUT_DATA[criterion]()
    if criterion in _WITH_DATA:
        if data is None:
            raise ArgumentError(
                f"Expected data for criterion {criterion!r}, which looks at activations or "
                f"gradients. Received: none. Pass data=(x_train, y_train) or a tf.data.Dataset; "
                "on the command line, --data NAME."
            )
        return _WITH_DATA[criterion](data)
    received = (
        criterion.__name__ + " (the class; call it)"
        if isinstance(criterion, type)
        else (repr(criterion))
    )
    raise ArgumentError(
        f"Expected a criterion: one of {', '.join(names())}, or a callable from a graph to "
        f"scores. Received: {received}."
    )
