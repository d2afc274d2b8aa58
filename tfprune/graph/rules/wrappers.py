"""Layers that wrap another layer or a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tfprune.graph.context import RuleCall
from tfprune.graph.labels import Keep, TensorLabels
from tfprune.graph.rules.registry import layer_rule
from tfprune.graph.trace import lambda_output_shape

Rebuild = Callable[[Any], Any]


def _around(call: RuleCall) -> None:
    """Rebuilds the wrapper around the smaller layer."""
    op = call.op

    def build(_: Keep, rebuild: Rebuild) -> Any:
        config = op.get_config()
        config.pop("layer")
        return type(op)(rebuild(op.layer), **config)

    call.build(build)


@layer_rule("TimeDistributed")
def time_distributed(call: RuleCall) -> TensorLabels:
    """The layer inside runs once per step."""
    labels, shape, output = call.inputs[0], call.input_shapes[0], call.output_shapes[0]
    for masks in call.inputs[1:]:
        call.freeze(masks, "used as a mask of time steps")
    call.freeze(labels[1], "the steps of a time-distributed layer")
    before = len(call.record.inexact)
    inner = call.apply(
        call.op.layer, [(labels[0], *labels[2:])], [(shape[0], *shape[2:])],
        [(output[0], *output[2:])], name="layer", repeats=shape[1],
    )[0]  # fmt: skip
    # The masked model evaluates the wrapper as a whole: it cannot leave channels out inside.
    for known, path, why in call.record.inexact[before:]:
        call.record.store.freeze(known, path, f"{why} inside TimeDistributed")
    _around(call)
    return (inner[0], None, *inner[1:])


@layer_rule("SpectralNormalization")
def spectral_normalization(call: RuleCall) -> TensorLabels:
    """At inference it is the layer inside; its vector goes with the kernel's last axis."""
    op = call.op
    result = call.apply(op.layer, call.inputs, call.input_shapes, call.output_shapes, name="layer")[
        0
    ]
    site = call.record.sites.get(id(op.kernel))
    if site is not None:
        call.weight(op.vector_u, "vector_u", follows={1: site.labels[-1]}, scored=False)
    _around(call)
    return result


@layer_rule("Lambda")
def lambda_layer(call: RuleCall) -> list[TensorLabels]:
    """A function could do anything with the channels."""
    op = call.op
    for labels in call.inputs:
        call.freeze(
            labels,
            "a Lambda layer's function is unknown; write it as a layer class or with keras.ops, "
            "or register a rule with tfprune.rule",
        )

    def build(*_: Any) -> Any:
        # Not from the configuration: safe mode refuses to make functions from bytes.
        layer: Any = next(cls for cls in type(op).__mro__ if cls.__name__ == "Layer")
        config = layer.get_config(op)
        return type(op)(
            op.function, output_shape=lambda_output_shape(op), mask=op.mask, arguments=op.arguments,
            **config,
        )  # fmt: skip

    call.build(build)
    return [tuple(None for _ in shape) for shape in call.output_shapes]
