"""Densely connected networks for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tfprune.errors import ArgumentError
from tfprune.zoo.layers import Layers, image_input


def densenet_cifar(
    depth: int = 40,
    *,
    growth: int = 12,
    initial: int = 24,
    bottleneck: bool = False,
    compression: float = 1.0,
    classes: int = 10,
    input_shape: Sequence[int] = (32, 32, 3),
    classifier_activation: str | None = None,
    seed: int | None = None,
    name: str | None = None,
) -> Any:
    """DenseNet for CIFAR: three dense blocks with two transitions between them.

    DenseNet-40 is the default (``initial=24`` as in the PyTorch code of Network Slimming, 16 as
    in the DenseNet paper); DenseNet-BC-100 is ``depth=100, bottleneck=True, compression=0.5``.
    The counts of all four were recounted.

    Args:
        depth: ``3 n + 4`` for ``n`` convolutions a block, ``6 n + 4`` with bottlenecks.
        growth: channels that each layer adds.
        initial: channels of the first convolution.
        bottleneck: a 1x1 convolution to ``4 * growth`` channels before every 3x3.
        compression: fraction of the channels that a transition keeps, rounded down.
        classes: units of the last layer.
        input_shape: (height, width, channels).
        classifier_activation: of the last layer; ``None`` returns logits.
        seed: makes the initial values reproducible.
        name: of the model.

    Returns:
        ``keras.Model``, float32 images ``(batch, *input_shape)`` to ``(batch, classes)``.

    Raises:
        ArgumentError: an impossible depth or compression.

    References:
        Huang, Liu, van der Maaten, Weinberger, arXiv:1608.06993. No dropout.
    """
    import keras

    convolutions = 2 if bottleneck else 1
    count = (depth - 4) // (3 * convolutions)
    if count < 1 or depth != 3 * convolutions * count + 4:
        raise ArgumentError(
            f"Expected a depth of {3 * convolutions} n + 4 with bottleneck={bottleneck}; "
            f"received {depth}."
        )
    if not 0 < compression <= 1:
        raise ArgumentError(f"Expected a compression in (0, 1]; received {compression}.")

    layers = Layers(seed, gamma=0.5)
    image = image_input(input_shape, halvings=2)
    x = layers.conv(image, initial, 3, "stem_conv")
    for block in (1, 2, 3):
        for number in range(1, count + 1):
            layer = f"block{block}_layer{number}"
            new = layers.norm_relu(x, f"{layer}_1")
            if bottleneck:
                new = layers.conv(new, 4 * growth, 1, f"{layer}_1_conv")
                new = layers.norm_relu(new, f"{layer}_2")
            new = layers.conv(new, growth, 3, f"{layer}_{convolutions}_conv")
            x = keras.layers.Concatenate(name=f"{layer}_concat")([x, new])
        if block < 3:
            x = layers.norm_relu(x, f"transition{block}")
            kept = int(x.shape[-1] * compression)
            x = layers.conv(x, kept, 1, f"transition{block}_conv")
            x = keras.layers.AveragePooling2D(2, name=f"transition{block}_pool")(x)
    x = layers.norm_relu(x, "final")
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.dense(x, classes, "classifier", activation=classifier_activation)
    return keras.Model(image, x, name=name or f"densenet{depth}")
