r"""SynExp on channel groups: PreCrop and PreConfig, how wide before any training.

Reference: Cai, Hua, Chen, Suh, De Sa and Zhang, "Structured Pruning is All You Need for Pruning
CNNs at Initialization" (arXiv:2203.02549). The abstract, the opening and reviews were at hand, not
the body: known is that the expected SynFlow score depends on layer densities alone, that PreCrop
maximises the sum of their logarithms under a budget of parameters or MACs by cropping channels
before training, and that PreConfig drops the bound of one so that some layers grow. How the authors
treat residual connections, depthwise convolutions and rounding is not known. What follows is our
derivation.

**By groups** (the default). Channels that go together share one variable: group :math:`g` keeps the
fraction :math:`f_g = e^{x_g}` of its channels. The density of a layer is the product of those of
its kernel's axes, and every cost is a posynomial of the fractions (:mod:`tfprune.cost.posynomial`),
so that

.. math::
    \max_x \sum_g d_g x_g \quad\text{s.t.}\quad \log C_k(e^x) \le \log B_k, \quad
    \log \tfrac{w_g^{\min}}{w_g} \le x_g \le \log u_g

with :math:`d_g` the number of kernel axes that the group stands on is a geometric program: convex,
with residual coupling and budgets exact. An axis that several groups share (behind a concatenation)
has the density :math:`\sum_g n_g f_g / n`, whose logarithm is not linear in x but convex; there
the solution is a local optimum. Sequential quadratic programming (SciPy's SLSQP) finds it, and the
conditions of optimality are checked before it is handed out.

**By layers** (``mode="layers"``), nearer to what is known of the text and only approximate: the
densities of the convex problem of :mod:`tfprune.allocation.layer_densities`, halved between a
kernel's two ends, averaged over a group's layers by their cost, and shifted together until the
budget holds.

Budgets count what :mod:`tfprune.cost` counts, biases and statistics included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tfprune.allocation.budget import Budget, limits_of
from tfprune.allocation.layer_densities import check_reachable, densities
from tfprune.allocation.steps import Constraints, check_patterns, matches
from tfprune.cost import CostModel
from tfprune.cost.posynomial import Posynomial
from tfprune.errors import ArgumentError, BudgetError
from tfprune.graph import ChannelGraph, ChannelGroup

Vector = NDArray[np.float64]

Mode = Literal["groups", "layers"]


@dataclass(frozen=True)
class SynExp:
    """The optimum, before widths are whole numbers.

    Attributes:
        fractions: group name -> fraction of the channels that stay (above 1: that there shall be),
            for every group that may change.
        objective: the sum of the logarithms of all kernels' densities.
        costs: budget name -> cost of the fractions.
        limits: budget name -> the limit.
    """

    fractions: Mapping[str, float]
    objective: float
    costs: Mapping[str, float]
    limits: Mapping[str, float]


def synexp(
    graph: ChannelGraph,
    budget: Budget,
    *,
    lowest: Mapping[str, int] | None = None,
    max_expand: float = 1.0,
    ignore: Sequence[str] = (),
    mode: Mode = "groups",
) -> SynExp:
    """The fractions of channels that maximise SynExp within the budgets.

    Args:
        graph: the analysed model; its weights do not matter.
        budget: limits on MACs, parameters or bytes, one or several.
        lowest: group name -> fewest channels (1 where not named).
        max_expand: largest fraction of any group; 1 for pruning only.
        ignore: names or patterns of groups, or of layers that produce them, which stay as they are.
        mode: ``"groups"`` or ``"layers"``.

    Raises:
        ArgumentError: no budget, ``max_expand`` below 1, an unknown mode or pattern.
        BudgetError: out of reach, or nothing may change.
        ModelError: a budget of MACs for a model with a free size.
    """
    Constraints(ignore=ignore)
    check_patterns(graph, ignore, "ignore")
    if not budget:
        raise ArgumentError("Expected a budget: macs=, params= or size_bytes=. Received: none.")
    if not max_expand >= 1:
        raise ArgumentError(f"Expected max_expand of at least 1. Received: {max_expand!r}.")
    if mode not in ("groups", "layers"):
        raise ArgumentError(f"Expected mode to be 'groups' or 'layers'. Received: {mode!r}.")
    groups = [g for g in graph.prunable if not any(matches(g, pattern) for pattern in ignore)]
    if not groups:
        raise BudgetError(
            "Expected groups whose width may change. Received: none; "
            "print(tfprune.analyse(model)) says why, and ignore may name too many."
        )
    costs = CostModel(graph)
    limits = {name: float(limit) for name, limit in limits_of(budget, costs).items()}
    functions = {name: costs.posynomial(name, groups) for name in limits}
    least = np.array([max(1, (lowest or {}).get(g.name, 1)) / g.width for g in groups])
    for name, function in functions.items():
        check_reachable(function(least), limits[name], name)
    problem = _Problem(graph, groups, functions, limits, np.log(least), np.log(max_expand))
    x = problem.by_groups() if mode == "groups" else problem.by_layers()
    fractions = np.exp(x)
    return SynExp(
        {group.name: float(f) for group, f in zip(groups, fractions, strict=True)},
        problem.axes.objective(x),
        {name: function(fractions) for name, function in functions.items()},
        limits,
    )


@dataclass(frozen=True, eq=False)
class KernelAxes:
    """The labelled axes of all kernels, as far as groups that may change stand on them.

    Attributes:
        shares: shape ``(axes, groups)``: the part of each axis that is each group's.
        fixed: shape ``(axes,)``: the part that stays whatever happens.
        kernel: int array, shape ``(axes,)``: the kernel that each axis belongs to.
        paths: of the kernels' layers.
    """

    shares: Vector
    fixed: Vector
    kernel: NDArray[np.int64]
    paths: tuple[str, ...]

    def densities(self, x: Vector) -> Vector:
        """The density of every axis."""
        return np.asarray(self.fixed + self.shares @ np.exp(x))

    def objective(self, x: Vector) -> float:
        """The sum of the logarithms of all kernels' densities."""
        return float(np.log(self.densities(x)).sum())

    def slopes(self, x: Vector) -> Vector:
        """Derivatives of the objective by x: the incidences d where no axis is shared."""
        return np.asarray((self.shares * np.exp(x) / self.densities(x)[:, None]).sum(axis=0))


