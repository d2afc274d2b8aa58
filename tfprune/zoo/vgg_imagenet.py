"""VGG networks for ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tfprune.errors import ArgumentError
from tfprune.zoo.layers import Layers, image_input
from tfprune.zoo.vgg_cifar import stage_widths


def vgg_imagenet(
    depth: int = 16,
    *,
    widths: Sequence[Sequence[int]] | None = None,
    head: str = "dense",
    batch_norm: bool = False,
    dropout: float = 0.5,
    classes: int = 1000,
    input_shape: Sequence[int] = (224, 224, 3),
    classifier_activation: str | None = None,
    seed: int | None = None,
    name: str | None = None,
) -> Any:
    """VGG for ImageNet, with the heads that ThiNet compares.

    Args:
        depth: 11, 13, 16 or 19.
        widths: the convolutions' channels, one sequence per stage; ``None`` is the full
            network. See :data:`tfprune.zoo.VGG_IMAGENET`.
        head: "dense" is two dense layers of 4096 units with ReLU and dropout; "average" is
            global average pooling in the place of the last pooling and of both (VGG-GAP).
        batch_norm: batch normalisation after every convolution.
        dropout: rate after each of the two dense layers.
        classes: units of the last layer.
        input_shape: (height, width, channels).
        classifier_activation: of the last layer; ``None`` returns logits.
        seed: makes the initial values reproducible.
        name: of the model.

    Returns:
        ``keras.Model``, float32 images ``(batch, *input_shape)`` to ``(batch, classes)``.

    Raises:
        ArgumentError: an unknown depth or head, or widths that do not fit the depth.

    References:
        Simonyan, Zisserman, arXiv:1409.1556; Luo, Wu, Lin (ThiNet), arXiv:1707.06342, for
        VGG-Conv, VGG-GAP and VGG-Tiny, whose counts were recounted; He, Zhang, Sun,
        arXiv:1707.06168, for the fivefold acceleration.
    """
    import keras

    stages = stage_widths(depth, widths)
    if head not in ("dense", "average"):
        raise ArgumentError(f"Expected head 'dense' or 'average'; received {head!r}.")
    layers = Layers(seed, dense_stddev=0.01)
    image = x = image_input(input_shape, halvings=len(stages))
    for stage, channels in enumerate(stages, start=1):
        for number, width in enumerate(channels, start=1):
            block = f"stage{stage}_{number}"
            x = layers.conv(x, width, 3, f"{block}_conv", bias=True)
            x = layers.norm_relu(x, block) if batch_norm else layers.relu(x, f"{block}_relu")
        if stage < len(stages) or head == "dense":
            x = keras.layers.MaxPooling2D(2, name=f"stage{stage}_pool")(x)
    if head == "average":
        x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    else:
        x = keras.layers.Flatten(name="flatten")(x)
        for number in (1, 2):
            x = layers.dense(x, 4096, f"hidden{number}")
            x = layers.relu(x, f"hidden{number}_relu")
            x = keras.layers.Dropout(dropout, name=f"hidden{number}_dropout")(x)
    x = layers.dense(x, classes, "classifier", activation=classifier_activation)
    return keras.Model(image, x, name=name or f"vgg{depth}_imagenet")
