"""What is customary for each data set: shapes, normalisation, augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tfprune.errors import ArgumentError

Normalization = str | tuple[tuple[float, ...], tuple[float, ...]]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Liu et al. 2019 (arXiv:1810.05270) use these for CIFAR-10 and CIFAR-100 alike.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True)
class Recipe:
    """The customary preparation of one data set.

    Attributes:
        tfds: the name in TFDS; ``None`` for the embedded digits.
        input_shape: (height, width, channels) of an example.
        classes: number of classes.
        scale: the largest raw value, which becomes 1.
        mean: per channel, of the scaled values.
        std: per channel.
        pad: pixels added around a training image before a random crop to its size.
        flip: training images are flipped left to right at random.
        splits: TFDS names of the training set and of the one to test on.
        large: too large for memory: streamed and resized.
    """

    tfds: str | None
    input_shape: tuple[int, int, int]
    classes: int
    scale: float = 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    pad: int = 0
    flip: bool = False
    splits: tuple[str, str] = ("train", "test")
    large: bool = False


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "digits": Recipe(None, (8, 8, 1), 10, scale=16.0, pad=1),
        "mnist": Recipe("mnist", (28, 28, 1), 10, pad=2),
        "fashion_mnist": Recipe("fashion_mnist", (28, 28, 1), 10, pad=2, flip=True),
        "cifar10": Recipe(
            "cifar10", (32, 32, 3), 10, mean=CIFAR_MEAN, std=CIFAR_STD, pad=4, flip=True
        ),
        "cifar100": Recipe(
            "cifar100", (32, 32, 3), 100, mean=CIFAR_MEAN, std=CIFAR_STD, pad=4, flip=True
        ),
        "imagenette": Recipe(
            "imagenette/320px-v2",
            (224, 224, 3),
            10,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            flip=True,
            splits=("train", "validation"),
            large=True,
        ),
        "imagenet2012": Recipe(
            "imagenet2012",
            (224, 224, 3),
            1000,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            flip=True,
            splits=("train", "validation"),
            large=True,
        ),
    }
)
NAMES = tuple(RECIPES)
"""The names that :func:`tfprune.data.load` knows."""


def recipe(name: str) -> Recipe:
    """The recipe of a data set.

    Raises:
        ArgumentError: the name is not known.
    """
    if name not in RECIPES:
        raise ArgumentError(f"Expected the name of a data set, {NAMES}; received {name!r}.")
    return RECIPES[name]


def constants(
    recipe: Recipe, normalization: Normalization
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel.

    Raises:
        ArgumentError: an unknown name, or constants that do not fit the channels.
    """
    channels = recipe.input_shape[-1]
    if normalization == "dataset":
        mean, std = recipe.mean, recipe.std
    elif normalization == "imagenet":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif normalization == "unit":
        mean, std = (0.0,), (1.0,)
    elif isinstance(normalization, tuple) and len(normalization) == 2:
        mean, std = (tuple(float(value) for value in part) for part in normalization)
    else:
        raise ArgumentError(
            "Expected normalization 'dataset', 'imagenet', 'unit' or a pair (mean, std) of one "
            f"number per channel; received {normalization!r}."
        )
    if len(mean) == len(std) == 1:
        mean, std = mean * channels, std * channels
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ArgumentError(
            f"Expected a mean and a positive standard deviation for each of {channels} channels; "
            f"received {mean} and {std}."
        )
    return mean, std
