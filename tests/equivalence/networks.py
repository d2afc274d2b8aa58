"""Networks to compare on LiteRT: one of every family of the zoo, and of keras.applications.

Shared by the tests of this folder and by the benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import tfprune
from tests.equivalence.applications import build, condition, images_for
from tfprune import zoo

# Grain in pixels, see images_for.
GRAIN = 8

ZOO: dict[str, Callable[[], Any]] = {
    "digits_resnet": lambda: zoo.digits_resnet(seed=0),
    "resnet_cifar A": lambda: zoo.resnet_cifar(20, shortcut="A", seed=0),
    "resnet_cifar B": lambda: zoo.resnet_cifar(20, shortcut="B", seed=0),
    "preresnet_cifar": lambda: zoo.preresnet_cifar(20, seed=0),
    "vgg_cifar": lambda: zoo.vgg_cifar(11, seed=0),
    "densenet_cifar": lambda: zoo.densenet_cifar(22, seed=0),
    "resnet34": lambda: zoo.resnet34(input_shape=(64, 64, 3), classes=100, seed=0),
    "resnet50": lambda: zoo.resnet50(input_shape=(64, 64, 3), classes=100, seed=0),
    "preresnet50": lambda: zoo.preresnet50(input_shape=(64, 64, 3), classes=100, seed=0),
    "vgg_imagenet": lambda: zoo.vgg_imagenet(
        11, head="average", batch_norm=True, input_shape=(64, 64, 3), classes=100, seed=0
    ),
}

# Families that convert in seconds, and the smallest images that their strides allow.
APPLICATIONS: dict[str, int] = {
    "MobileNet": 64,
    "MobileNetV2": 64,
    "MobileNetV3Small": 64,
    "EfficientNetB0": 64,
    "ResNet50V2": 64,
    "DenseNet121": 64,
    "Xception": 80,
    "InceptionV3": 80,
    "NASNetMobile": 64,
}

NETWORKS = (*ZOO, *APPLICATIONS)


def network(name: str) -> Any:
    """A network with random weights under which its activations stay moderate."""
    if name in APPLICATIONS:
        model = build(name, APPLICATIONS[name], GRAIN)
    else:
        model = ZOO[name]()
        condition(model, images(model, name, 4))
    return _estimated(model, name)


def images(model: Any, name: str, count: int, seed: int = 1) -> Any:
    """Images of coarse squares, in the range that the network expects."""
    grain = min(GRAIN, model.input_shape[1] // 4)
    return images_for(model, name, count, seed=seed, grain=grain)


def halved(model: Any, name: str) -> Any:
    """The network without half of its channels, its batch statistics estimated anew."""
    return _estimated(tfprune.prune(model, 0.5, round_to=8), name)


def _estimated(model: Any, name: str) -> Any:
    """The model with the batch statistics of 32 images.

    From four images, as the other tests have it, the last layers get statistics of so few values
    that other images are far outside: EfficientNetB0 then enlarges a change of the inputs by one
    unit in the last place to 1e-4 of the largest output, with or without LiteRT.
    """
    tfprune.recalibrate_batch_norm(model, images(model, name, 32, seed=2))
    return model


def relative_difference(expected: Any, received: Any) -> float:
    """The largest absolute difference, as a fraction of the largest absolute value."""
    expected = np.asarray(expected, np.float64)
    return float(np.abs(expected - received).max() / np.abs(expected).max())
