"""What a rule sees and may say: the labels of a call's inputs, and the statements about its op.

A rule is a function ``rule(call: RuleCall) -> labels``. It reads ``call.inputs``, tells which axes
of which weights read or write which labels, and returns the labels of the outputs. Everything it
may say is a method of :class:`RuleCall`; what has been said is kept in a :class:`Record`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tfprune.graph.labels import AxisLabels, Keep, Labels, LabelStore, TensorLabels
from tfprune.graph.trace import Call, Ref, Trace, image_data_format, leaves

Role = Literal["produces", "follows", "consumes"]
"""What a weight does to the labels on one of its axes.

``produces``: the op makes these channels. ``follows``: a parameter per channel (bias excluded:
a bias is part of its producer). ``consumes``: the op reads these channels.
"""

Rewrite = Callable[[Keep], dict[str, Any]]
ArgumentRewrite = Callable[[Keep, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], Any]]
Builder = Callable[[Keep, Callable[[Any], Any]], Any]
Finisher = Callable[[Keep, Any], None]
MaskedCall = Callable[..., Any]


@dataclass
class Site:
    """A weight and the labels along its axes.

    Attributes:
        path: the path of the operation that owns it, such as ``"block1/conv"``.
        name: the weight's name within the operation, such as ``"kernel"``.
        variable: the live variable.
        labels: one entry per axis.
        roles: one entry per axis, ``None`` where the axis has no labels.
        masked: axes whose removed positions the masked model sets to zero (those that read).
        scored: whether criteria count it (a bias produces, but is not the filter).
        scale: multiplies the rebuilt weight, a function of the kept channels, where shapes alone
            would change the function (attention divides by the square root of the key width).
    """

    path: str
    name: str
    variable: Any
    labels: list[AxisLabels]
    roles: list[Role | None]
    masked: set[int] = field(default_factory=set)
    scored: bool = True
    scale: Callable[[Keep], float] | None = None

    @property
    def full_name(self) -> str:
        """The path of the operation and the weight's name, such as ``"block1/conv/kernel"``."""
        return f"{self.path}/{self.name}"


@dataclass(frozen=True)
class Term:
    """``coefficient`` times the number of kept positions of every factor.

    Attributes:
        path: the operation it belongs to.
        coefficient: the untracked part of the product; ``None`` when a size is free.
        factors: label arrays whose kept positions are counted.
    """

    path: str
    coefficient: float | None
    factors: tuple[Labels, ...]


@dataclass
class Record:
    """Everything that the rules said about one model."""

    store: LabelStore = field(default_factory=LabelStore)
    sites: dict[int, Site] = field(default_factory=dict)
    macs: list[Term] = field(default_factory=list)
    activations: list[Term] = field(default_factory=list)
    attributes: dict[tuple[int, str], Labels] = field(default_factory=dict)
    rewrites: dict[int, dict[str, Rewrite]] = field(default_factory=dict)
    argument_rewrites: dict[int, ArgumentRewrite] = field(default_factory=dict)
    builders: dict[int, Builder] = field(default_factory=dict)
    finishers: dict[int, Finisher] = field(default_factory=dict)
    masked_calls: dict[int, MaskedCall] = field(default_factory=dict)
    inexact: list[tuple[Labels, str, str]] = field(default_factory=list)
    traces: dict[int, Trace] = field(default_factory=dict)
    tensors: dict[tuple[int, int, int], TensorLabels] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    ops: dict[int, Any] = field(default_factory=dict)
    keep_alive: list[Any] = field(default_factory=list)


