"""VGG networks for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tfprune.errors import ArgumentError
from tfprune.zoo.layers import Layers, check_widths, image_input

CONVOLUTIONS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)


def vgg_cifar(
    depth: int = 16,
    *,
    widths: Sequence[Sequence[int]] | None = None,
    hidden: int | None = None,
    conv_bias: bool = False,
    classes: int = 10,
    input_shape: Sequence[int] = (32, 32, 3),
    classifier_activation: str | None = None,
    seed: int | None = None,
    name: str | None = None,
) -> Any:
    """VGG for CIFAR: five stages of conv - batch normalisation - ReLU, and a short head.

    Three variants of the papers, whose counts were recounted: Li et al. 2017 (``hidden=512``),
    Network Slimming (the defaults) and the weight-level nets of Liu et al. 2019
    (``conv_bias=True``).

    Args:
        depth: 11, 13, 16 or 19.
        widths: the convolutions' channels, one sequence per stage, as long as the depth says;
            ``None`` is 64, 128, 256, 512, 512. See :data:`tfprune.zoo.VGG_CIFAR`.
        hidden: units of a hidden dense layer, with batch normalisation and ReLU, before the
            classifier; ``None`` is a linear head.
        conv_bias: convolutions carry a bias (which the batch normalisation makes idle).
        classes: units of the last layer.
        input_shape: (height, width, channels).
        classifier_activation: of the last layer; ``None`` returns logits.
        seed: makes the initial values reproducible.
        name: of the model.

    Returns:
        ``keras.Model``, float32 images ``(batch, *input_shape)`` to ``(batch, classes)``.

    Raises:
        ArgumentError: an unknown depth, or widths that do not fit it.

    References:
        Simonyan, Zisserman, arXiv:1409.1556; Li et al., arXiv:1608.08710; Liu et al. (Network
        Slimming), arXiv:1708.06519. Initial values as in the reference codes: scale of batch
        normalisation 0.5, dense kernels N(0, 0.01).
    """
    import keras

    stages = stage_widths(depth, widths)
    layers = Layers(seed, gamma=0.5, dense_stddev=0.01)
    image = x = image_input(input_shape, halvings=len(stages))
    for stage, channels in enumerate(stages, start=1):
        for number, width in enumerate(channels, start=1):
            x = layers.conv_norm_relu(x, width, 3, f"stage{stage}_{number}", bias=conv_bias)
        pool = keras.layers.MaxPooling2D if stage < len(stages) else keras.layers.AveragePooling2D
        x = pool(2, name=f"stage{stage}_pool")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    if hidden is not None:
        (hidden,) = check_widths([hidden], 1, "hidden units")
        x = layers.norm_relu(layers.dense(x, hidden, "hidden"), "hidden")
    x = layers.dense(x, classes, "classifier", activation=classifier_activation)
    return keras.Model(image, x, name=name or f"vgg{depth}")


def stage_widths(depth: int, widths: Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...]:
    """The channels of every convolution, by stage, checked against the depth."""
    if depth not in CONVOLUTIONS:
        raise ArgumentError(f"Expected a depth of {sorted(CONVOLUTIONS)}; received {depth}.")
    counts = CONVOLUTIONS[depth]
    if widths is None:
        return tuple((width,) * count for width, count in zip(WIDTHS, counts, strict=True))
    if len(widths) != len(counts):
        raise ArgumentError(
            f"Expected the widths of {len(counts)} stages; received {len(widths)}: {widths}."
        )
    return tuple(
        check_widths(stage, count, f"widths in stage {number} of VGG-{depth}")
        for number, (stage, count) in enumerate(zip(widths, counts, strict=True), start=1)
    )
