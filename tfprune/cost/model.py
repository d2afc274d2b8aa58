"""Cost as a function of the kept channels, without rebuilding the model.

Every cost is a sum of terms, each a constant times the numbers of kept positions along one or more
axes: a convolution's MACs are output positions x window x kept inputs x kept outputs. The numbers
of kept positions are one sparse matrix times the mask of kept channels, so that a plan is costed in
well under a millisecond, whatever the model. The terms of a removed block count nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.cost.posynomial import Posynomial
from tfprune.errors import ModelError
from tfprune.graph import ChannelGraph, ChannelGroup, analyse
from tfprune.graph.blocks import calls_of, owner, removal, weights_gone
from tfprune.graph.context import Term
from tfprune.graph.plan import PruningPlan
from tfprune.graph.trace import is_model

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class LayerCost:
    """The cost of one operation.

    Attributes:
        path: its path in the model.
        kind: its class name.
        parameters: number of values in its weights, statistics included (as ``count_params``).
        macs: multiply-accumulates of one example, ``None`` if a size is free.
        activation_bytes: bytes of its outputs for one example, ``None`` if a size is free.
    """

    path: str
    kind: str
    parameters: int
    macs: int | None
    activation_bytes: int | None


@dataclass(frozen=True)
class Cost:
    """The cost of a model, or of what a plan makes of it.

    Attributes:
        parameters: all values in the weights, statistics included (as ``count_params``).
        trainable_parameters: those that training changes: what papers call parameters.
        size_bytes: bytes of all weights in their own types (float32: four per parameter).
        macs: multiply-accumulates of one example in convolutions, dense layers, attention and
            recurrent cells; not those of normalisation, activation and pooling. One MAC is one
            multiplication and one addition: papers that count both print twice as many "FLOPs".
        activation_bytes: bytes of all outputs of all operations for one example.
        layers: the same, operation by operation.
    """

    parameters: int
    trainable_parameters: int
    size_bytes: int
    macs: int | None
    activation_bytes: int | None
    layers: tuple[LayerCost, ...]

    def __str__(self) -> str:
        from tfprune.reports.tables import cost_table

        return cost_table(self)


class _Terms:
    """Terms over shared axes, ready to be evaluated for any mask."""

    def __init__(self, terms: list[Term], axes: _Axes) -> None:
        self.paths = [term.path for term in terms]
        self.known = all(term.coefficient is not None for term in terms)
        self.coefficients = np.array([term.coefficient or 0 for term in terms], np.float64)
        depth = max((len(term.factors) for term in terms), default=0)
        self.factors = np.zeros((len(terms), depth), np.int64)  # axis 0 counts one, always
        for row, term in enumerate(terms):
            for column, labels in enumerate(term.factors):
                self.factors[row, column] = axes.add(labels)

    def values(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """The value of every term."""
        if not self.factors.shape[1]:
            return self.coefficients
        result: NDArray[np.float64] = self.coefficients * counts[self.factors].prod(axis=1)
        return result


class _Axes:
    """Distinct axes (arrays of channels) and the matrix that counts their kept positions."""

    def __init__(self, channel_of: NDArray[np.int64], channels: int) -> None:
        self._channel_of = channel_of
        self._channels = channels
        self._index: dict[bytes, int] = {}
        self.arrays: list[NDArray[np.int64]] = []
        self._matrix: Any = None

    def add(self, labels: NDArray[np.int64]) -> int:
        """The number of an axis, from 1: number 0 stands for the constant one."""
        array = self._channel_of[labels]
        key = array.tobytes()
        known = self._index.get(key)
        if known is None:
            self.arrays.append(array)
            known = self._index[key] = len(self.arrays)
        return known

    def counts(self, mask: Mask) -> NDArray[np.float64]:
        """Kept positions of every axis, with the constant one first."""
        from scipy.sparse import csr_array

        if self._matrix is None:
            lengths = np.array([len(a) for a in self.arrays], np.int64)
            columns = np.concatenate(self.arrays) if self.arrays else np.zeros(0, np.int64)
            self._matrix = csr_array(
                (np.ones(len(columns)), columns, np.concatenate([[0], np.cumsum(lengths)])),
                shape=(len(self.arrays), self._channels),
            )
        return np.concatenate([[1.0], self._matrix @ mask.astype(np.float64)])


class CostModel:
    """The cost of a model as a function of a mask over its channels.

    Attributes:
        graph: the analysed model.
        blocks: names of the blocks that are removed.

    Args:
        graph: the analysed model.
        blocks: names of blocks of this graph that are removed, whatever the mask: they cost
            nothing. All are in the model by default.
    """

    def __init__(self, graph: ChannelGraph, blocks: Collection[str] = ()) -> None:
        self.graph = graph
        self.blocks = tuple(blocks)
        record = graph.record
        self._axes = _Axes(graph.solution.channel_of, len(graph.solution.frozen))
        self._macs = _Terms(record.macs, self._axes)
        self._activations = _Terms(record.activations, self._axes)
        parameters, variables = _parameter_terms(graph)
        self._trainable = np.array([bool(v.trainable) for v in variables], np.float64)
        self._itemsize = np.array([_itemsize(v) for v in variables], np.float64)
        self._parameters = _Terms(parameters, self._axes)
        if blocks:
            left = _Left(graph, blocks)
            self._macs.coefficients *= left.terms(self._macs.paths)
            self._activations.coefficients *= left.terms(self._activations.paths)
            self._parameters.coefficients *= left.weights(variables)

    def full_mask(self) -> Mask:
        """The mask that keeps everything."""
        return np.ones(len(self.graph.solution.frozen), bool)

    def mask(self, plan: PruningPlan | None) -> Mask:
        """The mask of a plan's kept channels.

        Raises:
            PlanError: the plan is for another model.
        """
        if plan is None:
            return self.full_mask()
        return self.graph.keep_mask(plan.for_graph(self.graph).kept)

    def axes(self) -> list[NDArray[np.int64]]:
        """The channels of every distinct axis that something counts."""
        return list(self._axes.arrays)

    def macs(self, mask: Mask) -> int:
        """MACs of one example.

        Raises:
            ModelError: an input has a free size, so that MACs are not a number.
        """
        if not self._macs.known:
            raise ModelError(
                "Expected a model whose MACs are a number. Received: a model with an input of "
                "free size (None), such as any image size. Name the size to count for, "
                "input_shape=(224, 224, 3), or use params= or size_bytes= as the budget."
            )
        return round(float(self._macs.values(self._axes.counts(mask)).sum()))

    def parameters(self, mask: Mask) -> int:
        """Values in all weights."""
        return round(float(self._parameters.values(self._axes.counts(mask)).sum()))

    def size_bytes(self, mask: Mask) -> int:
        """Bytes of all weights."""
        values = self._parameters.values(self._axes.counts(mask))
        return round(float((values * self._itemsize).sum()))

    def posynomial(self, name: str, groups: Sequence[ChannelGroup]) -> Posynomial:
        """A cost as a function of the fractions of some groups that stay; all others stay whole.

        Args:
            name: ``"macs"``, ``"params"`` or ``"size_bytes"``.
            groups: of this graph, in the order of the fractions.

        Raises:
            ModelError: MACs are asked for and an input has a free size.
        """
        full = self.full_mask()
        if name == "macs":
            self.macs(full)  # refuses free sizes
            terms, coefficients = self._macs, self._macs.coefficients
        else:
            terms, coefficients = self._parameters, self._parameters.coefficients
            if name == "size_bytes":
                coefficients = coefficients * self._itemsize
        column = np.full(len(self.graph.groups) + 1, -1)
        position = {group.name: i for i, group in enumerate(self.graph.groups)}
        for i, group in enumerate(groups):
            column[position[group.name]] = i
        free = np.zeros((len(self._axes.arrays) + 1, len(groups)))
        fixed = np.ones(len(free))
        for number, array in enumerate(self._axes.arrays, start=1):
            columns = column[self.graph.group_of[array]]  # -1: no group, the last entry
            np.add.at(free[number], columns[columns >= 0], 1.0)
            fixed[number] = (columns < 0).sum()
        return Posynomial(coefficients, terms.factors, fixed, free)

    def share_of_macs(self) -> dict[str, float]:
        """For each group, the fraction of all MACs that would go with all of its channels.

        A layer between two groups counts for both, so that the shares add up to more than one.
        Empty if the MACs are not a number.
        """
        if not self._macs.known:
            return {}
        counts = self._axes.counts(self.full_mask())
        values = self._macs.values(counts)
        total = values.sum() or 1.0
        # For every axis, which part of it is each group's.
        left = np.ones((len(self.graph.groups), len(values)))
        parts: dict[int, dict[int, float]] = {}
        for number in np.unique(self._macs.factors):
            if number:
                owners = self.graph.group_of[self._axes.arrays[number - 1]]
                groups, hits = np.unique(owners[owners >= 0], return_counts=True)
                size = len(owners)
                parts[int(number)] = dict(zip(groups.tolist(), (hits / size).tolist(), strict=True))
        for column in range(self._macs.factors.shape[1]):
            for row, number in enumerate(self._macs.factors[:, column].tolist()):
                for group, part in parts.get(number, {}).items():
                    left[group, row] *= 1 - part
        shares = ((1 - left) * values).sum(axis=1) / total
        return {
            group.name: float(share) for group, share in zip(self.graph.groups, shares, strict=True)
        }

    def frozen_share_of_macs(self) -> float:
        """The fraction of MACs in operations that neither read nor write a prunable channel."""
        if not self._macs.known:
            return float("nan")
        free = np.zeros(len(self.graph.solution.frozen), bool)
        for group in self.graph.prunable:
            free[group.channel_ids] = True
        touched = np.array([False, *(free[array].any() for array in self._axes.arrays)])
        values = self._macs.values(self._axes.counts(self.full_mask()))
        fixed = ~touched[self._macs.factors].any(axis=1)
        return float(values[fixed].sum() / (values.sum() or 1.0))

    def cost(self, mask: Mask) -> Cost:
        """All costs, operation by operation; those of removed blocks are 0."""
        counts = self._axes.counts(mask)
        parameters = self._parameters.values(counts)
        macs = self._macs.values(counts)
        activations = self._activations.values(counts)
        order: dict[str, list[float]] = {}
        for column, terms, values in (
            (0, self._parameters, parameters),
            (1, self._macs, macs),
            (2, self._activations, activations),
        ):
            for path, value in zip(terms.paths, values.tolist(), strict=True):
                order.setdefault(path, [0.0, 0.0, 0.0])[column] += value
        kinds = {p: type(self.graph.record.ops[k]).__name__
                 for k, p in self.graph.record.paths.items()}  # fmt: skip
        position = {path: i for i, path in enumerate(kinds)}
        layers = tuple(
            LayerCost(
                path=path or "input",
                kind=kinds.get(path, "Input" if not path else ""),
                parameters=round(values[0]),
                macs=round(values[1]) if self._macs.known else None,
                activation_bytes=round(values[2]) if self._activations.known else None,
            )
            for path, values in sorted(order.items(), key=lambda item: position.get(item[0], -1))
        )
        return Cost(
            parameters=round(parameters.sum()),
            trainable_parameters=round((parameters * self._trainable).sum()),
            size_bytes=round((parameters * self._itemsize).sum()),
            macs=round(macs.sum()) if self._macs.known else None,
            activation_bytes=round(activations.sum()) if self._activations.known else None,
            layers=layers,
        )


def measure(model: Any, plan: PruningPlan | None = None, *, input_shape: Any = None) -> Cost:
    """Parameters, MACs and bytes of a model, or of what a plan would make of it.

    Args:
        model: a model, or its :class:`~tfprune.graph.ChannelGraph`.
        plan: if given, the cost after applying it (nothing is rebuilt).
        input_shape: shape of one example, for a model that leaves sizes free.

    Returns:
        The cost, in total and per layer. Printing it gives a table.

    Raises:
        ModelError: the model is subclassed or unbuilt.
        PlanError: the plan is for another model.
    """
    graph = model if isinstance(model, ChannelGraph) else analyse(model, input_shape=input_shape)
    plan = None if plan is None else plan.for_graph(graph)
    costs = CostModel(graph, () if plan is None else plan.blocks)
    return costs.cost(costs.mask(plan))


class _Left:
    """What still counts without some blocks: 1 for each term that does, else 0.

    Args:
        graph: the analysed model.
        blocks: names of the blocks.
    """

    def __init__(self, graph: ChannelGraph, blocks: Collection[str]) -> None:
        self._gone: dict[str, list[bool]] = {}
        removed = removal(graph, blocks)
        for path, _, gone in calls_of(graph, removed):
            self._gone.setdefault(path, []).append(gone)
        self._dropped = weights_gone(graph, removed)

    def terms(self, paths: Sequence[str]) -> NDArray[np.float64]:
        """For terms of calls, from their paths in the order in which calls were labelled."""
        owners = [owner(path, self._gone) for path in paths]
        total = Counter(owners)
        seen: Counter[str | None] = Counter()
        result = np.ones(len(paths))
        for number, of in enumerate(owners):
            if of is not None:
                # Every call of one operation has as many terms.
                calls = self._gone[of]
                result[number] = not calls[seen[of] * len(calls) // total[of]]
            seen[of] += 1
        return result

    def weights(self, variables: Sequence[Any]) -> NDArray[np.float64]:
        """For weights."""
        return np.array([id(variable) not in self._dropped for variable in variables], np.float64)


def _parameter_terms(graph: ChannelGraph) -> tuple[list[Term], list[Any]]:
    """One term per weight, and the weights."""
    record = graph.record
    terms: list[Term] = []
    variables: list[Any] = []
    seen: set[int] = set()

    def add(variable: Any, path: str) -> None:
        if id(variable) in seen:
            return
        seen.add(id(variable))
        site = record.sites.get(id(variable))
        coefficient = 1
        factors = []
        for axis, size in enumerate(variable.shape):
            labels = site.labels[axis] if site is not None else None
            if labels is None:
                coefficient *= int(size)
            else:
                factors.append(labels)
        terms.append(Term(path if site is None else site.path, coefficient, tuple(factors)))
        variables.append(variable)

    for key, op in record.ops.items():
        if not is_model(op):
            for variable in getattr(op, "weights", []):
                add(variable, record.paths[key])
    return terms, variables


def _itemsize(variable: Any) -> int:
    """Bytes of one value of a weight."""
    dtype = variable.dtype if isinstance(variable.dtype, str) else variable.dtype.name
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
