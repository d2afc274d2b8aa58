"""Residual networks for ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfprune.errors import ArgumentError
from tfprune.zoo.layers import Layers, check_widths, image_input
from tfprune.zoo.resnet_cifar import basic_block

BLOCKS = (3, 4, 6, 3)
WIDTHS = (64, 128, 256, 512)
EXPANSION = 4


def resnet34(
    *,
    widths: Sequence[int] = WIDTHS,
    inner_widths: Sequence[int] | None = None,
    classes: int = 1000,
    input_shape: Sequence[int] = (224, 224, 3),
    classifier_activation: str | None = None,
    seed: int | None = None,
    name: str | None = None,
) -> Any:
    """ResNet-34 with 1x1 projections (He et al. 2016, option B).

    Args:
        widths: channels of the block outputs, one per stage. Li et al.'s ResNet-34-C is
            ``(64, 128, 204, 512)`` with the full inner widths.
        inner_widths: channels of the first convolution of each of the 16 blocks; ``None`` is
            64, 128, 256, 512 by stage. See :data:`tfprune.zoo.RESNET_INNER` for A and B.
        classes: units of the last layer.
        input_shape: (height, width, channels).
        classifier_activation: of the last layer; ``None`` returns logits.
        seed: makes the initial values reproducible.
        name: of the model.

    Returns:
        ``keras.Model``, float32 images ``(batch, *input_shape)`` to ``(batch, classes)``.

    Raises:
        ArgumentError: lists of widths of the wrong length.

    References:
        He et al., arXiv:1512.03385; Li et al., arXiv:1608.08710. Counts recounted; the paper's
        own leave the projections and batch normalisation out.
    """
    import keras

    widths = check_widths(widths, 4, "stage widths")
    stages = [stage for stage, count in enumerate(BLOCKS) for _ in range(count)]
    if inner_widths is None:
        inner_widths = [WIDTHS[stage] for stage in stages]
    inner_widths = check_widths(inner_widths, len(stages), "inner widths (one per block)")

    layers = Layers(seed)
    image = image_input(input_shape, halvings=5)
    x = layers.imagenet_stem(image, widths[0])
    for number, (stage, inner) in enumerate(zip(stages, inner_widths, strict=True)):
        block = number - sum(BLOCKS[:stage])
        x = basic_block(
            layers,
            x,
            inner,
            widths[stage],
            strides=2 if stage > 0 and block == 0 else 1,
            shortcut="B",
            name=f"stage{stage + 1}_block{block + 1}",
        )
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.dense(x, classes, "classifier", activation=classifier_activation)
    return keras.Model(image, x, name=name or "resnet34")


def resnet50(
    *,
    stride_in: str = "3x3",
    inner_widths: Sequence[Sequence[int]] | None = None,
    sampled_inputs: Sequence[int] | None = None,
    classes: int = 1000,
    input_shape: Sequence[int] = (224, 224, 3),
    classifier_activation: str | None = None,
    seed: int | None = None,
    name: str | None = None,
) -> Any:
    """ResNet-50 with bottlenecks and 1x1 projections.

    Args:
        stride_in: "3x3" halves the image in the middle convolution (torchvision), "1x1" in the
            first (He et al. 2016, Caffe and ``keras.applications``). Same parameters, other MACs.
        inner_widths: the pairs of widths of the first and the second convolution, one pair per
            stage or one per block (16); ``None`` is 64, 128, 256, 512 for both. See
            :data:`tfprune.zoo.RESNET50_INNER`.
        sampled_inputs: per block, how many of the input's channels the first convolution reads,
            as in the channel sampler of He et al. 2017; here they are spread evenly. ``None``
            reads all.
        classes: units of the last layer.
        input_shape: (height, width, channels).
        classifier_activation: of the last layer; ``None`` returns logits.
        seed: makes the initial values reproducible.
        name: of the model.

    Returns:
        ``keras.Model``, float32 images ``(batch, *input_shape)`` to ``(batch, classes)``.

    Raises:
        ArgumentError: an unknown place of the stride, or lists that do not fit.

    References:
        He et al., arXiv:1512.03385; Luo et al. (ThiNet), arXiv:1707.06342; He, Zhang, Sun,
        arXiv:1707.06168. Counts recounted for both strides.
    """
    import keras

    if stride_in not in ("3x3", "1x1"):
        raise ArgumentError(f"Expected stride_in '3x3' or '1x1'; received {stride_in!r}.")
    stages = [stage for stage, count in enumerate(BLOCKS) for _ in range(count)]
    if inner_widths is None:
        inner_widths = [(width, width) for width in WIDTHS]
    if len(inner_widths) == len(BLOCKS):
        inner_widths = [inner_widths[stage] for stage in stages]
    if len(inner_widths) != len(stages):
        raise ArgumentError(
            f"Expected 4 or 16 pairs of inner widths; received {len(inner_widths)}."
        )
    if sampled_inputs is not None:
        sampled_inputs = check_widths(sampled_inputs, len(stages), "sampled inputs (one per block)")

    layers = Layers(seed)
    image = image_input(input_shape, halvings=5)
    x = layers.imagenet_stem(image, 64)
    for number, (stage, pair) in enumerate(zip(stages, inner_widths, strict=True)):
        first, second = check_widths(pair, 2, "inner widths in a pair")
        block = number - sum(BLOCKS[:stage])
        prefix = f"stage{stage + 1}_block{block + 1}"
        strides = 2 if stage > 0 and block == 0 else 1
        early, late = (strides, 1) if stride_in == "1x1" else (1, strides)
        branch = x if sampled_inputs is None else _sampled(x, sampled_inputs[number])
        branch = layers.conv_norm_relu(branch, first, 1, f"{prefix}_1", strides=early)
        branch = layers.conv_norm_relu(branch, second, 3, f"{prefix}_2", strides=late)
        branch = layers.conv_norm(branch, EXPANSION * WIDTHS[stage], 1, f"{prefix}_3")
        if block == 0:
            projection = f"{prefix}_projection"
            x = layers.conv_norm(x, EXPANSION * WIDTHS[stage], 1, projection, strides=strides)
        x = keras.layers.Add(name=f"{prefix}_add")([x, branch])
        x = layers.relu(x, f"{prefix}_relu")
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.dense(x, classes, "classifier", activation=classifier_activation)
    return keras.Model(image, x, name=name or "resnet50")


def _sampled(x: Any, count: int) -> Any:
    import keras

    channels = x.shape[-1]
    if count > channels:
        raise ArgumentError(f"A block with {channels} input channels can't sample {count} of them.")
    return keras.ops.take(x, np.arange(count) * channels // count, axis=-1)
