r"""How much the next layers' outputs move when channels are zeroed where they are read.

For one batch, Y the output of a layer that reads the group, and :math:`\tilde Y` the same without
some channels,

.. math:: t = \sum (Y - \tilde Y)^2 \Big/ \sum Y^2,

over the whole batch tensor, in inference mode. The site of the metric is fixed: Y is what stands
behind the reading layer's own batch normalisation and activation, where these follow it directly
and nothing else reads what lies between; else the reading layer's own output. Of several readers (a
residual stream) the largest t counts.

The change goes no further than that, so that damage in different groups can be told apart, and
measured without another pass through the network. Where the channels are read inside a layer
(attention heads, states of recurrent cells, layers in wrappers), no such place can be reached:
there Y are the model's outputs, and a channel is zeroed in the weights that read it.

An output that is zero throughout has no energy to compare with: t is 0 if it stays so, else 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tfprune.criteria.gates import readings_of
from tfprune.errors import DataError
from tfprune.graph import ChannelGraph
from tfprune.graph.evaluate import evaluate, run_call
from tfprune.graph.labels import Labels
from tfprune.graph.masking import MaskedModel
from tfprune.graph.trace import Call, is_model, is_of_framework

Array = NDArray[Any]
Indices = NDArray[np.int64]

Scaled = Callable[[Any, int, Labels], Any]
"""From a tensor, an axis and the places of its channels (see :class:`Reader`) to the product."""

# Layers, and operations of keras.ops, that belong to the layer in front of them.
_NORMALIZATIONS = ("BatchNormalization",)
_ACTIVATIONS = (
    "Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax", "ThresholdedReLU",
    "Relu", "Relu6", "LeakyRelu", "Elu", "Silu", "Gelu", "Sigmoid", "HardSigmoid", "HardSilu",
    "Tanh", "Selu", "Softplus",
)  # fmt: skip


class Damage(Protocol):
    """The damage of zeroing channels of one group."""

    def __call__(self, number: int, alive: Indices, dropped: Indices) -> float:
        """t on one batch.

        Args:
            number: of the draw; batches are taken in turn.
            alive: channels on the base path; all others are zero on both paths.
            dropped: those of them that are zero on the scoring path as well.
        """
        ...


@dataclass(frozen=True, eq=False)
class Reader:
    """A call that reads channels of a group, and what belongs to it.

    Attributes:
        call: the call.
        places: (number of the input, axis, index): ``index`` is an int array, shape ``(size of the
            axis,)``, with each position's channel of the group, counted from 1; 0 for others.
        behind: the calls of batch normalisation and activation that stand behind it, in order.
    """

    call: Call
    places: tuple[tuple[int, int, Labels], ...]
    behind: tuple[Call, ...]

    def output(self, inputs: Sequence[Any], scaled: Scaled) -> Any:
        """The tensor at the site of the metric.

        Args:
            inputs: what the call takes in.
            scaled: multiplies channels.
        """
        values = list(inputs)
        for number, axis, index in self.places:
            values[number] = scaled(values[number], axis, index)
        value = run_call(self.call, values)[0]
        for call in self.behind:
            value = run_call(call, [value])[0]
        return value


def readers_by_group(graph: ChannelGraph) -> dict[str, tuple[Reader, ...]]:
    """The readers of every prunable group; none for a group that is (also) read inside a layer."""
    readings, inside = readings_of(graph)
    takers, ends = _takers(graph)
    found: dict[str, dict[int, Reader]] = {group.name: {} for group in graph.prunable}
    for reading in readings:
        start = 0
        for name in reading.groups:
            width = graph[name].width
            mine = (reading.index > start) & (reading.index <= start + width)
            place = reading.number, reading.axis, np.where(mine, reading.index - start, 0)
            known = found[name].get(id(reading.call))
            before = () if known is None else known.places
            found[name][id(reading.call)] = Reader(
                reading.call, (*before, place), _behind(reading.call, takers, ends)
            )
            start += width
    return {
        name: () if name in inside else tuple(readers.values()) for name, readers in found.items()
    }


def _takers(graph: ChannelGraph) -> tuple[dict[Any, list[Call]], set[Any]]:
    """The calls that take each tensor, and the tensors that leave a model."""
    takers: dict[Any, list[Call]] = {}
    ends: set[Any] = set()
    for traced in graph.record.traces.values():
        ends.update(ref.key for ref in traced.outputs)
        for call in traced.calls:
            for ref in call.inputs:
                takers.setdefault(ref.key, []).append(call)
    return takers, ends


def _behind(call: Call, takers: Mapping[Any, list[Call]], ends: set[Any]) -> tuple[Call, ...]:
    found: list[Call] = []
    for kinds in (_NORMALIZATIONS, _ACTIVATIONS):
        last = found[-1] if found else call
        if len(last.outputs) != 1 or last.outputs[0].key in ends:
            break
        following = takers.get(last.outputs[0].key, [])
        if len(following) == 1 and _is_one_of(following[0], kinds):
            found.append(following[0])
    return tuple(found)


def _is_one_of(call: Call, kinds: Sequence[str]) -> bool:
    kind = type(call.op)
    return (
        not is_model(call.op)
        and is_of_framework(kind)
        and kind.__name__ in kinds
        and len(call.inputs) == 1
    )


def relative_change(base: Any, ablated: Any) -> float:
    """t of two outputs, arrays of one shape.

    Raises:
        DataError: it is not finite.
    """
    first, second = (np.asarray(part) for part in (base, ablated))
    if first.dtype.itemsize < 4 or first.dtype.kind != "f":
        first, second = first.astype(np.float32), second.astype(np.float32)
    moved = float(np.sum(np.square(first - second), dtype=np.float64))
    energy = float(np.sum(np.square(first), dtype=np.float64))
    if not np.isfinite(moved + energy):
        raise DataError(
            "Expected finite activations. Received: NaN or infinity. Look at the data, and at the "
            "model's outputs for them."
        )
    if not energy:
        return float(moved > 0)
    return moved / energy


def damage_of(graph: ChannelGraph, name: str, batches: Sequence[Sequence[Array]]) -> Damage:
    """What measures the damage in one group.

    The outputs on the base path are held in memory for all batches, as long as it stays the same.

    Args:
        graph: the analysed model.
        name: of a prunable group.
        batches: of the model's inputs, flattened.
    """
    readers = readers_by_group(graph)[name]
    if readers:
        return _Compared(_AtReaders(graph, name, readers, batches), len(batches))
    return _Compared(_AtOutputs(graph, name, batches), len(batches))


class _Compared:
    """t between what a function of (number of the batch, channels that stay) returns."""

    def __init__(self, outputs: Callable[[int, Indices], list[Array]], count: int) -> None:
        self._outputs = outputs
        self._count = count
        self._base: dict[int, list[Array]] = {}
        self._alive: Indices | None = None

    def __call__(self, number: int, alive: Indices, dropped: Indices) -> float:
        number %= self._count
        if self._alive is None or not np.array_equal(alive, self._alive):
            self._base, self._alive = {}, alive.copy()
        if number not in self._base:
            self._base[number] = self._outputs(number, alive)
        ablated = self._outputs(number, np.setdiff1d(alive, dropped))
        pairs = zip(self._base[number], ablated, strict=True)
        return max(relative_change(before, after) for before, after in pairs)


class _AtReaders:
    """Outputs of the layers that read the group.

    What these layers take in is held in memory for all batches, so that a draw costs one call of
    each reader.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        name: str,
        readers: Sequence[Reader],
        batches: Sequence[Sequence[Array]],
    ) -> None:
        self._width = graph[name].width
        self._seen: list[list[tuple[Reader, list[Array]]]] = []
        by_call = {id(reader.call): reader for reader in readers}
        for batch in batches:
            seen: list[tuple[Reader, list[Array]]] = []

            def observe(call: Call, tensors: Sequence[Any], seen: Any = seen) -> None:
                # A model within the model may be called, and so be seen, several times.
                if id(call) in by_call:
                    seen.append((by_call[id(call)], [np.asarray(tensor) for tensor in tensors]))

            evaluate(graph, batch, observe=observe)
            self._seen.append(seen)

    def __call__(self, number: int, alive: Indices) -> list[Array]:
        factors = np.zeros(self._width + 1)
        factors[0], factors[1 + alive] = 1, 1

        def scaled(tensor: Array, axis: int, index: Labels) -> Array:
            shape = [1] * tensor.ndim
            shape[axis] = len(index)
            return np.asarray(tensor * factors[index].reshape(shape).astype(tensor.dtype))

        return [np.asarray(reader.output(x, scaled)) for reader, x in self._seen[number]]


class _AtOutputs:
    """The model's outputs, for a group that is read inside layers, or by nobody."""

    def __init__(self, graph: ChannelGraph, name: str, batches: Sequence[Sequence[Array]]) -> None:
        self._masked = MaskedModel(graph)
        self._name = name
        self._batches = batches

    def __call__(self, number: int, alive: Indices) -> list[Array]:
        self._masked.mask({self._name: alive})
        return self._masked.outputs(self._batches[number])
