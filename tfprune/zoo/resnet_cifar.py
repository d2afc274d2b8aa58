"""Residual networks for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tfprune.errors import ArgumentError
from tfprune.zoo.layers import Layers, check_widths, image_input


def resnet_cifar(
    depth: int = 56,
    *,
    shortcut: str = "A",
    widths: Sequence[int] = (16, 32, 64),
    inner_widths: Sequence[int] | None = None,
    classes: int = 10,
    input_shape: Sequence[int] = (32, 32, 3),
    classifier_activation: str | None = None,
    seed: int | None = None,
    name: str | None = None,
) -> Any:
    """The CIFAR ResNet of He et al. 2016 (section 4.2): three stages of basic blocks.

    Depths 20, 32, 44, 56 and 110 with both shortcuts have the parameter and MAC counts that were
    recounted from the definition. The network of a published pruning is given by
    ``inner_widths``: the blocks' outputs keep the stage's width, since they are added.

    Args:
        depth: ``6 n + 2`` for ``n`` blocks a stage.
        shortcut: "A" takes every second pixel and pads the channels with zeros; "B" is a 1x1
            convolution with batch normalisation. Only where the shape changes.
        widths: the channels of the block outputs, one per stage.
        inner_widths: the channels of the first convolution of every block, in order; ``None``
            is the stage's width. See :data:`tfprune.zoo.RESNET_INNER`.
        classes: units of the last layer.
        input_shape: (height, width, channels).
        classifier_activation: of the last layer; ``None`` returns logits.
        seed: makes the initial values reproducible.
        name: of the model.

    Returns:
        ``keras.Model``, float32 images ``(batch, *input_shape)`` to ``(batch, classes)``.

    Raises:
        ArgumentError: an impossible depth, shortcut, shape or list of widths.

    References:
        He, Zhang, Ren, Sun, *Deep Residual Learning*, arXiv:1512.03385; shortcuts A and B as in
        its section 3.3; Li et al., arXiv:1608.08710, for the pruned widths.
    """
    import keras

    blocks = (depth - 2) // 6
    if blocks < 1 or depth != 6 * blocks + 2:
        raise ArgumentError(f"Expected a depth of 6 n + 2 (20, 32, 44, 56, 110, ...); got {depth}.")
    if shortcut not in ("A", "B"):
        raise ArgumentError(f"Expected shortcut 'A' or 'B'; received {shortcut!r}.")
    widths = check_widths(widths, 3, "stage widths")
    if inner_widths is None:
        inner_widths = [width for width in widths for _ in range(blocks)]
    inner_widths = check_widths(inner_widths, 3 * blocks, "inner widths (one per block)")

    layers = Layers(seed)
    image = image_input(input_shape, halvings=2)
    x = layers.conv_norm_relu(image, widths[0], 3, "stem")
    for number, inner in enumerate(inner_widths):
        stage, block = divmod(number, blocks)
        x = basic_block(
            layers,
            x,
            inner,
            widths[stage],
            strides=2 if stage > 0 and block == 0 else 1,
            shortcut=shortcut,
            name=f"stage{stage + 1}_block{block + 1}",
        )
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.dense(x, classes, "classifier", activation=classifier_activation)
    return keras.Model(image, x, name=name or f"resnet{depth}{shortcut.lower()}")


def basic_block(
    layers: Layers, x: Any, inner: int, width: int, *, strides: int, shortcut: str, name: str
) -> Any:
    """Two 3x3 convolutions and a shortcut; shared with ResNet-34."""
    import keras

    branch = layers.conv_norm_relu(x, inner, 3, f"{name}_1", strides=strides)
    branch = layers.conv_norm(branch, width, 3, f"{name}_2")
    if strides > 1 or x.shape[-1] != width:
        x = _resized(layers, x, width, strides, shortcut, name)
    x = keras.layers.Add(name=f"{name}_add")([x, branch])
    return layers.relu(x, f"{name}_relu")


def _resized(layers: Layers, x: Any, width: int, strides: int, shortcut: str, name: str) -> Any:
    import keras

    if shortcut == "B":
        return layers.conv_norm(x, width, 1, f"{name}_shortcut", strides=strides)
    missing = width - x.shape[-1]
    if missing < 0:
        raise ArgumentError(
            f"Shortcut 'A' can only add channels; at {name} the width falls from {x.shape[-1]} to "
            f"{width}. Use shortcut 'B'."
        )
    # Pooling over one pixel is the subsampling, in an operation that every converter knows.
    x = keras.layers.AveragePooling2D(1, strides=strides, name=f"{name}_subsample")(x)
    before = missing // 2
    return keras.ops.pad(x, [[0, 0], [0, 0], [0, 0], [before, missing - before]])
