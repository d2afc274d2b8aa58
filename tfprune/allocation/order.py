"""The orders in which the steps of all groups are taken: uniform, and one global ranking."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tfprune.allocation.steps import Chain

Order = list[int]
"""Chain numbers; the n-th mention of a chain is its n-th step."""


def uniform(chain_list: Sequence[Chain]) -> Order:
    """Every group loses the same fraction of its channels, as far as its widths allow."""
    return _sorted(chain_list, lambda chain, step: 1 - chain.widths[step] / chain.widths[0])


def global_ranking(chain_list: Sequence[Chain]) -> Order:
    """The channels with the lowest scores go first, wherever they are.

    A step of several channels ranks by their mean. Scores must be comparable across groups: the
    criteria's ``normalize`` sees to that.
    """

    def key(chain: Chain, step: int) -> float:
        return float(chain.scores[chain.widths[step] : chain.widths[step - 1]].mean())

    return _sorted(chain_list, key)


def _sorted(chain_list: Sequence[Chain], key: Callable[[Chain, int], float]) -> Order:
    entries: list[tuple[float, int, int]] = []
    for number, chain in enumerate(chain_list):
        highest = -np.inf
        for step in range(1, len(chain.widths)):
            # Steps of one group stay in order, whatever protected channels do to their scores.
            highest = max(highest, key(chain, step))
            entries.append((highest, number, step))
    return [number for _, number, _ in sorted(entries)]


ORDERS: dict[str, Callable[[Sequence[Chain]], Order]] = {
    "uniform": uniform,
    "global": global_ranking,
}
