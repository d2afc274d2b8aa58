"""A network as XNNPACK sees it, as plain records."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "conv",
    "depthwise",
    "dense",
    "binary",
    "unary",
    "resize",
    "mean",
    "depth_to_space",
    "pad",
    "other",
]


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution.

    Attributes:
        kernel: Height and width.
        strides, dilation: Along height and width.
        padding: Zeros above, below, left and right of the image; ``None`` where they depend on the
            image's size, as with ``padding="same"`` and a stride of 2.
        channels: Of the input.
        groups: Into how many the channels fall.
        multiplier: Of a depthwise convolution, the outputs per channel.
        pad: The layer that the padding comes from, in words; empty where the convolution pads.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int] | None
    channels: int
    groups: int = 1
    multiplier: int = 1
    pad: str = ""


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        kind: What XNNPACK makes of it.
        layer: Where it stands in the user's model.
        what: What the user calls its kind, such as ``"MaxPooling2D"`` or ``"MAX_POOL_2D"``.
        inputs, outputs: Keys of the tensors that it reads and writes; constants are left out.
        rank: How many axes its first input has.
        window: Of a convolution.
        operator: Of a binary operation, ``"addition"`` or ``"multiplication"``; others are of kind
            ``other``. ``"flatten"`` for one of that kind that makes two axes of all.
        constant: Whether a binary operation has a constant operand.
        axes: Over which a mean goes.
        keep_dims: Whether a mean keeps them with size 1, and whether a dense layer's output has as
            many axes as its input.
        padding: Of a pad, the zeros above, below, left and right; ``None`` for one along other
            axes or with another value.
        size: Height and width of the first input, 0 where unknown.
        floats: Whether everything it reads and writes is float32 or float16.
        zeros, parameters: Of the kernel of a convolution or dense layer.
        part: Number of the part of the model, as the delegate divides it; tensors between parts
            are inputs and outputs to XNNPACK.
        hint: Why an operation is of kind ``other`` although its name is not, and what to do.
    """

    kind: Kind
    layer: str
    what: str
    inputs: tuple[Hashable, ...]
    outputs: tuple[Hashable, ...]
    rank: int = 4
    window: Window | None = None
    operator: str = ""
    constant: bool = False
    axes: tuple[int, ...] = ()
    keep_dims: bool = False
    padding: tuple[int, int, int, int] | None = None
    size: tuple[int, int] = (0, 0)
    floats: bool = True
    zeros: int = 0
    parameters: int = 0
    part: int = 0
    hint: tuple[str, str] = ("", "")

    @property
    def pointwise(self) -> bool:
        """Whether it is a 1x1 convolution, or a dense layer along the channels of an image."""
        if self.kind == "dense":
            return self.rank == 4 and self.keep_dims
        return self.kind == "conv" and self.window is not None and self.window.kernel == (1, 1)


@dataclass(frozen=True)
class Network:
    """Operations in an order in which every tensor is written before it is read.

    Attributes:
        nodes: The operations.
        outputs: Keys of the model's outputs.
    """

    nodes: tuple[Node, ...]
    outputs: frozenset[Hashable] = field(default_factory=frozenset)


def same_padding(
    kernel: tuple[int, int], strides: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """What ``padding="same"`` adds; ``None`` where it depends on the image's size."""
    if kernel == (1, 1):
        return (0, 0, 0, 0)
    if strides != (1, 1):
        return None
    total = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    above, beside = (t // 2 for t in total)
    return (above, total[0] - above, beside, total[1] - beside)
