"""Recurrent layers: their cells, layers that run a cell over time, and both directions.

A cell's kernel ``(inputs, gates * units)`` and recurrent kernel ``(units, gates * units)`` hold the
gates side by side: a unit owns one column per gate, and one row of the recurrent kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfprune.graph.context import RuleCall
from tfprune.graph.labels import Keep, Labels, TensorLabels, concatenate
from tfprune.graph.rules.elementwise import through_activation
from tfprune.graph.rules.registry import layer_rule
from tfprune.graph.trace import Ref, constants_of, leaves

Shape = tuple[int | None, ...]


def _gated(call: RuleCall, states: int, size: str, axis: int) -> list[TensorLabels]:
    """Any cell with gates side by side; ``axis`` is that of the channels in inputs and states.

    Returns the labels of the output and of ``states`` states, all alike.
    """
    op = call.op
    recurrent = op.recurrent_kernel
    units: Labels = call.fresh(int(recurrent.shape[-2]))
    gates = np.tile(units, int(recurrent.shape[-1]) // len(units))
    inputs = call.channels(axis)
    call.weight(op.kernel, "kernel", consumes={-2: inputs}, produces={-1: gates})
    call.weight(
        recurrent, "recurrent_kernel", consumes={-2: units}, produces={-1: gates}, scored=False
    )
    # One row, or one per kernel (a GRU that resets after the product).
    call.weight(op.bias, "bias", produces={-1: gates}, scored=False)
    call.size(size, units)
    for index in range(1, len(call.inputs)):
        call.unite(call.channels(axis, index), units)
    shape = call.output_shapes[0]
    axis %= len(shape)
    positions = call.product([n for a, n in enumerate(shape) if a not in (0, axis)])
    taps = math.prod(int(n) for n in op.kernel.shape[:-2])
    area = None if positions is None else positions * taps
    call.macs(area, int(op.kernel.shape[-2]) if inputs is None else inputs, gates)
    call.macs(area, units, gates)
    output: TensorLabels = tuple(units if a == axis else None for a in range(len(shape)))
    for activation in (op.activation, getattr(op, "recurrent_activation", None)):
        through_activation(call, activation, output)
    return [output] * (1 + states)


@layer_rule("SimpleRNNCell", "GRUCell")
def cell_with_one_state(call: RuleCall) -> list[TensorLabels]:
    """The state is the output."""
    return _gated(call, 1, "units", -1)


@layer_rule("LSTMCell")
def lstm_cell(call: RuleCall) -> list[TensorLabels]:
    """Hidden state and carry."""
    return _gated(call, 2, "units", -1)


@layer_rule("ConvLSTMCell")
def conv_lstm_cell(call: RuleCall) -> list[TensorLabels]:
    """An LSTM cell whose products are convolutions."""
    return _gated(call, 2, "filters", call.channel_axis())


@layer_rule("StackedRNNCells")
def stacked_cells(call: RuleCall) -> list[TensorLabels]:
    """Cells one upon the other; the states are those of all cells, in order."""
    op = call.op
    current, shape = call.inputs[0], call.input_shapes[0]
    given = list(zip(call.inputs[1:], call.input_shapes[1:], strict=True))
    states: list[TensorLabels] = []
    cells = list(op.cells)
    for number, cell in enumerate(cells):
        sizes = _state_shapes(cell, shape)
        mine, given = given[: len(sizes)], given[len(sizes) :]
        current, *new = call.apply(
            cell, [current, *(labels for labels, _ in mine)], [shape, *(s for _, s in mine)],
            [sizes[0], *sizes], name=f"cell_{number}",
        )  # fmt: skip
        shape = sizes[0]
        # The order in which tf_keras can be asked to return them.
        states = [*new, *states] if getattr(op, "reverse_state_order", False) else [*states, *new]

    def rewrite(keep: Keep) -> dict[str, Any]:
        config = op.get_config()["cells"]
        for cell, entry in zip(cells, config, strict=True):
            entry["config"].update(call.entries(cell, keep))
        return {"cells": config}

    call.config("cells", rewrite)
    return [current, *states]


def _state_shapes(cell: Any, step: Shape) -> list[Shape]:
    """The shapes of a cell's states, flattened, for one step of its inputs."""
    if type(cell).__name__ == "ConvLSTMCell":
        shape: Shape = tuple(cell.compute_output_shape(step)[0])
        return [shape, shape]
    return [(step[0], int(size)) for size in leaves(cell.state_size)]


def _last_cell(cell: Any) -> int:
    """Position among the states of the first one of the last cell: what the cell puts out."""
    cells = list(getattr(cell, "cells", [cell]))
    return sum(len(leaves(earlier.state_size)) for earlier in cells[:-1])


