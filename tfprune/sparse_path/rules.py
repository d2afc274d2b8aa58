"""Which operations XNNPACK's sparse path has, and why not the others.

Source: the function ``xnn_check_nchw_compatibility`` of XNNPACK (``src/subgraph.c``). Each rule
was also tried with the XNNPACK of ai-edge-litert 2.3.0, with the processor's AVX hidden from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tfprune.sparse_path.nodes import Network, Node, Window

_ALLOWED = (
    "XNNPACK's sparse path has 1x1 convolutions, depthwise ones (3x3, 5x5), Add, Multiply, "
    "activations, bilinear upsampling and means"
)
_TRAIN = "padding cannot be changed in a trained network: train it so"


@dataclass(frozen=True)
class Problem:
    """Why an operation cannot be part of the sparse path, and what to do."""

    reason: str
    remedy: str


@dataclass(frozen=True)
class Role:
    """What an operation can be in the sparse path.

    Attributes:
        inside: It reads and writes the channels-first layout.
        start: It can read channels-last and write channels-first.
        end: It can read channels-first and write channels-last.
        problem: Why it is none of them.
    """

    inside: bool = False
    start: bool = False
    end: bool = False
    problem: Problem | None = None


def role(node: Node) -> Role:
    """What XNNPACK lets an operation be in its sparse path."""
    if not node.floats and node.kind != "other":
        return _not("it computes in integers", "Export with quantize=None or 'float16'")
    if node.kind == "conv" and node.window is not None:
        problem = conv_problem(node.window)
        start = node.window.kernel == (3, 3)
        return Role(problem=problem) if problem else Role(inside=not start, start=start)
    if node.kind == "depthwise" and node.window is not None:
        problem = _depthwise_problem(node.window)
        return Role(problem=problem) if problem else Role(inside=True)
    if node.kind == "depth_to_space":
        return Role(end=True)
    if node.kind == "binary":
        return _binary(node)
    if node.kind == "resize":
        if min(node.size) == 1:
            return _not("it enlarges an image of one row or column", "Leave it out")
        return Role(inside=True)
    if node.kind in ("unary", "mean") and node.rank == 4:
        return Role(inside=True, end=node.kind == "mean")
    if node.kind == "dense" and node.pointwise:
        return Role(inside=True)
    if node.hint[0]:
        return _not(*node.hint)
    return _not(
        f"{node.what} is no operation of the sparse path",
        f"{_ALLOWED}: replace it, or move it behind the global average pooling",
    )


def _not(reason: str, remedy: str) -> Role:
    return Role(problem=Problem(reason, remedy))


def _binary(node: Node) -> Role:
    if node.constant:
        return _not(
            f"{node.operator} with a constant, as a batch normalisation that does not follow a "
            "convolution, or a hard sigmoid, leaves behind",
            "Put batch normalisation right behind convolutions, and use ReLU6, hard swish or "
            "sigmoid as activation",
        )
    if node.rank != 4:
        return _not("its operands have not four axes", "Keep them (keepdims=True)")
    return Role(inside=True)


def conv_problem(window: Window) -> Problem | None:
    """Why a full convolution is neither 1x1 nor the start; ``None`` where it is."""
    kernel, strides = _by(window.kernel), _by(window.strides)
    if window.groups != 1:
        return Problem(
            f"a convolution in {window.groups} groups", "Use groups=1 or a depthwise convolution"
        )
    if window.dilation != (1, 1):
        return Problem("a dilated convolution", "Use dilation_rate=1")
    if window.kernel == (1, 1):
        if window.strides != (1, 1):
            return Problem(
                f"a 1x1 convolution with stride {strides}",
                "Give the stride to the depthwise convolution before it",
            )
        if window.padding != (0, 0, 0, 0):
            return Problem("a 1x1 convolution with padding", "Leave the padding out")
        return None
    if window.kernel != (3, 3):
        return Problem(
            f"a {kernel} convolution",
            "Inside the sparse path only 1x1 and depthwise convolutions can be; its start is a 3x3 "
            "convolution with stride 2",
        )
    if window.strides != (2, 2) or window.channels != 3:
        return Problem(
            f"a 3x3 convolution with stride {strides} and {window.channels} input channels",
            "The sparse path begins with a 3x3 convolution with stride 2 that reads 3 channels; "
            "inside it only 1x1 and depthwise ones can be",
        )
    if window.padding != (1, 1, 1, 1):
        return Problem(
            f"a 3x3 convolution with stride 2 and {_padding(window)}",
            "XNNPACK wants padding 1 on all four sides: ZeroPadding2D(1) and padding='valid'; "
            + _TRAIN,
        )
    return None


def _depthwise_problem(window: Window) -> Problem | None:
    size = window.kernel[0]
    if window.dilation != (1, 1):
        return Problem("a dilated depthwise convolution", "Use dilation_rate=1")
    if window.multiplier != 1:
        return Problem(
            f"a depthwise convolution with depth_multiplier={window.multiplier}", "Use 1"
        )
    if window.kernel not in ((3, 3), (5, 5)):
        return Problem(f"a {_by(window.kernel)} depthwise convolution", "Use 3x3 or 5x5")
    if window.strides not in ((1, 1), (2, 2)):
        return Problem(f"a depthwise convolution with stride {_by(window.strides)}", "Use 1 or 2")
    if window.padding != (size // 2,) * 4:
        return Problem(
            f"a {size}x{size} depthwise convolution with stride {window.strides[0]} and "
            f"{_padding(window)}",
            f"XNNPACK wants padding {size // 2} on all four sides: ZeroPadding2D({size // 2}) and "
            f"padding='valid', or padding='same' with stride 1; {_TRAIN}",
        )
    return None


def fused(network: Network) -> Network:
    """The network with pads drawn into the convolutions that read them, as XNNPACK does it.

    A pad is drawn in if convolutions of one kind are all that reads it, and they pad nothing
    themselves. The converter copies a pad for readers of different kinds.
    """
    nodes = list(network.nodes)
    pads: Mapping[object, Node] = {n.outputs[0]: n for n in nodes if n.kind == "pad" and n.padding}
    drawn = set()
    for output in pads:
        readers = [n for n in nodes if output in n.inputs]
        if not readers or output in network.outputs:
            continue
        if all(n.window is not None and n.window.padding == (0, 0, 0, 0) for n in readers):
            drawn.add(output)
    result = []
    for node in nodes:
        if node.kind == "pad" and node.outputs[0] in drawn:
            continue
        if node.inputs and node.inputs[0] in drawn and node.window is not None:
            pad = pads[node.inputs[0]]
            window = replace(node.window, padding=pad.padding, pad=f"{pad.what} {pad.layer!r}")
            node = replace(node, inputs=pad.inputs, window=window)
        result.append(node)
    return replace(network, nodes=tuple(result))


def _by(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _padding(window: Window) -> str:
    if window.padding is None:
        return "padding 'same', which is one-sided or depends on the image's size"
    above, below, left, right = window.padding
    if window.pad:
        return (
            f"padding of {above} above, {below} below, {left} left, {right} right (from "
            f"{window.pad})"
        )
    if window.padding == (0, 0, 0, 0):
        return "no padding"
    return f"padding of {above} above, {below} below, {left} left, {right} right"
