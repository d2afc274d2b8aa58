"""Scores for every group from the dense network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from tfprune.criteria.norm import L1
from tfprune.criteria.reconstruction.moments import Sampling, own_moments
from tfprune.criteria.reconstruction.problem import Problem, Vector, group_problem
from tfprune.criteria.reconstruction.readers import Reader, readers_in, readers_of
from tfprune.criteria.scores import Scores
from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph

# Values in the Gram matrices that are held at once: 1 GB, unless one group needs more.
_AT_ONCE = 2**27


def score_groups(
    graph: ChannelGraph, sampling: Sampling, score: Callable[[Problem], Vector], name: str
) -> Scores:
    """Scores of every prunable group; those without a reader get L1 norms, divided by the largest.

    The data are read once for as many groups as fit into a gigabyte of Gram matrices.

    Raises:
        DataError: no examples, they do not fit the model, or activations that are not finite.
    """
    readers = readers_of(graph)
    by_group = {group.name: readers_in(group, readers) for group in graph.prunable}
    without = [group for group, found in by_group.items() if not found]
    values = dict(L1(normalize="max")(graph).values) if without else {}
    for names in _packed(by_group):
        needed = {reader.path: reader for group in names for reader in by_group[group]}
        moments = own_moments(graph, list(needed.values()), sampling)
        matrices = {path: reader.matrix(reader.kernel) for path, reader in needed.items()}
        for group in names:
            problem = group_problem(graph[group], by_group[group], moments, matrices)
            values[group] = score(problem)
    if without:
        name += f"; L1 norm for {', '.join(map(repr, without))}, which no linear layer reads"
    return Scores({group: values[group] for group in by_group}, name)


def require_readers(
    graph: ChannelGraph, names: Sequence[str], readers: Mapping[str, Reader]
) -> None:
    """Raises :class:`ArgumentError` if no convolution or dense layer reads one of the groups."""
    for name in names:
        group = graph[name]
        if readers_in(group, readers):
            continue
        paths = dict.fromkeys(member.path for member in group.consumers)
        who = f"only {', '.join(map(repr, paths))} reads" if paths else "no layer's weights read"
        raise ArgumentError(
            f"Expected groups that a convolution or a dense layer reads, whose output can be "
            f"reconstructed. Received: {name!r}, which {who}. Leave it whole with "
            f"ignore=[{name!r}], or use a criterion that does not reconstruct, such as 'l1'."
        )


def _packed(by_group: Mapping[str, Sequence[Reader]]) -> Iterator[list[str]]:
    """The groups that have readers, in runs whose Gram matrices fit together."""
    names: list[str] = []
    sizes: dict[str, int] = {}
    for name, readers in by_group.items():
        if not readers:
            continue
        more = {r.path: r.groups * (r.inputs * r.taps) ** 2 for r in readers}
        if names and sum({**sizes, **more}.values()) > _AT_ONCE:
            yield names
            names, sizes = [], {}
        names.append(name)
        sizes.update(more)
    if names:
        yield names