def _run_cell(
    call: RuleCall,
    layer: Any,
    path: str,
    initial: Sequence[tuple[TensorLabels, Shape]],
) -> tuple[TensorLabels, list[TensorLabels]]:
    """Applies a layer's cell at every step: labels of what it puts out, and of the states."""
    sequence, shape = call.inputs[0], call.input_shapes[0]
    time = 0 if getattr(layer, "time_major", False) else 1
    call.freeze(sequence[time], "the steps of a recurrent layer")
    step = tuple(size for axis, size in enumerate(shape) if axis != time)
    sizes = _state_shapes(layer.cell, step)
    output, *states = call.apply(
        layer.cell,
        [tuple(k for axis, k in enumerate(sequence) if axis != time), *(k for k, _ in initial)],
        [step, *(size for _, size in initial)],
        [sizes[_last_cell(layer.cell)], *sizes],
        name=path,
        repeats=shape[time],
    )
    variables = [v for v in leaves(getattr(layer, "states", None) or []) if hasattr(v, "assign")]
    for position, (variable, labels) in enumerate(zip(variables, states, strict=False)):
        follows = {axis: known for axis, known in enumerate(labels) if known is not None}
        call.weight(variable, f"state_{position}", follows=follows, scored=False)
    return output, states


def _sequence(layer: Any, output: TensorLabels) -> TensorLabels:
    if not layer.return_sequences:
        return output
    if getattr(layer, "time_major", False):
        return (None, *output)
    return (output[0], None, *output[1:])


def _initial(call: RuleCall, layer: Any) -> list[tuple[TensorLabels, Shape]]:
    """The initial states among the inputs; masks and constants may not carry channels."""
    arguments = call.call.args[1:]
    given = call.call.args[0]
    states = [leaf for leaf in leaves(given) if isinstance(leaf, Ref)][1:]
    kwargs = call.call.kwargs
    states += [leaf for leaf in leaves(kwargs.get("initial_state", arguments[:1]))
               if isinstance(leaf, Ref)]  # fmt: skip
    constants = constants_of(layer)
    if constants:
        states = states[:-constants]
    known = {ref.key for ref in states}
    result = []
    for position, (ref, labels) in enumerate(zip(call.call.inputs, call.inputs, strict=True)):
        if ref.key in known:
            result.append((labels, ref.shape))
        elif position:
            call.freeze(labels, "a mask or a constant of a recurrent layer")
    return result


@layer_rule(
    "LSTM", "GRU", "SimpleRNN", "RNN", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "LSTMV1", "GRUV1"
)
def recurrent(call: RuleCall) -> list[TensorLabels]:
    """A cell over time."""
    output, states = _run_cell(call, call.op, "", _initial(call, call.op))
    call.config("cell", lambda keep: _entries(call, call.op, keep))
    result = [_sequence(call.op, output)]
    return [*result, *states] if call.op.return_state else result


def _entries(call: RuleCall, layer: Any, keep: Keep) -> dict[str, Any]:
    """New entries for a recurrent layer: its cell's, which ``RNN`` keeps in an entry of its own."""
    entries = call.entries(layer.cell, keep)
    config = layer.get_config()
    if "cell" not in config:
        return entries
    config["cell"]["config"].update(entries)
    return {"cell": config["cell"]}


@layer_rule("Bidirectional")
def bidirectional(call: RuleCall) -> list[TensorLabels]:
    """Both directions have the same number of units: Keras makes them from one configuration."""
    op = call.op
    layers = {"layer": op.forward_layer, "backward_layer": op.backward_layer}
    initial = _initial(call, op)
    parts = (initial[: len(initial) // 2], initial[len(initial) // 2 :])
    runs: list[list[TensorLabels]] = []
    for layer, path, part in zip(layers.values(), ("forward", "backward"), parts, strict=True):
        output, states = _run_cell(call, layer, path, part)
        runs.append([_sequence(layer, output), *states])
    for first, second in zip(*runs, strict=True):
        for a, b in zip(first, second, strict=True):
            if a is not None or b is not None:
                call.unite(a, b)

    def rewrite(keep: Keep) -> dict[str, Any]:
        config = {key: value for key, value in op.get_config().items() if key in layers}
        for key, entry in config.items():
            entry["config"].update(_entries(call, layers[key], keep))
        return config

    call.config("layer", rewrite)
    (forward, *forward_states), (backward, *backward_states) = runs
    outputs = [forward]
    if op.merge_mode is None:
        outputs = [forward, backward]
    elif op.merge_mode == "concat":
        outputs = [_side_by_side(call, forward, backward)]
    return [*outputs, *forward_states, *backward_states] if op.return_state else outputs


def _side_by_side(call: RuleCall, forward: TensorLabels, backward: TensorLabels) -> TensorLabels:
    """Both directions, one after the other on the last axis."""
    for known in (*forward[:-1], *backward[:-1]):
        call.freeze(known, "joined along another axis than that of the channels")
    size = call.output_shapes[0][-1]
    half = 0 if size is None else size // 2
    joined = concatenate([forward[-1], backward[-1]], [half, half])
    return (*(None for _ in forward[:-1]), joined)
