"""Loading a data set by its name."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np

from tfprune.data import sources, streams
from tfprune.data.pipeline import Preparation, plain, shuffled
from tfprune.data.recipes import Normalization, Recipe, constants, recipe
from tfprune.data.splits import Array, DataInfo, Splits, stratified
from tfprune.errors import ArgumentError, DataError


def load(
    name: str,
    *,
    batch_size: int = 128,
    validation: float = 0.1,
    augment: bool = False,
    subset: int | None = None,
    normalization: Normalization = "dataset",
    image_size: int | None = None,
    seed: int = 0,
    data_dir: str | None = None,
    download: bool = True,
) -> Splits:
    """Loads a data set, divided into training, validation and test set.

    "digits" is carried by scikit-learn and always there: 1797 grey images of 8x8. "mnist",
    "fashion_mnist", "cifar10", "cifar100", "imagenette" and "imagenet2012" come from TFDS
    (``pip install 'tfprune[datasets]'``), which downloads them on first use; without a network
    it retries for minutes before it gives up, unless ``download=False``. For the last two the
    published validation set is the test set, and training images are streamed.

    Args:
        name: of the data set; see :data:`tfprune.data.NAMES`.
        batch_size: examples in a batch.
        validation: fraction of the training examples that are held out, class by class; never
            of the test set. At least one example is held out.
        augment: the customary random changes of training images: a crop after padding (4 pixels
            for CIFAR, 2 for the MNISTs, 1 for the digits) and, for CIFAR and Fashion-MNIST, a
            flip; for ImageNet a part of random size, and a flip. Those for CIFAR and ImageNet
            are the papers'; those for the others are ours.
        subset: draw this many training examples, class by class, before the validation examples
            are held out. The test set stays whole. (The sets of ImageNet are divided by the
            place in TFDS's files, which are shuffled once and for all, not class by class.)
        normalization: "dataset" (the constants of Liu et al. 2019 for CIFAR, of ImageNet for
            ImageNet; the others are scaled to [0, 1]), "imagenet", "unit" (scaled to [0, 1]), or
            a pair (mean, std) of one number per channel, for values in [0, 1].
        image_size: pixels a side, for the sets of ImageNet; 224 if ``None``.
        seed: of the division, the order and the augmentation. The test set does not depend on it.
        data_dir: where TFDS keeps data; ``None`` is its own choice.
        download: whether TFDS may download.

    Returns:
        :class:`tfprune.data.Splits`.

    Raises:
        ArgumentError: an unknown name, or a value out of range.
        DataError: TFDS is missing, or the data are not there and cannot be downloaded.

    References:
        Liu et al., *Rethinking the Value of Network Pruning*, arXiv:1810.05270, for CIFAR:
        padding of 4, random crop, flip, and its constants.
    """
    chosen = recipe(name)
    if batch_size < 1:
        raise ArgumentError(f"Expected a positive batch_size; received {batch_size}.")
    if not 0 < validation < 1:
        raise ArgumentError(
            f"Expected validation as a fraction between 0 and 1; received {validation}."
        )
    if subset is not None and subset < 2:
        raise ArgumentError(f"Expected a subset of at least 2 examples; received {subset}.")
    if image_size is not None and not chosen.large:
        raise ArgumentError(f"image_size is for the sets of ImageNet; {name} has one size.")
    if seed < 0:
        raise ArgumentError(f"Expected a seed from 0; received {seed}.")
    mean, std = constants(chosen, normalization)
    preparation = Preparation(
        chosen.scale, mean, std, chosen.pad if augment else 0, chosen.flip and augment
    )
    if chosen.large:
        made = sources.builder(str(chosen.tfds), data_dir, download)
        size = image_size or chosen.input_shape[0]
        parts = _stream(
            made, chosen, preparation, size, batch_size, validation, subset, seed, augment
        )
        shape, source = (size, size, 3), sources.describe(made)
    else:
        if chosen.tfds is None:
            train, test, source = sources.digits()
        else:
            made = sources.builder(chosen.tfds, data_dir, download)
            train, test = (sources.arrays(made, split) for split in chosen.splits)
            source = sources.describe(made)
        parts = _arrays(train, test, preparation, batch_size, validation, subset, seed)
        shape = chosen.input_shape
    datasets, train_epoch, counts = parts
    info = DataInfo(
        name=name,
        classes=chosen.classes,
        input_shape=shape,
        counts=MappingProxyType(counts),
        steps=MappingProxyType({key: -(-count // batch_size) for key, count in counts.items()}),
        batch_size=batch_size,
        mean=mean,
        std=std,
        augmented=augment,
        source=source,
    )
    return Splits(**datasets, info=info, train_epoch=train_epoch)


def _arrays(
    train: tuple[Array, Array],
    test: tuple[Array, Array],
    preparation: Preparation,
    batch_size: int,
    validation: float,
    subset: int | None,
    seed: int,
) -> tuple[dict[str, Any], Any, dict[str, int]]:
    images, labels = train
    generator = np.random.default_rng(seed)
    if subset is not None:
        chosen = stratified(labels, subset, generator)
        images, labels = images[chosen], labels[chosen]
    held = stratified(labels, held_out(len(labels), validation), generator)
    rest = np.setdiff1d(np.arange(len(labels)), held)
    dataset, train_epoch = shuffled(images[rest], labels[rest], batch_size, preparation, seed)
    datasets = {
        "train": dataset,
        "validation": plain(images[held], labels[held], batch_size, preparation),
        "test": plain(*test, batch_size, preparation),
    }
    counts = {"train": len(rest), "validation": len(held), "test": len(test[1])}
    return datasets, train_epoch, counts


def _stream(
    made: Any,
    chosen: Recipe,
    preparation: Preparation,
    size: int,
    batch_size: int,
    validation: float,
    subset: int | None,
    seed: int,
    augment: bool,
) -> tuple[dict[str, Any], Any, dict[str, int]]:
    """The same for streams, where examples are divided by their place in TFDS's shuffled files."""
    train, test = chosen.splits
    there = made.info.splits[train].num_examples
    if subset is not None and subset > there:
        raise DataError(f"{subset} examples are asked for, and there are {there}.")
    total = subset or there
    held = held_out(total, validation)
    dataset, train_epoch = streams.streamed_shuffled(
        made, f"{train}[{held}:{total}]", batch_size, preparation, size, seed, augment
    )
    datasets = {
        "train": dataset,
        "validation": streams.streamed(made, f"{train}[:{held}]", batch_size, preparation, size),
        "test": streams.streamed(made, test, batch_size, preparation, size),
    }
    counts = {
        "train": total - held,
        "validation": held,
        "test": made.info.splits[test].num_examples,
    }
    return datasets, train_epoch, counts


def held_out(total: int, fraction: float) -> int:
    """How many of ``total`` training examples are held out: rounded, at least one, not all."""
    return min(max(round(total * fraction), 1), total - 1)
