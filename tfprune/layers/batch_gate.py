r"""Gates that look at a batch: one value per channel, between 0 and 1, from averaged activations.

Three parts. :class:`BatchGate` looks at one tensor of a channel group and gives a value v for each
of its channels; :class:`GateProduct` multiplies v onto a tensor in front of a layer that reads the
group; :func:`with_gates` puts both into a model, and :func:`without_gates` takes them out again.

The channel graph looks through them: channels pass a product as they are, and a gate neither makes
nor reads channels. So a model with gates has the groups, MACs and scores of the one without.

Reference: J.-H. Luo and J. Wu, "AutoPruner: An End-to-End Trainable Filter Pruning Method for
Efficient Deep Model Inference", Pattern Recognition 107:107461, 2020, arXiv:1805.08941. The details
are read in the authors' code; the paper's text was not at hand. Sheet B4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from tfprune.errors import ModelError
from tfprune.graph import ChannelGraph, rule
from tfprune.graph.remake import remake
from tfprune.graph.replay import copy_trainable, replay
from tfprune.graph.trace import Call, Ref, Trace, all_layers, is_model, map_leaves, trace

_CERTAIN = 0.2
"""A value below this, or above one minus this, counts as decided."""
_ENOUGH = 0.9
"""The share of decided values from which on the slope need not be raised."""


@dataclass(frozen=True)
class GateRules:
    """How a gate's slope and penalty change while it trains.

    Attributes:
        alpha: slope of the sigmoid in the first step, and from step ``alpha_steps`` on.
        alpha_steps: training steps over which the slope grows linearly.
        alpha_every: the slope changes once in so many steps.
        alpha_raise: what the adaptive rules add to the whole remaining slope, each time.
        grace: steps before too few decided values raise the slope.
        penalty: lambda at first.
        adaptive_penalty: whether lambda follows the code.
        every: steps from one code to the next.
    """

    alpha: tuple[float, float]
    alpha_steps: int
    alpha_every: int
    alpha_raise: float
    grace: int
    penalty: float
    adaptive_penalty: bool
    every: int

    def slope(self, step: Any, raised: Any) -> Any:
        """alpha in a training step, counted from 0, after the adaptive rules added ``raised``."""
        start, stop = self.alpha
        reached = ops.cast(step // self.alpha_every * self.alpha_every, "float32")
        return start + (stop - start) * ops.minimum(reached / self.alpha_steps, 1.0) + raised


@dataclass(frozen=True)
class GateState:
    """What a gate remembers; ``keras.ops`` tensors or anything like them.

    Attributes:
        steps: training steps made, int32.
        bits, values: sums of 1[v > 0.5] and of v since the last code, float32, shape ``(width,)``.
        code, mean: the averages of both when the last code was taken.
        penalty: lambda.
        raised: what the adaptive rules have added to alpha.
        guard: the share of pruned channels that is too much.
    """

    steps: Any
    bits: Any
    values: Any
    code: Any
    mean: Any
    penalty: Any
    raised: Any
    guard: Any

    def after(self, v: Any, keep: float, rules: GateRules) -> GateState:
        """The state after a training step that gave the values ``v``, shape ``(width,)``."""
        steps = self.steps + 1
        bits = self.bits + ops.cast(v > 0.5, "float32")
        values = self.values + v
        code = bits / rules.every
        done = ops.equal(steps % rules.every, 0)
        kept = ops.mean(ops.cast(code > 0.5, "float32"))
        decided = ops.mean(
            ops.cast(ops.logical_or(v < _CERTAIN, v > 1 - _CERTAIN), "float32")
        )  # fmt: skip
        blunt = ops.logical_and(steps >= rules.grace, decided < _ENOUGH)
        over = ops.logical_and(done, 1 - kept >= self.guard)
        raises = ops.cast(ops.logical_and(done, blunt), "float32") + ops.cast(over, "float32")
        penalty = self.penalty
        if rules.adaptive_penalty:
            penalty = ops.where(done, 100.0 * ops.abs(keep - kept), penalty)
        return GateState(
            steps=steps,
            bits=ops.where(done, 0.0, bits),
            values=ops.where(done, 0.0, values),
            code=ops.where(done, code, self.code),
            mean=ops.where(done, values / rules.every, self.mean),
            penalty=penalty,
            raised=self.raised + rules.alpha_raise * raises,
            guard=ops.where(over, ops.maximum(self.guard - 0.05, 1.0 - keep), self.guard),
        )


@keras.saving.register_keras_serializable(package="tfprune")
class BatchGate(keras.layers.Layer):  # type: ignore[misc]
    r"""One value per channel of a group, from a batch of one of its tensors.

    In training, with :math:`\bar x` the average over the batch, pooled,

    .. math:: z = W^\top \bar x + b, \qquad v = \sigma(\alpha z),

    and the loss gets :math:`\lambda (\lVert v \rVert_1 / C - r)^2`. Every so many steps the code,
    the average of 1[v > 0.5] since the last, is stored. In inference mode the output is
    1[code > 0.5].

    A tensor of shape ``(batch, *space, channels)`` is pooled along each axis of space that is
    longer than ``map_size``: first the maximum of two neighbours, then, if still too long, to
    ``map_size`` averages. An axis of free size is averaged whole. Where a channel has several
    positions (behind a flatten), these are averaged to ``map_size**2`` at most.

    Attributes:
        kernel, bias: W, shape ``(pooled size, channels)``, and b, float32.

    Args:
        group: name of the group, to tell what the gate is for.
        positions: for every channel the positions along ``axis`` that carry it.
        axis: of the input, counted from the front.
        keep: r, the fraction of channels to keep.
        map_size: longest side of the pooled map.
        rules: of slope and penalty: :class:`GateRules`, or its fields as a dict.
        seed: of the first W.
    """

    def __init__(
        self,
        group: str,
        positions: Sequence[Sequence[int]],
        axis: int,
        keep: float,
        map_size: int,
        rules: GateRules | Mapping[str, Any],
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        # Values of all precisions come in, and are averaged in float32.
        super().__init__(**{**kwargs, "dtype": "float32", "autocast": False})
        self.group = group
        self.axis = axis
        self.keep = keep
        self.map_size = map_size
        self.rules = rules if isinstance(rules, GateRules) else _rules(rules)
        self.seed = seed
        self._positions = np.array(positions, np.int32)
        self.supports_masking = True

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """None: values have no time steps."""

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {
            **super().get_config(),
            "group": self.group,
            "positions": self._positions.tolist(),
            "axis": self.axis,
            "keep": self.keep,
            "map_size": self.map_size,
            "rules": dataclasses.asdict(self.rules),
            "seed": self.seed,
        }

    def build(self, input_shape: Any) -> None:
        """Makes W, b and the state."""
        width, several = self._positions.shape
        space = [size for i, size in enumerate(input_shape) if i not in (0, self.axis)]
        pooled = [_pooled_size(size, self.map_size) for size in space]
        self._space = tuple(space)
        self._within = min(several, max(1, self.map_size**2 // math.prod(pooled)))
        entries = math.prod(pooled) * self._within * width
        self.kernel = self.add_weight(
            name="kernel",
            shape=(entries, width),
            initializer=keras.initializers.RandomNormal(
                stddev=10 * math.sqrt(2 / entries), seed=self.seed
            ),
        )
        self.bias = self.add_weight(name="bias", shape=(width,), initializer="zeros")
        first = {
            "bits": np.zeros(width), "values": np.zeros(width), "code": np.ones(width),
            "mean": np.ones(width), "penalty": np.array(self.rules.penalty),
            "raised": np.array(0.0), "guard": np.array(0.95),
        }  # fmt: skip
        weights = {name: self._state(name, value) for name, value in first.items()}
        steps = self._state("steps", np.array(0, np.int32))
        self.state = GateState(steps=steps, **weights)
        self.built = True

    def _state(self, name: str, value: NDArray[Any]) -> Any:
        counter = value.dtype.kind == "i"
        return self.add_weight(
            name=name,
            shape=value.shape,
            initializer=keras.initializers.Constant(value.item() if not value.ndim else value[0]),
            dtype="int32" if counter else "float32",
            trainable=False,
            # Each device has its own v, and all of them the average of what follows from it.
            aggregation="only_first_replica" if counter else "mean",
        )

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The values: float32, shape ``(channels,)``."""
        if not training:
            return ops.cast(self.state.code > 0.5, "float32")
        state = GateState(
            **{
                field.name: ops.convert_to_tensor(getattr(self.state, field.name))
                for field in dataclasses.fields(GateState)
            }
        )
        v = self.values(inputs, self.rules.slope(state.steps, state.raised))
        self.add_loss(state.penalty * ops.square(ops.mean(v) - self.keep))
        new = state.after(ops.stop_gradient(v), self.keep, self.rules)
        for field in dataclasses.fields(GateState):
            getattr(self.state, field.name).assign(getattr(new, field.name))
        return v

    def values(self, inputs: Any, alpha: Any) -> Any:
        """v in training mode, at the slope ``alpha``."""
        z = ops.matmul(self.features(inputs)[None], self.kernel)[0] + self.bias
        return ops.sigmoid(alpha * z)

    def features(self, inputs: Any) -> Any:
        """The batch's average, pooled and flattened: float32, shape ``(pooled size,)``."""
        x = ops.moveaxis(ops.mean(ops.cast(inputs, "float32"), axis=0), self.axis - 1, -1)
        width, several = self._positions.shape
        if several > 1 or not np.array_equal(self._positions[:, 0], np.arange(x.shape[-1])):
            x = ops.take(x, self._positions.T.reshape(-1), axis=-1)
        for axis, size in enumerate(self._space):
            x = _largest(x, axis, size, self.map_size)
        pooled = [_pooled_size(size, self.map_size) for size in self._space]
        for axis, size in enumerate(pooled):
            x = _averaged(x, axis, size)
        x = ops.reshape(x, (*pooled, several, width))
        return ops.reshape(_averaged(x, len(pooled), self._within), (-1,))

    def judged(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The stored code and the average of v with it; before there is one, those so far."""
        steps = self.steps_made
        names = ("bits", "values") if 0 < steps < self.rules.every else ("code", "mean")
        count = steps if 0 < steps < self.rules.every else 1
        first, second = (np.asarray(getattr(self.state, name), np.float64) for name in names)
        return first / count, second / count

    @property
    def steps_made(self) -> int:
        """Training steps so far."""
        return int(np.asarray(self.state.steps))

    @property
    def alpha(self) -> float:
        """The slope of the next training step."""
        return float(self.rules.slope(ops.convert_to_tensor(self.state.steps), self.state.raised))


def _rules(fields: Mapping[str, Any]) -> GateRules:
    start, stop = fields["alpha"]
    return GateRules(**{**fields, "alpha": (start, stop)})


def _pooled_size(size: int | None, limit: int) -> int:
    if size is None:
        return 1
    return size if size <= limit else min(limit, size // 2)


def _largest(x: Any, axis: int, size: int | None, limit: int) -> Any:
    """The larger of two neighbours each, along an axis that is longer than ``limit``.

    The mean of all along one of free size.
    """
    if size is None:
        return ops.mean(x, axis=axis, keepdims=True)
    if size <= limit:
        return x
    x = ops.moveaxis(x, axis, 0)[: size // 2 * 2]
    return ops.moveaxis(ops.max(ops.reshape(x, (size // 2, 2, *x.shape[1:])), axis=1), 0, axis)


def _averaged(x: Any, axis: int, limit: int) -> Any:
    """An axis of fixed size as at most ``limit`` averages over neighbours.

    Average i of m is that of the entries from floor(i n / m) up to ceil((i + 1) n / m), as adaptive
    average pooling has it in other libraries.
    """
    size = x.shape[axis]
    if size <= limit:
        return x
    matrix = np.zeros((limit, size), np.float32)
    for i in range(limit):
        start, stop = i * size // limit, -(-(i + 1) * size // limit)
        matrix[i, start:stop] = 1 / (stop - start)
    return ops.moveaxis(ops.tensordot(matrix, x, axes=[[1], [axis]]), 0, axis)


@keras.saving.register_keras_serializable(package="tfprune")
class GateProduct(keras.layers.Layer):  # type: ignore[misc]
    """Multiplies the values of gates onto a tensor along one axis.

    Args:
        axis: of the tensor, counted from the front.
        index: for every position along the axis the number of its value among those of all gates,
            one after the other; their total number for a position without a gate.
    """

    def __init__(self, axis: int, index: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "dtype": "float32", "autocast": False})
        self.axis = axis
        self._index = np.array(index, np.int32)
        self.supports_masking = True
        self.built = True

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "axis": self.axis, "index": self._index.tolist()}

    def call(self, inputs: Any, gates: Sequence[Any]) -> Any:
        """The products, in the type of the tensor.

        Args:
            inputs: the tensor.
            gates: one tensor of values per gate, shape ``(channels,)``.
        """
        factors = ops.take(ops.concatenate([*gates, ops.ones(1)]), self._index)
        shape = [-1 if axis == self.axis else 1 for axis in range(len(inputs.shape))]
        return inputs * ops.cast(ops.reshape(factors, shape), inputs.dtype)


# Gates hide nothing from the channel graph: surgery takes place on the model without them.
rule(BatchGate, lambda call: tuple(None for _ in call.output_shapes[0]))
rule(GateProduct, lambda call: call.inputs[0])


@dataclass(frozen=True, eq=False)
class Place:
    """Where a group is read.

    Attributes:
        call: the call that reads it, of the graph's trace.
        ref: the tensor among its inputs.
        axis: the axis of this tensor along which the channels stand.
        channels: int array, shape ``(size of the axis,)``: the group's channel at every position,
            -1 for others.
    """

    call: Call
    ref: Ref
    axis: int
    channels: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class GateSite:
    """A group that gets a gate.

    Attributes:
        group: its name.
        width: how many channels it has.
        places: where it is read, in the order of the calls, all in one model; the gate looks at
            the tensor of the first, which holds every channel equally often.
    """

    group: str
    width: int
    places: tuple[Place, ...]

    @property
    def positions(self) -> NDArray[np.int64]:
        """Of every channel in the tensor that the gate sees: shape ``(width, positions)``."""
        channels = self.places[0].channels
        order = np.argsort(channels, kind="stable")[np.count_nonzero(channels < 0) :]
        return order.reshape(self.width, -1)


def with_gates(
    graph: ChannelGraph,
    sites: Mapping[str, GateSite],
    keep: Mapping[str, float],
    *,
    rules: GateRules,
    map_size: int = 7,
    seed: int = 0,
) -> Any:
    """A copy of a model, weights included, with gates in it, uncompiled.

    Args:
        graph: the analysed functional Keras 3 model.
        sites: group name -> where the gate stands.
        keep: group name -> the fraction of channels to keep, r.
        rules, map_size, seed: of the gates.

    Raises:
        ModelError: another kind of model, or a layer cannot be made from its configuration.
    """
    if graph.framework != "keras":
        raise ModelError(
            f"Expected a Keras 3 model. Received: {graph.model.name!r} of tf_keras, in which the "
            "gates have no place. Build it with Keras 3 and set its weights."
        )
    gates = {
        name: BatchGate(
            name, site.positions.tolist(), site.places[0].axis, keep[name], map_size, rules,
            seed + number, name=f"batch_gate_{number}",
        )
        for number, (name, site) in enumerate(sites.items())
    }  # fmt: skip
    inserting = _Inserting(sites, gates)
    return _again(graph.model, inserting, inserting.made)


class _Inserting:
    """From a trace to one with gates and products."""

    def __init__(self, sites: Mapping[str, GateSite], gates: Mapping[str, BatchGate]) -> None:
        self._sites, self._gates = sites, gates
        self._places: dict[int, list[tuple[str, Place]]] = {}
        for name, site in sites.items():
            for place in site.places:
                self._places.setdefault(id(place.call.op), []).append((name, place))
        self.made: list[Any] = list(gates.values())

    def __call__(self, traced: Trace) -> Trace:
        values: dict[str, Ref] = {}
        products: dict[Any, Ref] = {}
        calls: list[Call] = []
        for call in traced.calls:
            found: dict[tuple[Any, int], dict[str, Place]] = {}
            for name, place in self._places.get(id(call.op), ()):
                if any(ref.key == place.ref.key for ref in call.inputs):
                    found.setdefault((place.ref.key, place.axis), {})[name] = place
            now = {ref.key: ref for ref in call.inputs}
            for (key, axis), several in found.items():
                for name in several:
                    if name not in values:
                        gate, site = self._gates[name], self._sites[name]
                        seen = site.places[0].ref
                        values[name] = _output(gate, (site.width,), "float32")
                        calls.append(Call(gate, (seen,), {}, (seen,), (values[name],)))
                wanted = (now[key].key, axis, tuple(several))
                if wanted not in products:
                    calls.append(self._product(now[key], axis, several, values))
                    products[wanted] = calls[-1].outputs[0]
                now[key] = products[wanted]
            calls.append(_reading(call, now))
        return dataclasses.replace(traced, calls=tuple(calls))

    def _product(
        self, ref: Ref, axis: int, several: Mapping[str, Place], values: Mapping[str, Ref]
    ) -> Call:
        widths = [self._sites[name].width for name in several]
        index = np.full(int(ref.shape[axis] or 0), sum(widths), np.int64)
        starts = np.cumsum([0, *widths])
        for start, place in zip(starts, several.values(), strict=False):
            here = place.channels >= 0
            index[here] = start + place.channels[here]
        number = len(self.made) - len(self._gates)
        product = GateProduct(axis, index.tolist(), name=f"gate_product_{number}")
        self.made.append(product)
        gates = [values[name] for name in several]
        result = _output(product, ref.shape, ref.dtype)
        return Call(product, (ref, gates), {}, (ref, *gates), (result,))


def _output(layer: Any, shape: tuple[int | None, ...], dtype: str) -> Ref:
    return Ref((id(layer), 0, 0), shape, dtype)


def _reading(call: Call, now: Mapping[Any, Ref]) -> Call:
    """The call with other tensors in the place of some of its inputs."""

    def fill(leaf: Any) -> Any:
        return now[leaf.key] if isinstance(leaf, Ref) else leaf

    inputs = tuple(now[ref.key] for ref in call.inputs)
    return dataclasses.replace(
        call, args=map_leaves(fill, call.args), kwargs=map_leaves(fill, call.kwargs), inputs=inputs
    )


def without_gates(model: Any) -> Any:
    """A copy of a model, weights included, without the gates in it, uncompiled.

    Args:
        model: with gates, from :func:`with_gates` or made from such a one; its other layers, their
            names and their calls stay.
    """

    def skipped(traced: Trace) -> dict[int, Ref | None]:
        return {
            id(call): call.inputs[0] if isinstance(call.op, GateProduct) else None
            for call in traced.calls
            if isinstance(call.op, GateProduct | BatchGate)
        }

    return _again(model, lambda traced: traced, (), skipped)


def gates_of(model: Any) -> dict[str, BatchGate]:
    """The gates in a model, nested ones included, by the name of their group."""
    gates = (layer for layer in all_layers(model) if isinstance(layer, BatchGate))
    return {gate.group: gate for gate in gates}


def _again(
    model: Any,
    change: Callable[[Trace], Trace],
    given: Sequence[Any],
    skipped: Callable[[Trace], Mapping[int, Ref | None]] = lambda traced: {},
) -> Any:
    """The model once more, from changed traces; ``given`` layers are used as they are."""
    made: dict[int, tuple[Any, Any]] = {}

    def make(op: Any) -> Any:
        if any(op is new for new in given):
            return op
        if id(op) not in made:
            made[id(op)] = op, whole(op) if is_model(op) else remake(op)
        return made[id(op)][1]

    def make_input(ref: Ref, layer: Any) -> Any:
        return remake(layer)

    def whole(source: Any) -> Any:
        changed = change(trace(source))
        return replay(changed, make=make, make_input=make_input, skipped=skipped(changed))

    result = whole(model)
    for old, new in made.values():
        if not is_model(old):
            for before, after in zip(
                getattr(old, "variables", ()), getattr(new, "variables", ()), strict=True
            ):
                after.assign(np.asarray(before))
    copy_trainable(model, result, lambda layer: made.get(id(layer), (None, None))[1])
    return result