class RuleCall:
    """One application of an operation, as a rule sees it.

    Attributes:
        op: the live layer or operation.
        path: its path, such as ``"encoder/dense_1"``.
        inputs: for each symbolic input tensor, a tuple with one entry per axis (the batch axis
            included): labels, shape ``(size,)``, or ``None`` for an axis that is not tracked.
        input_shapes, output_shapes: static shapes, ``None`` for free sizes.
    """

    def __init__(
        self,
        record: Record,
        call: Call,
        path: str,
        inputs: Sequence[TensorLabels],
        dispatch: Callable[[RuleCall], list[TensorLabels]],
        repeats: int | None = 1,
    ) -> None:
        self.record = record
        self.call = call
        self.op = call.op
        self.path = path
        self.inputs = list(inputs)
        self.input_shapes = [ref.shape for ref in call.inputs]
        self.output_shapes = [ref.shape for ref in call.outputs]
        self._dispatch = dispatch
        self.repeats = repeats
        record.paths.setdefault(id(call.op), path)
        record.ops.setdefault(id(call.op), call.op)

    # -- reading ---------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """The call's arguments by parameter name, with :class:`Ref` for symbolic tensors."""
        try:
            bound = inspect.signature(self._function()).bind(*self.call.args, **self.call.kwargs)
        except (TypeError, ValueError):
            return dict(self.call.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def _function(self) -> Callable[..., Any]:
        """What the call's arguments go to (tf_keras wraps TensorFlow's functions in layers)."""
        function: Callable[..., Any] = getattr(self.op, "function", None) or self.op.call
        return function

    def _parameters(self) -> list[str]:
        return list(inspect.signature(self._function()).parameters)

    def labels_of(self, ref: Ref) -> TensorLabels:
        """The labels of one of the call's input tensors."""
        return self.inputs[[known.key for known in self.call.inputs].index(ref.key)]

    def axis(self, axis: int, rank: int | None = None) -> int:
        """``axis`` counted from the front, for a tensor of ``rank`` (default: the first input)."""
        size = len(self.input_shapes[0]) if rank is None else rank
        return axis % size

    def channel_axis(self) -> int:
        """The channel axis of the first input by the op's ``data_format`` (last by default)."""
        known = getattr(self.op, "data_format", None) or self.arguments().get("data_format")
        if known is None and hasattr(self.op, "data_format"):
            # An operation that was not told asks the user's settings when it runs.
            known = image_data_format(self.op)
        if str(known).startswith(("channels_first", "NC")):
            return 1
        return len(self.input_shapes[0]) - 1

    def channels(self, axis: int, index: int = 0) -> AxisLabels:
        """Labels on ``axis`` of an input; on other axes (space, time) nothing may be removed."""
        labels = self.inputs[index]
        axis %= len(labels)
        for other, known in enumerate(labels):
            if other != axis:
                self.freeze(known, f"an axis over which {type(self.op).__name__} moves")
        return labels[axis]

    @staticmethod
    def product(sizes: Sequence[int | None]) -> int | None:
        """The product of sizes, ``None`` if one is free."""
        return None if any(size is None for size in sizes) else math.prod(sizes)  # type: ignore[arg-type]

    def counted(self, index: int) -> list[Labels | int | None]:
        """The axes of an input without the batch: labels, or sizes where they are not tracked."""
        pairs = zip(self.inputs[index][1:], self.input_shapes[index][1:], strict=True)
        return [size if known is None else known for known, size in pairs]

    # -- saying ----------------------------------------------------------------------------

    def fresh(self, count: int, name: str = "") -> Labels:
        """``count`` new labels: channels that this op makes; ``name`` tells them from others."""
        labels = self.record.store.fresh(count)
        if name and count:
            self.record.names[int(labels[0])] = name
        return labels

    def unite(self, first: AxisLabels, second: AxisLabels) -> AxisLabels:
        """States that two axes carry the same channels; an untracked one freezes the other."""
        if first is None or second is None:
            known = second if first is None else first
            self.freeze(known, "meets a tensor whose channels cannot be removed")
            return None
        self.record.store.unite(first, second, self.path)
        return first

    def freeze(self, labels: AxisLabels | TensorLabels, reason: str) -> None:
        """States that none of the labels may be removed, and why (in words, for the user)."""
        if isinstance(labels, tuple):
            for axis in labels:
                self.record.store.freeze(axis, self.path, reason)
        else:
            self.record.store.freeze(labels, self.path, reason)

    def weight(
        self,
        variable: Any,
        name: str,
        *,
        produces: Mapping[int, AxisLabels] | None = None,
        follows: Mapping[int, AxisLabels] | None = None,
        consumes: Mapping[int, AxisLabels] | None = None,
        masked: Sequence[int] = (),
        scored: bool = True,
        scale: Callable[[Keep], float] | None = None,
    ) -> None:
        """States which labels stand along which axes of a weight.

        Args:
            variable: the variable, or ``None`` (a layer without bias): nothing is said.
            name: its name within the op.
            produces, follows, consumes: axis (negative counts from the end) -> labels, shape
                ``(size of that axis,)``; ``None`` labels are skipped.
            masked: further axes, besides those that consume, whose removed positions the masked
                model zeroes.
            scored: whether criteria look at this weight.
            scale: factor on the rebuilt weight, as a function of what is kept.
        """
        if variable is None:
            return
        rank = len(variable.shape)
        labels: list[AxisLabels] = [None] * rank
        roles: list[Role | None] = [None] * rank
        given: list[tuple[Role, Mapping[int, AxisLabels]]] = [
            ("produces", produces or {}),
            ("follows", follows or {}),
            ("consumes", consumes or {}),
        ]
        for role, axes in given:
            for axis, values in axes.items():
                if values is None:
                    continue
                if len(values) != int(variable.shape[axis]):
                    raise ValueError(
                        f"Expected {int(variable.shape[axis])} labels for axis {axis} of "
                        f"{name!r} at {self.path!r}. Received: {len(values)}."
                    )
                labels[axis % rank] = values
                roles[axis % rank] = role
        zeroed = {axis for axis, role in enumerate(roles) if role == "consumes"}
        zeroed |= {axis % rank for axis in masked}
        site = self.record.sites.get(id(variable))
        if site is None:
            self.record.sites[id(variable)] = Site(
                self.path, name, variable, labels, roles, zeroed, scored, scale
            )
            return
        # A shared weight: every call's labels are equal, axis by axis.
        for axis in range(rank):
            if site.labels[axis] is None and labels[axis] is None:
                continue
            known = site.labels[axis]
            site.labels[axis] = self.unite(site.labels[axis], labels[axis])
            if site.labels[axis] is None:
                site.labels[axis] = known if known is not None else labels[axis]
            site.roles[axis] = min(site.roles[axis], roles[axis], key=_precedence)
        site.masked |= zeroed

    def macs(self, coefficient: float | None, *factors: Labels | int | None) -> None:
        """Adds ``coefficient`` times the product of the factors to the op's MACs.

        MACs are multiply-accumulates of one example. A factor is an int, or labels whose kept
        positions are counted. ``None``: unknown, as a size is free.
        """
        tracked = []
        if coefficient is not None:
            coefficient = None if self.repeats is None else coefficient * self.repeats
        for factor in factors:
            if isinstance(factor, np.ndarray):
                tracked.append(factor)
            elif coefficient is not None:
                coefficient = None if factor is None else coefficient * factor
        self.record.macs.append(Term(self.path, coefficient, tuple(tracked)))

    def attribute(self, name: str, labels: AxisLabels) -> AxisLabels:
        """Names labels that a number in the op's configuration counts; later calls are united."""
        if labels is None:
            return None
        known = self.record.attributes.get((id(self.op), name))
        if known is None:
            self.record.attributes[(id(self.op), name)] = labels
            return labels
        return self.unite(known, labels)

    def size(self, key: str, labels: AxisLabels) -> None:
        """States that entry ``key`` of the op's configuration is the number of kept labels."""
        labels = self.attribute(key, labels)
        if labels is not None:
            kept = labels
            self.config(key, lambda keep: {key: int(keep(kept).sum())})

    def config(self, name: str, rewrite: Rewrite) -> None:
        """Registers new entries for the op's configuration, as a function of what is kept."""
        self.record.rewrites.setdefault(id(self.op), {}).setdefault(name, rewrite)

    def entries(self, op: Any, keep: Keep) -> dict[str, Any]:
        """The new entries for the configuration of ``op``, which this op contains."""
        result: dict[str, Any] = {}
        for rewrite in self.record.rewrites.get(id(op), {}).values():
            result.update(rewrite(keep))
        return result

    def build(self, builder: Builder) -> None:
        """Registers how to make the smaller op, where its configuration is not enough.

        ``builder(keep, rebuild)`` returns a new op; ``rebuild(op)`` rebuilds a contained one.
        """
        self.record.builders.setdefault(id(self.op), builder)

    def finish(self, finisher: Finisher) -> None:
        """Registers what is left to do with the smaller op once it has its weights.

        ``finisher(keep, new)`` sets state of ``new`` that is neither configuration nor weight.
        """
        self.record.finishers.setdefault(id(self.op), finisher)

    def call_arguments(self, rewrite: ArgumentRewrite) -> None:
        """Registers new arguments for this call: ``rewrite(keep, args, kwargs)``."""
        self.record.argument_rewrites.setdefault(id(self.call), rewrite)

    def argument(self, name: str, value: Callable[[Keep], Any]) -> None:
        """Registers a new value for the parameter ``name`` of this call."""
        position = self._parameters().index(name)

        def rewrite(keep: Keep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if position < len(args):
                return (*args[:position], value(keep), *args[position + 1 :]), kwargs
            return args, {**kwargs, name: value(keep)}

        self.call_arguments(rewrite)

    def inexact(self, labels: AxisLabels, why: str, masked: MaskedCall) -> None:
        """States that removing these labels changes statistics, and how to compute without them.

        ``masked(keep, *tensors)`` evaluates the op with removed positions left out of the
        statistics; the values that it returns at removed positions do not matter.
        """
        if labels is not None:
            self.record.inexact.append((labels, self.path, why))
            self.record.masked_calls.setdefault(id(self.call), masked)

    # -- delegating ------------------------------------------------------------------------

    def apply(
        self,
        op: Any,
        inputs: Sequence[TensorLabels],
        input_shapes: Sequence[tuple[int | None, ...]],
        output_shapes: Sequence[tuple[int | None, ...]],
        name: str | None = None,
        repeats: int | None = 1,
    ) -> list[TensorLabels]:
        """Applies another op's rule, as wrappers do; returns the labels of its outputs.

        ``name`` stands in the path (default: the op's own; ``""``: the path of this op).
        ``repeats``: how often the op runs per call of this one, for the MACs.
        """
        shapes = [*input_shapes, *output_shapes]
        refs = [Ref((id(op), -1 - i, 0), shape, "float32") for i, shape in enumerate(shapes)]
        given = tuple(refs[: len(inputs)])
        args = given if len(given) == 1 else (list(given),)
        call = Call(op, args, {}, given, tuple(refs[len(inputs) :]))
        self.record.keep_alive.append(call)
        path = self.path if name == "" else f"{self.path}/{name or op.name}"
        total = None if repeats is None or self.repeats is None else repeats * self.repeats
        return self._dispatch(RuleCall(self.record, call, path, inputs, self._dispatch, total))


def _precedence(role: Role | None) -> int:
    """A weight that one call makes channels with and another reads (tied embeddings) makes them."""
    order: tuple[Role | None, ...] = ("produces", "follows", "consumes", None)
    return order.index(role)


def constant_array(value: Any) -> NDArray[Any] | None:
    """``value`` as an array if it is a constant that a call was given, else ``None``."""
    if isinstance(value, bool | int | float | np.generic | np.ndarray):
        return np.asarray(value)
    if hasattr(value, "numpy") and not hasattr(value, "assign"):
        return np.asarray(value.numpy())
    return None


def refs_in(structure: Any) -> list[Ref]:
    """The symbolic tensors in nested arguments."""
    return [leaf for leaf in leaves(structure) if isinstance(leaf, Ref)]
