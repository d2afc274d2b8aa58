"""Data sets too large for memory: streamed from TFDS, decoded, cropped and resized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tfprune.data.pipeline import Preparation

# What is shuffled at a time: 4096 encoded images of about 100 kB.
BUFFER = 4096
# Liu et al. 2019 and everyone else on ImageNet: the short side is resized to 256 for a crop of 224.
SHORT_SIDE = 256 / 224


def streamed(made: Any, split: str, batch_size: int, preparation: Preparation, size: int) -> Any:
    """Batches in the order of the files: resized and cut out at the centre."""
    import tensorflow as tf

    def example(element: Any) -> tuple[Any, Any]:
        return centre(element["image"], size), tf.cast(element["label"], tf.int32)

    dataset = made.as_dataset(split=split, shuffle_files=False)
    return _batched(
        dataset.map(example, num_parallel_calls=tf.data.AUTOTUNE), batch_size, preparation
    )


def streamed_shuffled(
    made: Any,
    split: str,
    batch_size: int,
    preparation: Preparation,
    size: int,
    seed: int,
    augment: bool,
) -> tuple[Any, Callable[[int], Any]]:
    """Batches in random order; with ``augment``, a random part of the image, flipped at random."""
    import numpy as np
    import tensorflow as tf

    def batches(order_seed: int, again: bool) -> Any:
        dataset = made.as_dataset(split=split, shuffle_files=False)
        dataset = dataset.shuffle(BUFFER, seed=order_seed, reshuffle_each_iteration=again)
        draws = tf.data.Dataset.random(seed=order_seed, rerandomize_each_iteration=again)

        def example(element: Any, draw: Any) -> tuple[Any, Any]:
            image = element["image"]
            if augment:
                seeds = tf.stack([draw, tf.zeros_like(draw)])
                image = random_part(image, size, seeds)
                image = tf.image.stateless_random_flip_left_right(image, seeds + 1)
            else:
                image = centre(image, size)
            return image, tf.cast(element["label"], tf.int32)

        dataset = tf.data.Dataset.zip((dataset, draws))
        dataset = dataset.map(example, num_parallel_calls=tf.data.AUTOTUNE)
        return _batched(dataset, batch_size, preparation)

    def epoch(number: int) -> Any:
        mixed = np.random.SeedSequence([seed, number]).generate_state(1)[0]
        return batches(int(mixed), again=False)

    return batches(seed, again=True), epoch


def centre(image: Any, size: int) -> Any:
    """The short side resized to 256/224 of ``size``, then the central square."""
    import tensorflow as tf

    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    factor = size * SHORT_SIDE / tf.reduce_min(shape)
    target = tf.maximum(tf.cast(tf.round(shape * factor), tf.int32), size)
    return tf.image.resize_with_crop_or_pad(
        tf.image.resize(image, target, antialias=True), size, size
    )


def random_part(image: Any, size: int, seed: Any) -> Any:
    """A random part of 8 to 100 % of the area, sides 3:4 to 4:3, resized to a square."""
    import tensorflow as tf

    box = tf.zeros([1, 0, 4])
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        box,
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        use_image_if_no_bounding_boxes=True,
    )
    return tf.image.resize(tf.slice(image, begin, extent), [size, size], antialias=True)


def _batched(dataset: Any, batch_size: int, preparation: Preparation) -> Any:
    import tensorflow as tf

    dataset = dataset.batch(batch_size)
    dataset = dataset.map(
        lambda x, y: (preparation.normalize(x), y), num_parallel_calls=tf.data.AUTOTUNE
    )
    return dataset.prefetch(tf.data.AUTOTUNE)
