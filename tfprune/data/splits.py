"""What :func:`tfprune.data.load` returns, and how examples are divided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.errors import DataError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class DataInfo:
    """What a data set is.

    Attributes:
        name: as given to :func:`tfprune.data.load`.
        classes: number of classes.
        input_shape: (height, width, channels) of an example.
        counts: examples in "train", "validation" and "test".
        steps: batches in each of them; the last one may be smaller.
        batch_size: examples in a batch.
        mean: subtracted from each channel, after scaling to [0, 1].
        std: each channel is divided by it.
        augmented: whether the training images are shifted (and flipped) at random.
        source: where the data are from, and what to know about them when quoting figures.
    """

    name: str
    classes: int
    input_shape: tuple[int, int, int]
    counts: Mapping[str, int]
    steps: Mapping[str, int]
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmented: bool
    source: str


@dataclass(frozen=True)
class Splits:
    """A data set in three parts, as ``tf.data.Dataset`` of batches.

    Images are float32 ``(batch, height, width, channels)``, labels int32 ``(batch,)``. The three
    parts share no example: the validation examples are held out of the training set, and the test
    set is the one that was published; use it to report, never to choose.

    Attributes:
        train: reshuffled (and augmented anew) at every iteration, in a sequence that the seed
            fixes.
        validation: in a fixed order, never augmented.
        test: as validation.
        info: shapes, counts and the source.
        train_epoch: the training set of one epoch, by its number: the same batches every time it
            is asked for the same epoch, in this process or another. Give it to
            :func:`tfprune.fine_tune` for ``train`` where interrupted runs must be resumed exactly.
    """

    train: Any
    validation: Any
    test: Any
    info: DataInfo
    train_epoch: Callable[[int], Any]


def stratified(labels: Array, count: int, generator: np.random.Generator) -> Array:
    """Draws ``count`` examples with every class in its proportion.

    Shares are rounded by largest remainder, so the count is exact and no class is off by one or
    more from its share.

    Args:
        labels: integers ``(examples,)``.
        count: how many to draw.
        generator: the source of randomness.

    Returns:
        Sorted indices into ``labels``, int64 ``(count,)``.

    Raises:
        DataError: more are asked for than there are.
    """
    if count > len(labels):
        raise DataError(f"{count} examples are asked for, and there are {len(labels)}.")
    classes, sizes = np.unique(labels, return_counts=True)
    share = sizes * (count / len(labels))
    drawn = np.floor(share).astype(int)
    rest = np.argsort(drawn - share, kind="stable")[: count - drawn.sum()]
    drawn[rest] += 1
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:number]
        for label, number in zip(classes, drawn, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)
