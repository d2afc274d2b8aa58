"""From arrays in memory to batches: order, augmentation, normalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.data.splits import Array
from tfprune.errors import ArgumentError


@dataclass(frozen=True)
class Preparation:
    """How raw images become what a network is fed.

    Attributes:
        scale: raw values are divided by it.
        mean: then subtracted, per channel.
        std: then divided by, per channel.
        pad: zeros around a training image before a random crop; of raw values, as in the papers.
        flip: random left-right flips.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool

    def normalize(self, images: Any) -> Any:
        """Raw images of any numeric dtype to float32."""
        import tensorflow as tf

        mean = tf.constant(self.mean, tf.float32)
        return (tf.cast(images, tf.float32) / self.scale - mean) / tf.constant(self.std, tf.float32)

    def augment(self, image: Any, seed: Any) -> Any:
        """Shifts and flips one raw image; ``seed`` is an int64 vector of two."""
        import tensorflow as tf

        if self.pad:
            border = [[self.pad, self.pad], [self.pad, self.pad], [0, 0]]
            padded = tf.pad(image, border)
            image = tf.image.stateless_random_crop(padded, tf.shape(image), seed)
        if self.flip:
            # Another stream of numbers than the crop's: the two must not go together.
            image = tf.image.stateless_random_flip_left_right(image, seed + 1)
        return image


def plain(images: Array, labels: Array, batch_size: int, preparation: Preparation) -> Any:
    """Batches in the order of the arrays."""
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).batch(batch_size)
    return dataset.map(
        lambda x, y: (preparation.normalize(x), y), num_parallel_calls=tf.data.AUTOTUNE
    ).prefetch(tf.data.AUTOTUNE)


def shuffled(
    images: Array, labels: Array, batch_size: int, preparation: Preparation, seed: int
) -> tuple[Any, Callable[[int], Any]]:
    """Batches in random order: one dataset that is reshuffled at every iteration, and one by epoch.

    Returns:
        The dataset, and the function from an epoch's number to that epoch's dataset.
    """
    import tensorflow as tf

    # One copy as tensors, shared by all the datasets below.
    with tf.device("CPU:0"):
        all_images, all_labels = tf.constant(images), tf.constant(labels)
    count = len(labels)

    def example(index: Any, draw: Any) -> tuple[Any, Any]:
        image = tf.gather(all_images, index)
        return preparation.augment(image, tf.stack([draw, index])), tf.gather(all_labels, index)

    def batches(order: Any, draws: Any) -> Any:
        dataset = tf.data.Dataset.zip((order, draws))
        dataset = dataset.map(example, num_parallel_calls=tf.data.AUTOTUNE).batch(batch_size)
        dataset = dataset.map(
            lambda x, y: (preparation.normalize(x), y), num_parallel_calls=tf.data.AUTOTUNE
        )
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(-(-count // batch_size)))
        return dataset.prefetch(tf.data.AUTOTUNE)

    def epoch(number: int) -> Any:
        if number < 0:
            raise ArgumentError(f"Expected the number of an epoch, from 0; received {number}.")
        # SeedSequence mixes the two numbers: epoch 1 of seed 0 is not epoch 0 of seed 1.
        generator = np.random.default_rng(np.random.SeedSequence([seed, number]))
        order = tf.data.Dataset.from_tensor_slices(generator.permutation(count).astype(np.int64))
        draws = tf.data.Dataset.from_tensors(tf.constant(generator.integers(2**62), tf.int64))
        return batches(order, draws.repeat())

    order = tf.data.Dataset.range(count).shuffle(count, seed=seed, reshuffle_each_iteration=True)
    draws = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True)
    return batches(order, draws), epoch
