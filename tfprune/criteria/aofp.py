r"""AOFP: the filters that the next layer misses least, found by a binary search over random halves.

Reference: X. Ding, G. Ding, Y. Guo, J. Han and C. Yan, "Approximated Oracle Filter Pruning for
Destructive CNN Width Optimization", ICML 2019 (PMLR 97:1607-1616), arXiv:1905.04748. The search
below is read in the authors' code (PyTorch and TensorFlow 1); sheet B1, steps 3 and 4.

An oracle would remove every filter in turn and see what it does to the network. Here a random half
D of the search space U is zeroed at a time, and what the next layer's output loses by it
(:mod:`tfprune.criteria.damage`), t, is booked on each member: :math:`T_j \mathrel{+}= t, N_j
\mathrel{+}= 1` for j in D. After a number of draws, a *half*, the :math:`g = \lfloor |U| / 2
\rfloor` filters of the smallest mean :math:`\bar t_j = T_j / N_j` are picked; *worst* is the
largest among them. Then

- *accept* if worst is below the threshold theta: all of them are removed at once, a *move*, and the
  search begins anew with everything that is left;
- *refine* if g > 1: U becomes the picked half, and is measured in its turn;
- *give up* otherwise, and begin anew with everything that is left.

This module has the search itself, as functions without a network, and a criterion on a network that
stands still. The method that trains at the same time, as the paper does, is
:class:`tfprune.methods.ApproximatedOracle`.

*The criterion* knows no theta, which an allocation finds. It descends to the end, U to half of U
down to one filter; the order of the descent's picked half is: the finest half first, then what each
coarser one adds, by mean damage in the finest half that a filter took part in. That half is removed
(the largest move that the paper knows) and the next descent begins among the rest, with the removed
channels zero on both paths, until one filter is left. So the order is that of the paper's moves on
weights that stand still, under a theta that rises, except that within a move the search is not
begun anew. The score is the mean damage at which a filter's turn came, raised to the largest so
far: scores are nested, and as t is relative to the energy of the output, comparable across groups,
as one theta for all layers is in the paper.

How much is measured. A half's mean damages carry the noise of random partners, which grows with
:math:`\sqrt g`, while a channel's own part does not: D draws tell channels apart with a ratio of
signal to noise of about :math:`\sqrt{D / g}`, whatever the width (derived, for channels whose
damages add up). So a half takes a number of draws *per channel* of its space; a group of C channels
takes about 4 C times as many in all. The paper's 1000 draws per half are 2 per channel of a layer
of 512, and 16 for one of 64.

Departures. The authors score in training mode, which normalises the ablated batch by its own
statistics, and so understates damage and disturbs the moving averages: inference mode here, as the
sheet recommends. TensorFlow 1's first half of a move accepts a power of two of filters: always g
here. The paper skips layers without a single reader: see the damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tfprune.arguments import check_whole
from tfprune.criteria.damage import Damage, damage_of
from tfprune.criteria.reconstruction.ranking import rising
from tfprune.criteria.scores import Scores, Vector
from tfprune.graph import ChannelGraph, analyse
from tfprune.graph.evaluate import flatten
from tfprune.workers import Examples, PortableModel, check_executor, gather, run_tasks

Indices = NDArray[np.int64]
Decision = Literal["accept", "refine", "give up"]

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Search:
    """Where the search in one group stands.

    Attributes:
        alive: sorted channels that are not removed (b = 1).
        space: sorted channels that are searched, U.
        total: T, shape ``(width,)``.
        count: N, shape ``(width,)``.
        steps: draws since the half began.
    """

    alive: Indices
    space: Indices
    total: Vector
    count: Vector
    steps: int = 0


def begin(width: int, alive: Indices, space: Indices | None = None) -> Search:
    """A half that begins.

    Args:
        width: of the group.
        alive: channels that are not removed.
        space: of the search; ``None`` for all of them.
    """
    space = alive if space is None else space
    return Search(np.sort(alive), np.sort(space), np.zeros(width), np.zeros(width))


def draw(random: np.random.Generator, space: Indices) -> Indices:
    """floor(|U| / 2) members of U without replacement, sorted."""
    return np.sort(random.choice(space, len(space) // 2, replace=False))


def tallied(search: Search, dropped: Indices, damage: float) -> Search:
    """The search after one draw."""
    total, count = search.total.copy(), search.count.copy()
    total[dropped] += damage
    count[dropped] += 1
    return replace(search, total=total, count=count, steps=search.steps + 1)


def ranked(search: Search) -> tuple[Indices, Vector]:
    """The members of U by rising mean damage (equals by index), and these means.

    The mean of a channel that was never dropped is infinite: it is picked last.
    """
    count = search.count[search.space]
    means = np.where(count > 0, search.total[search.space] / np.maximum(count, 1), np.inf)
    order = np.argsort(means, kind="stable")
    return search.space[order], means[order]


def decided(
    search: Search, theta: float, least: int = 1, fixed: Indices = _NONE
) -> tuple[Search, Decision, float]:
    """The end of a half.

    Args:
        search: with all draws of the half; U has two members or more.
        theta: the threshold; a move needs a damage strictly below it.
        least: fewest channels that stay. A move that would leave fewer is refined instead.
        fixed: channels that are never searched.

    Returns:
        The search as it goes on, what was decided, and the worst damage among the picked half.
        After "accept" what was removed is no longer among ``alive``.
    """
    order, means = ranked(search)
    size = len(order) // 2
    picked, worst = order[:size], float(means[size - 1])
    width = len(search.total)
    if worst < theta and len(search.alive) - size >= least:
        alive = np.setdiff1d(search.alive, picked)
        return begin(width, alive, np.setdiff1d(alive, fixed)), "accept", worst
    if size > 1:
        return begin(width, search.alive, picked), "refine", worst
    again = begin(width, search.alive, np.setdiff1d(search.alive, fixed))
    return again, "give up", worst


def goes_on(search: Search, least: int = 1) -> bool:
    """Whether there is anything left to remove."""
    return len(search.space) > 1 and len(search.alive) > least


def removal_order(
    width: int,
    damage: Damage,
    random: np.random.Generator,
    *,
    draws: int,
    halves: int | None = None,
) -> tuple[Indices, Vector]:
    """All channels but one in the order in which the search removes them; nothing is trained.

    Args:
        width: of the group.
        damage: measures it.
        random: draws the halves.
        draws: per half and channel of the space that is searched.
        halves: most halves of one descent; ``None`` for down to one filter.

    Returns:
        Channels, and the mean damage of each in the finest half it took part in; both of shape
        ``(width - 1,)``. A channel that was never dropped has the largest mean of its half.
    """
    alive = np.arange(width)
    order: list[Indices] = []
    means: list[Vector] = []
    number = 0
    while len(alive) > 1:
        space = alive
        parts: list[tuple[Indices, Vector, int]] = []
        # The first half picks what goes; those after it put that into order.
        while len(space) > 1 and (halves is None or len(parts) < halves):
            search = begin(width, alive, space)
            for _ in range(draws * len(space)):
                dropped = draw(random, space)
                search = tallied(search, dropped, damage(number, alive, dropped))
                number += 1
            channels, values = ranked(search)
            values = np.where(np.isinf(values), values[np.isfinite(values)].max(), values)
            space = np.sort(channels[: len(space) // 2])
            parts.append((channels, values, len(space)))
        last, values, size = parts[-1]
        order.append(last[:size])
        means.append(values[:size])
        for channels, values, size in reversed(parts[1:]):
            order.append(channels[size:])
            means.append(values[size:])
        alive = np.setdiff1d(alive, parts[0][0][: parts[0][2]])
    return np.concatenate([_NONE, *order]), np.concatenate([np.zeros(0), *means])


@dataclass(frozen=True)
class AOFP:
    """The damage to the next layer's output when a channel's turn comes in the binary search.

    For a network that stands still; for the paper's training see
    :class:`tfprune.methods.ApproximatedOracle`. Labels are not needed. Groups that are read inside
    layers (attention heads) are scored by the damage at the model's outputs, by the same search,
    which takes a pass through the whole model per draw.

    Memory: for one group at a time, the inputs and outputs of the layers that read it, for all
    batches.

    Args:
        data: training data; labels are not used.
        halves: most halves of one descent; ``None`` for down to one filter, as the paper's goes
            if nothing is accepted before.
        draws: how many random halves are measured for one half of the search, per channel of the
            space; each on one batch, in turn.
        batches: how many batches to use; ``None`` for all. They are read into memory.
        batch_size: for arrays.
        seed: of the draws. Every group has its own, so that it does not matter where it is scored.
        executor: where the groups are scored: see :mod:`tfprune.workers`; ``None`` for this
            process. The scores are the same.

    Raises:
        ArgumentError: a number out of range, or no executor.
    """

    data: Any
    halves: int | None = None
    draws: int = 4
    batches: int | None = 4
    batch_size: int = 64
    seed: int = 0
    executor: Executor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (
            ("halves", 1), ("draws", 1), ("batches", 1), ("batch_size", 1), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            optional = name in ("halves", "batches")
            if not (optional and value is None):
                check_whole(name, value, least)
        check_executor(self.executor)

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group.

        Raises:
            DataError: no examples, they do not fit the model, or activations that are not finite.
            ArgumentError: with an executor, a model that cannot be sent to other processes.
        """
        shape = getattr(graph.model, "input_shape", None)
        examples = gather(
            self.data, batches=self.batches, batch_size=self.batch_size, input_shape=shape
        )
        shared = _Shared(
            PortableModel(graph.model), Examples(examples.x, None, examples.batch_size)
        )
        tasks = [
            _Task(group.name, self.halves, self.draws, (self.seed, number))
            for number, group in enumerate(graph.prunable)
        ]
        found: dict[int, Vector] = {}
        with closing(run_tasks(self.executor, _score, shared, tasks)) as results:
            found.update(results)
        return Scores(
            {task.group: found[number] for number, task in enumerate(tasks)},
            f"AOFP, frozen weights ({self.draws} draws per channel)",
        )


@dataclass(frozen=True, eq=False)
class _Shared:
    model: PortableModel
    examples: Examples

    def open(self) -> _Opened:
        batches = [[np.asarray(part) for part in flatten(x)] for x, _ in self.examples.batches()]
        return _Opened(analyse(self.model.model), batches)


@dataclass(frozen=True, eq=False)
class _Opened:
    graph: ChannelGraph
    batches: Sequence[Sequence[NDArray[Any]]]


@dataclass(frozen=True)
class _Task:
    group: str
    halves: int | None
    draws: int
    seed: tuple[int, int]


def _score(opened: _Opened, task: _Task) -> Vector:
    width = opened.graph[task.group].width
    damage = damage_of(opened.graph, task.group, opened.batches)
    random = np.random.default_rng(task.seed)
    order, means = removal_order(width, damage, random, draws=task.draws, halves=task.halves)
    # What is left in the end is worth more than all that went.
    left = np.setdiff1d(np.arange(width), order)
    last = means[-1:] if len(means) else np.zeros(1)
    return rising(np.append(order, left), np.append(means, last))