def kernel_axes(graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> KernelAxes:
    """The axes of everything that is a layer's matrix: at least two axes, and scored.

    A depthwise kernel has one labelled axis, which counts once; scales and biases have one axis
    and are no kernels.
    """
    column = {group.name: i for i, group in enumerate(groups)}
    shares: list[Vector] = []
    kernel: list[int] = []
    paths: list[str] = []
    for site in graph.record.sites.values():
        if not site.scored or len(site.labels) < 2:
            continue
        for labels in site.labels:
            if labels is None or not len(labels):
                continue
            row = np.zeros(len(groups))
            for owner in graph.group_of[graph.channels(labels)].tolist():
                number = column.get(graph.groups[owner].name, -1) if owner >= 0 else -1
                if number >= 0:
                    row[number] += 1 / len(labels)
            if row.any():
                shares.append(row)
                kernel.append(len(paths))
        paths.append(site.path)
    table = np.array(shares).reshape(-1, len(groups))
    return KernelAxes(table, 1 - table.sum(axis=1), np.array(kernel, np.int64), tuple(paths))


class _Problem:
    """Fractions in logarithms, their bounds, and the budgets."""

    def __init__(
        self,
        graph: ChannelGraph,
        groups: Sequence[ChannelGroup],
        functions: Mapping[str, Posynomial],
        limits: Mapping[str, float],
        low: Vector,
        high: float,
    ) -> None:
        self._graph, self._groups = graph, groups
        self._functions, self._limits = functions, limits
        self._low, self._high = low, np.full(len(groups), high)
        self.axes = kernel_axes(graph, groups)

    def by_groups(self) -> Vector:
        """The optimum within budgets and bounds, by sequential quadratic programming."""
        from scipy.optimize import minimize

        start = self._shifted(np.zeros(len(self._groups)))
        scale = max(float(np.abs(self.axes.slopes(start)).max()), 1.0)

        def constraint(name: str) -> dict[str, Any]:
            function, limit = self._functions[name], self._limits[name]
            return {
                "type": "ineq",
                "fun": lambda x: np.log(limit) - np.log(function(np.exp(x))),
                "jac": lambda x: -function.gradient(np.exp(x)) * np.exp(x) / function(np.exp(x)),
            }

        result = minimize(
            lambda x: -self.axes.objective(x) / scale,
            start,
            jac=lambda x: -self.axes.slopes(x) / scale,
            bounds=list(zip(self._low, self._high, strict=True)),
            constraints=[constraint(name) for name in self._functions],
            method="SLSQP",
            options={"maxiter": 1000, "ftol": 1e-15},
        )
        x = self._used_up(np.clip(np.asarray(result.x, np.float64), self._low, self._high))
        # SLSQP may stop where it can't improve further at float64's resolution, and says then
        # that it failed. What counts is that the conditions of optimality hold.
        violation = self._violation(self.axes.slopes(x) / scale, x)
        if violation > 1e-3:
            raise BudgetError(
                "Expected the solver to settle on widths within the budget. Received: "
                f"{result.message} (conditions of optimality hold to {violation:.1g}). Loosen the "
                "budget, or use mode='layers'."
            )
        return x

    def _violation(self, slopes: Vector, x: Vector) -> float:
        """How far the conditions of optimality are from holding, relative to the objective's slope.

        With multipliers that are not negative the budgets' slopes add up to the objective's, but
        for fractions at a bound.
        """
        from scipy.optimize import nnls

        rows, slack = [], 0.0
        for name, function in self._functions.items():
            cost = function(np.exp(x))
            slack = max(slack, np.log(cost / self._limits[name]))
            if np.log(self._limits[name] / cost) < 1e-5:
                rows.append(function.gradient(np.exp(x)) * np.exp(x) / cost)
        at_low, at_high = x <= self._low + 1e-9, x >= self._high - 1e-9
        columns = [*rows]
        for index in np.flatnonzero(at_high):
            columns.append(np.eye(len(x))[index])
        for index in np.flatnonzero(at_low):
            columns.append(-np.eye(len(x))[index])
        if not columns:
            return float(np.abs(slopes).max())
        _, residual = nnls(np.array(columns).T, slopes)
        return max(float(residual), slack)

    def by_layers(self) -> Vector:
        """Densities by layer, handed to the groups, and shifted until the budgets hold."""
        names = list(self._functions)
        if len(names) > 2:
            raise ArgumentError("Expected at most two budgets with mode='layers'. Received: three.")
        layers = sorted(set(self.axes.kernel.tolist()))
        full = np.ones(len(self._groups))
        table = np.array([self._kernel_costs(name)[layers] for name in names])
        fixed = [self._functions[name](full) - table[k].sum() for k, name in enumerate(names)]
        left = [max(self._limits[name] - fixed[k], 1e-9) for k, name in enumerate(names)]
        logs = np.log(densities(list(table), left, float(np.exp(self._high[0])) ** 2))
        asked, weight = np.zeros(len(full)), np.zeros(len(full))
        for number, layer in enumerate(layers):
            ends = self.axes.shares[self.axes.kernel == layer]
            for end in ends:
                # A kernel with one end that may change asks everything of that one.
                asked += end * table[0, number] * logs[number] / len(ends)
                weight += end * table[0, number]
        return self._shifted(asked / np.maximum(weight, 1e-300))

    def _kernel_costs(self, name: str) -> Vector:
        """The cost of every kernel; kernels of one layer (attention) share its cost evenly."""
        model = CostModel(self._graph)
        by_path = {
            layer.path: layer.macs if name == "macs" else layer.parameters
            for layer in model.cost(model.full_mask()).layers
        }
        paths = self.axes.paths
        return np.array(
            [max((by_path[path] or 0) / paths.count(path), 1.0) for path in paths], np.float64
        )

    def _shifted(self, x: Vector) -> Vector:
        """``x`` plus one number for all, within bounds: the largest that keeps to the budgets."""

        def at(shift: float) -> Vector:
            return np.clip(x + shift, self._low, self._high)

        low = float((self._low - x).min()) - 1.0
        high = float((self._high - x).max()) + 1.0
        if self._fits(at(high)):
            return at(high)
        for _ in range(100):  # beyond float64's resolution
            middle = (low + high) / 2
            low, high = (middle, high) if self._fits(at(middle)) else (low, middle)
        return at(low)

    def _used_up(self, x: Vector) -> Vector:
        """The solver's last digits: fractions strictly between their bounds share what is left."""
        inside = (x > self._low + 1e-9) & (x < self._high - 1e-9)
        if not inside.any():
            return x if self._fits(x) else self._shifted(x)
        low, high = -1e-3, 1e-3
        if not self._fits(np.where(inside, x + low, x)):
            return self._shifted(x)
        for _ in range(60):
            middle = (low + high) / 2
            fits = self._fits(np.clip(np.where(inside, x + middle, x), self._low, self._high))
            low, high = (middle, high) if fits else (low, middle)
        return np.clip(np.where(inside, x + low, x), self._low, self._high)

    def _fits(self, x: Vector) -> bool:
        return all(
            function(np.exp(x)) <= self._limits[name] for name, function in self._functions.items()
        )
