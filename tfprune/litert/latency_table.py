"""Latency tables: what each layer takes at other widths, measured once, looked up many times.

Reference: Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile
Applications", ECCV 2018 (arXiv:1804.03230): the latency of a network is estimated as the sum of
its layers', each from a table over (input channels, output channels). Read in a re-implementation
of the authors' code. Departures: linear interpolation between the points of the grid, where the
code uses cubic radial basis functions, which overshoot on a staircase; and what the sum misses
(operations without multiplications, the interpreter itself) is measured as well, as one constant.

The table is of the machine that it was made on. LiteRT runs each layer alone here; on a phone the
same files can be timed with LiteRT's benchmark tool and put into the table's JSON.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.cost.model import Mask
from tfprune.errors import ArgumentError, ModelError
from tfprune.graph import ChannelGraph, analyse
from tfprune.graph.labels import Labels
from tfprune.graph.remake import remake
from tfprune.graph.trace import Call, framework_module, is_model
from tfprune.litert.benchmarking import benchmark_many
from tfprune.litert.progress import progress
from tfprune.writing import replacing, writable_target

_WIDTH_KEYS = {"filters", "units"}
_KINDS = {
    "Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose", "SeparableConv1D",
    "SeparableConv2D", "DepthwiseConv1D", "DepthwiseConv2D", "Dense",
}  # fmt: skip
_VERSION = 1


@dataclass(frozen=True, eq=False)
class LayerTable:
    """Times of one kind of layer.

    Attributes:
        signature: what identifies the layer but for its channels: class, configuration, spatial
            size of the input.
        inputs, outputs: the measured numbers of channels, rising. ``outputs`` has one entry, 0,
            for layers that put out as many channels as come in.
        latency_ms: median milliseconds, shape ``(len(inputs), len(outputs))``.
    """

    signature: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    latency_ms: NDArray[np.float64]

    def __call__(self, inputs: int, outputs: int) -> float:
        """Milliseconds, linear between the points of the grid.

        Raises:
            ArgumentError: outside of the grid.
        """
        rows, columns = _weights(self.inputs, inputs), _weights(self.outputs, outputs)
        if rows is None or columns is None:
            raise ArgumentError(
                f"Expected widths inside the table of {self.signature}: inputs "
                f"{self.inputs[0]} to {self.inputs[-1]}, outputs {self.outputs[0]} to "
                f"{self.outputs[-1]}. Received: {inputs} and {outputs}. Measure a table for this "
                "model, with a smaller step."
            )
        return float(rows @ self.latency_ms @ columns)


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Times of the layers of a model at other widths.

    Attributes:
        layers: signature -> table.
        overhead_ms: what the whole dense model takes beyond the sum of its layers (it may be
            negative: layers that run alone do not share caches and fused operations).
        threads: CPU threads.
        processor: of the machine, in words.
    """

    layers: Mapping[str, LayerTable]
    overhead_ms: float
    threads: int
    processor: str

    def cost(self, graph: ChannelGraph) -> Callable[[Mask], float]:
        """The model's latency in milliseconds as a function of a mask over its channels.

        Args:
            graph: of the model that was measured, or of a pruned one of it.

        Raises:
            ArgumentError: a layer that the table does not know.
        """
        entries = []
        for signature, inputs, outputs in _layers(graph):
            if signature not in self.layers:
                raise ArgumentError(
                    f"Expected a table of this model's layers. Received: one without {signature}. "
                    "Measure it with tfprune.litert.latency_table(model)."
                )
            entries.append((self.layers[signature], inputs, outputs))
        channel_of = graph.solution.channel_of

        def latency_ms(mask: Mask) -> float:
            def count(known: Labels | int) -> int:
                return known if isinstance(known, int) else int(mask[channel_of[known]].sum())

            return self.overhead_ms + sum(
                table(count(inputs), count(outputs)) for table, inputs, outputs in entries
            )

        return latency_ms

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON, whole or not at all.

        Raises:
            ArgumentError, FileError: the place cannot be written.
        """
        document = {
            "format": "tfprune latency table", "version": _VERSION, "threads": self.threads,
            "processor": self.processor, "overhead_ms": self.overhead_ms,
            "layers": {
                name: {
                    "inputs": t.inputs,
                    "outputs": t.outputs,
                    "latency_ms": t.latency_ms.tolist(),
                }
                for name, t in self.layers.items()
            },
        }  # fmt: skip
        with replacing(writable_target(path)) as temporary:
            temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Reads what :meth:`save` wrote.

        Raises:
            ArgumentError: no such file, or damaged.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if (document["format"], document["version"]) != ("tfprune latency table", _VERSION):
                raise ValueError(f"format {document['format']!r}, version {document['version']!r}")
            layers = {
                str(name): LayerTable(
                    str(name), tuple(map(int, t["inputs"])), tuple(map(int, t["outputs"])),
                    np.array(t["latency_ms"], np.float64).reshape(
                        len(t["inputs"]), len(t["outputs"])
                    ),
                )
                for name, t in document["layers"].items()
            }  # fmt: skip
            return cls(layers, float(document["overhead_ms"]), int(document["threads"]),
                       str(document["processor"]))  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(
                f"Expected a latency table as LatencyTable.save writes it. Received: "
                f"{os.fspath(path)!r} ({type(error).__name__}: {error})."
            ) from error


def latency_table(
    model: Any,
    *,
    step: int = 8,
    smallest: int = 1,
    threads: int = 1,
    runs: int = 20,
    input_shape: Any = None,
    verbose: int = 0,
) -> LatencyTable:
    """Measures every layer of a model that multiplies, alone, at a grid of widths.

    Args:
        model: a functional or sequential model of Keras 3 or tf_keras, or its analysed graph.
        step: distance of the grid's points in channels, on both sides; a multiple of what the
            plans are rounded to. The layer's own widths are on the grid too.
        smallest: fewest channels of the grid. Below it the table says nothing.
        threads: CPU threads.
        runs: timed runs per point; the median counts.
        input_shape: shape of one example, for a model that leaves sizes free.
        verbose: 1 shows progress on standard error.

    Returns:
        The table; give its :meth:`~LatencyTable.cost` to :func:`tfprune.search.netadapt`.

    Raises:
        ArgumentError: a number that is not positive.
        ModelError: a layer with prunable channels that no table is made for (attention, recurrent
            cells, layers in wrappers), or sizes that are free.
    """
    given = {"step": step, "smallest": smallest, "runs": runs, "threads": threads}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"Expected {name} of at least 1. Received: {value!r}.")
    graph = model if isinstance(model, ChannelGraph) else analyse(model, input_shape=input_shape)
    grids: dict[str, tuple[Call, list[int], list[int]]] = {}
    for call, inputs, outputs in _calls(graph):
        signature = _signature(call)
        _, rows, columns = grids.setdefault(signature, (call, [], []))
        rows += _grid(inputs, step, smallest)
        columns += [0] if _keeps_width(call) else _grid(outputs, step, smallest)
    points = {
        f"{signature} {i} {o}": (signature, i, o)
        for signature, (_, rows, columns) in grids.items()
        for i, o in itertools.product(sorted(set(rows)), sorted(set(columns)))
    }
    times: dict[str, float] = {}
    with progress(verbose, total=len(points) + 1) as advance:
        names = list(points)
        for start in range(0, len(names), 16):  # side by side, a few at a time
            some = {}
            for name in names[start : start + 16]:
                signature, i, o = points[name]
                advance(f"{grids[signature][0].op.name}: {i} to {o or i} channels")
                some[name] = _alone(graph, grids[signature][0], i, o)
            reports = benchmark_many(some, threads=threads, runs=runs, warmup=3, gpu=False)
            times |= {name: report.latency_ms for name, report in reports.items()}
        advance("the whole model")
        whole = benchmark_many(
            {"model": graph.model}, threads=threads, runs=runs, warmup=3, gpu=False,
            input_shape=input_shape,
        )["model"]  # fmt: skip
    layers = {}
    for signature, (_, rows, columns) in grids.items():
        ins, outs = tuple(sorted(set(rows))), tuple(sorted(set(columns)))
        table = [[times[f"{signature} {i} {o}"] for o in outs] for i in ins]
        layers[signature] = LayerTable(signature, ins, outs, np.array(table))
    parts = LatencyTable(layers, 0.0, threads, whole.processor)
    dense = parts.cost(graph)(np.ones(len(graph.solution.frozen), bool))
    return LatencyTable(layers, whole.latency_ms - dense, threads, whole.processor)


def _calls(graph: ChannelGraph) -> list[tuple[Call, Labels | int, Labels | int]]:
    """The calls that multiply, with the labels (or the number) of their channels in and out."""
    # With the layers around them: attention's multiplications are in layers inside it.
    multiply = {
        path
        for term in graph.record.macs
        for path in accumulate(term.path.split("/"), "{}/{}".format)
    }
    free = {path for group in graph.prunable for path in group.layers}
    found = []
    for traced in graph.record.traces.values():
        for call in traced.calls:
            path = graph.record.paths.get(id(call.op), "")
            if is_model(call.op) or path not in multiply:
                continue
            if type(call.op).__name__ not in _KINDS:
                if any(name == path or name.startswith(f"{path}/") for name in free):
                    raise ModelError(
                        "Expected convolutions and dense layers, for a latency table. Received: "
                        f"{type(call.op).__name__} at {path!r}, whose channels can be pruned. Use "
                        "macs= or params= for this model."
                    )
                continue
            source, target = call.inputs[0], call.outputs[0]
            if None in source.shape[1:]:
                raise ModelError(
                    f"Expected a model of known sizes. Received: {path!r} with an input of shape "
                    f"{source.shape}. Build the model with all sizes given."
                )
            ends: list[Labels | int] = []
            for ref in (source, target):
                axis = _channel_axis(call.op, len(ref.shape))
                labels = graph.record.tensors[ref.key][axis]
                if labels is None or graph.solution.frozen[graph.channels(labels)].all():
                    ends.append(int(ref.shape[axis] or 0))
                else:
                    ends.append(labels)
            found.append((call, ends[0], ends[1]))
    return found


def _layers(graph: ChannelGraph) -> list[tuple[str, Labels | int, Labels | int]]:
    return [
        (_signature(call), inputs, 0 if _keeps_width(call) else outputs)
        for call, inputs, outputs in _calls(graph)
    ]


def _signature(call: Call) -> str:
    """Class, configuration without names, numbers of channels and initialisers, spatial size."""
    config = call.op.get_config()
    parts = {
        key: config[key]
        for key in ("kernel_size", "strides", "padding", "dilation_rate", "groups",
                    "depth_multiplier", "use_bias", "data_format")
        if config.get(key) not in (None, 1, (1, 1), [1, 1], (1,), [1])
    }  # fmt: skip
    shape = call.inputs[0].shape
    axis = _channel_axis(call.op, len(shape))
    size = "x".join(str(n) for i, n in enumerate(shape) if i not in (0, axis)) or "1"
    text = ", ".join(f"{key}={_plain(value)}" for key, value in sorted(parts.items()))
    return f"{type(call.op).__name__}({text}) on {size}"


def _plain(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _keeps_width(call: Call) -> bool:
    """Depthwise convolutions put out as many channels as come in (or a multiple)."""
    return not _WIDTH_KEYS & set(call.op.get_config())


def _channel_axis(op: Any, rank: int) -> int:
    return 1 if getattr(op, "data_format", None) == "channels_first" else rank - 1


def _grid(known: Labels | int, step: int, smallest: int) -> list[int]:
    """The smallest width, multiples of the step, and the full width; a fixed number alone."""
    if isinstance(known, int):
        return [known]
    width = len(known)
    least = min(smallest, width)
    return [least, *(n for n in range(step, width, step) if n > least), width]


def _alone(graph: ChannelGraph, call: Call, inputs: int, outputs: int) -> Any:
    """A model of this one layer."""
    keras = framework_module(graph.framework)
    shape = list(call.inputs[0].shape[1:])
    shape[_channel_axis(call.op, len(shape) + 1) - 1] = inputs

    def resized(config: dict[str, Any]) -> dict[str, Any]:
        config.pop("build_config", None)
        widths = _WIDTH_KEYS & set(config)
        return {**config, "name": "layer", **dict.fromkeys(widths, outputs)}

    source = keras.Input(tuple(shape), dtype=call.inputs[0].dtype)
    return keras.Model(source, remake(call.op, resized)(source))


def _weights(points: Sequence[int], at: int) -> NDArray[np.float64] | None:
    """How much each point counts for a value; ``None`` outside of them."""
    if not points[0] <= at <= points[-1]:
        return None
    result = np.zeros(len(points))
    right = int(np.searchsorted(points, at))
    if points[right] == at:
        result[right] = 1
        return result
    left = right - 1
    share = (at - points[left]) / (points[right] - points[left])
    result[left], result[right] = 1 - share, share
    return result
