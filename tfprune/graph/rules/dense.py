"""Dense, EinsumDense and Embedding."""

from __future__ import annotations

import math
import re
from typing import Any

from tfprune.errors import ModelError
from tfprune.graph.context import RuleCall
from tfprune.graph.labels import AxisLabels, Keep, TensorLabels
from tfprune.graph.rules.elementwise import through_activation
from tfprune.graph.rules.registry import layer_rule


def plain(call: RuleCall, name: str, layer: Any = None) -> Any:
    """A kernel or table of the op (or of a layer inside), as the variable that it is.

    With LoRA or quantisation it is computed from several: its channels cannot be told apart.

    Raises:
        ModelError: LoRA or quantisation is on.
    """
    op = call.op if layer is None else layer
    if getattr(op, "lora_enabled", False) or getattr(op, "quantization_mode", None) is not None:
        what = "LoRA" if getattr(op, "lora_enabled", False) else "quantisation"
        raise ModelError(
            f"Expected layers with plain weights. Received: {type(op).__name__} at {call.path!r} "
            f"with {what}. Prune first, then fine-tune with LoRA or quantise; or merge the LoRA "
            "weights by saving and loading the model."
        )
    return getattr(op, name)


@layer_rule("Dense")
def dense(call: RuleCall) -> TensorLabels:
    """``(inputs, units)``: rows consume, columns and bias produce."""
    op, labels = call.op, call.inputs[0]
    kernel = plain(call, "kernel")
    outputs = call.fresh(int(kernel.shape[-1]))
    call.weight(kernel, "kernel", consumes={0: labels[-1]}, produces={1: outputs})
    call.weight(op.bias, "bias", produces={0: outputs}, scored=False)
    call.size("units", outputs)
    call.macs(1, *call.counted(0), outputs)
    return through_activation(call, op.activation, (*labels[:-1], outputs))


@layer_rule("EinsumDense")
def einsum_dense(call: RuleCall) -> TensorLabels:
    """An equation ``inputs,kernel->outputs``, letter by letter.

    A letter of the kernel that the input has and the output has not is consumed; one that all
    three have follows; one that only the output has is produced.
    """
    op, labels = call.op, call.inputs[0]
    kernel = plain(call, "kernel")
    left, weight, right = re.split(",|->", op.equation.replace(" ", ""))
    rank_in, rank_out = len(labels), len(call.output_shapes[0])
    elided = rank_in - len(left.replace("...", ""))
    fill = "".join(chr(0x3B1 + i) for i in range(elided))  # Greek letters: no equation has them
    left, right = left.replace("...", fill), right.replace("...", fill)
    of: dict[str, AxisLabels] = dict(zip(left, labels, strict=True))
    sizes = dict(zip(left, call.input_shapes[0], strict=True))
    # Keras forgets sizes of the output that the input's letters tell.
    sizes.update((c, n) for c, n in zip(right, call.output_shapes[0], strict=True) if n is not None)
    produced: dict[int, AxisLabels] = {}
    follows: dict[int, AxisLabels] = {}
    consumed: dict[int, AxisLabels] = {}
    for axis, letter in enumerate(weight):
        if letter not in left:
            of[letter] = produced[axis] = call.attribute(
                f"letter {letter}", call.fresh(int(kernel.shape[axis]))
            )
        elif letter in right:
            follows[axis] = of[letter]
        else:
            consumed[axis] = of[letter]
    call.weight(kernel, "kernel", produces=produced, follows=follows, consumes=consumed)
    if op.bias is not None:
        # The bias has the output's rank less its leading axes without bias, ones in between.
        bias = op.bias
        tail = right[rank_out - len(bias.shape) :]
        axes = {
            axis: of[letter]
            for axis, letter in enumerate(tail)
            if of.get(letter) is not None and int(bias.shape[axis]) != 1
        }
        fresh = {a: v for a, v in axes.items() if tail[a] in weight and tail[a] not in left}
        call.weight(
            bias,
            "bias",
            produces=fresh,
            follows={a: v for a, v in axes.items() if a not in fresh},
            scored=False,
        )
    shape = tuple(op.partial_output_shape)
    tail = right[rank_out - len(shape) :]
    counted = [of.get(letter) for letter in tail]

    def output_shape(keep: Keep) -> dict[str, object]:
        return {
            "output_shape": tuple(
                size if size is None or found is None else int(keep(found).sum())
                for size, found in zip(shape, counted, strict=True)
            )
        }

    call.config("output_shape", output_shape)
    letters = dict.fromkeys(left[1:] + weight + right[1:])
    batch = left[0]
    free = [sizes.get(c) for c in letters if c != batch and of.get(c) is None and c not in weight]
    known = [
        int(kernel.shape[weight.index(c)]) for c in letters if c in weight and of.get(c) is None
    ]
    positions = call.product(free)
    call.macs(
        None if positions is None else positions * math.prod(known),
        *[of[c] for c in letters if of.get(c) is not None],
    )
    output = tuple(of.get(letter) for letter in right)
    return through_activation(call, op.activation, output)


@layer_rule("Embedding")
def embedding(call: RuleCall) -> TensorLabels:
    """The table's columns produce; a look-up has no multiply-accumulates."""
    outputs = call.fresh(int(call.op.output_dim))
    table = plain(call, "embeddings")
    call.weight(table, "embeddings", produces={1: outputs})
    call.size("output_dim", outputs)
    return (*(None for _ in call.output_shapes[0][:-1]), outputs)


@layer_rule("ReversibleEmbedding")
def reversible_embedding(call: RuleCall) -> TensorLabels:
    """In reverse, the table (or one of its own) reads the channels and gives a score per word."""
    op, labels = call.op, call.inputs[0]
    if not call.arguments().get("reverse"):
        return embedding(call)
    table, axis = (plain(call, "embeddings"), 1) if op.tie_weights else (op.reverse_embeddings, 0)
    name = "embeddings" if op.tie_weights else "reverse_embeddings"
    call.weight(table, name, consumes={axis: labels[-1]})
    call.size("output_dim", labels[-1])
    call.macs(int(op.input_dim), *call.counted(0))
    return (*labels[:-1], None)
