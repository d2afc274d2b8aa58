"""Pre-activation residual networks, for 32x32 images and for ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tfprune.errors import ArgumentError
from tfprune.zoo.layers import Layers, check_widths, image_input

EXPANSION = 4


def preresnet_cifar(
    depth: int = 164,
    *,
    widths: Sequence[int] = (16, 32, 64),
    classes: int = 10,
    input_shape: Sequence[int] = (32, 32, 3),
    classifier_activation: str | None = None,
    seed: int | None = None,
    name: str | None = None,
) -> Any:
    """The bottleneck ResNet with pre-activation of Network Slimming (ResNet-164).

    Depths 164 and 110 have the recounted parameter and MAC counts.

    Args:
        depth: ``9 n + 2`` for ``n`` bottlenecks a stage.
        widths: the bottlenecks' inner widths, one per stage; block outputs are 4 times wider.
        classes: units of the last layer.
        input_shape: (height, width, channels).
        classifier_activation: of the last layer; ``None`` returns logits.
        seed: makes the initial values reproducible.
        name: of the model.

    Returns:
        ``keras.Model``, float32 images ``(batch, *input_shape)`` to ``(batch, classes)``.

    Raises:
        ArgumentError: an impossible depth or list of widths.

    References:
        He, Zhang, Ren, Sun, *Identity Mappings in Deep Residual Networks*, arXiv:1603.05027;
        Liu et al., arXiv:1708.06519. The projection is a 1x1 convolution without batch
        normalisation, applied to the block's raw input.
    """
    import keras

    blocks = (depth - 2) // 9
    if blocks < 1 or depth != 9 * blocks + 2:
        raise ArgumentError(f"Expected a depth of 9 n + 2 (110, 164, ...); received {depth}.")
    widths = check_widths(widths, 3, "stage widths")

    layers = Layers(seed, gamma=0.5)
    image = image_input(input_shape, halvings=2)
    x = layers.conv(image, 16, 3, "stem_conv")
    for stage, width in enumerate(widths, start=1):
        for block in range(1, blocks + 1):
            prefix = f"stage{stage}_block{block}"
            strides = 2 if stage > 1 and block == 1 else 1
            branch = _bottleneck(layers, layers.norm_relu(x, f"{prefix}_1"), width, strides, prefix)
            if block == 1:
                projection = f"{prefix}_projection_conv"
                x = layers.conv(x, EXPANSION * width, 1, projection, strides=strides)
            x = keras.layers.Add(name=f"{prefix}_add")([x, branch])
    x = layers.norm_relu(x, "final")
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.dense(x, classes, "classifier", activation=classifier_activation)
    return keras.Model(image, x, name=name or f"preresnet{depth}")


def preresnet50(
    blocks: Sequence[int] = (3, 4, 6, 3),
    *,
    first_branch: Sequence[bool] = (True, True, True, True),
    classes: int = 1000,
    input_shape: Sequence[int] = (224, 224, 3),
    classifier_activation: str | None = None,
    seed: int | None = None,
    name: str | None = None,
) -> Any:
    """The pre-activation ResNet-50 of Sparse Structure Selection, with blocks taken out.

    The counts of the full network and of ResNet-41, -32 and -26 were recounted, for the structures
    of Liu et al. 2019's code and for others that fit the figures quoted for the SSS paper itself.

    Args:
        blocks: the residual branches left in each of the four stages, the first one included.
        first_branch: per stage, whether the first block keeps its branch; where it does not,
            its projection alone is left.
        classes: units of the last layer.
        input_shape: (height, width, channels).
        classifier_activation: of the last layer; ``None`` returns logits.
        seed: makes the initial values reproducible.
        name: of the model.

    Returns:
        ``keras.Model``, float32 images ``(batch, *input_shape)`` to ``(batch, classes)``.

    Raises:
        ArgumentError: not four stages, or a first branch in a stage of no branches.

    References:
        Huang, Wang, arXiv:1707.01213. Here the projection reads the activated input, as in the
        original pre-activation network.
    """
    import keras

    if len(blocks) != 4 or len(first_branch) != 4:
        raise ArgumentError(
            f"Expected four stages; received blocks={tuple(blocks)} and "
            f"first_branch={tuple(first_branch)}."
        )
    layers = Layers(seed)
    image = image_input(input_shape, halvings=5)
    x = layers.imagenet_stem(image, 64)
    for stage, (count, has_first) in enumerate(zip(blocks, first_branch, strict=True), start=1):
        if count < int(has_first):
            raise ArgumentError(f"Stage {stage} has {count} branches, and its first is asked for.")
        width, strides, prefix = 32 * 2**stage, 2 if stage > 1 else 1, f"stage{stage}_block1"
        active = layers.norm_relu(x, f"{prefix}_1")
        projection = f"{prefix}_projection_conv"
        x = layers.conv(active, EXPANSION * width, 1, projection, strides=strides)
        if has_first:
            branch = _bottleneck(layers, active, width, strides, prefix)
            x = keras.layers.Add(name=f"{prefix}_add")([x, branch])
        for block in range(2, 2 + count - int(has_first)):
            prefix = f"stage{stage}_block{block}"
            branch = _bottleneck(layers, layers.norm_relu(x, f"{prefix}_1"), width, 1, prefix)
            x = keras.layers.Add(name=f"{prefix}_add")([x, branch])
    x = layers.norm_relu(x, "final")
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.dense(x, classes, "classifier", activation=classifier_activation)
    return keras.Model(image, x, name=name or "preresnet50")


def _bottleneck(layers: Layers, active: Any, width: int, strides: int, prefix: str) -> Any:
    """The branch after its first batch normalisation and ReLU."""
    x = layers.conv(active, width, 1, f"{prefix}_1_conv")
    x = layers.conv(
        layers.norm_relu(x, f"{prefix}_2"), width, 3, f"{prefix}_2_conv", strides=strides
    )
    return layers.conv(layers.norm_relu(x, f"{prefix}_3"), EXPANSION * width, 1, f"{prefix}_3_conv")
