"""Training data by epoch, so that an epoch's batches depend on its number and the seed only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfprune.batches import check_shapes, count_examples, has_labels, is_dataset, iterate
from tfprune.errors import DataError


@dataclass(frozen=True)
class TrainingData:
    """Training data by epoch.

    Attributes:
        epoch: from an epoch's number to its dataset.
        steps: batches in an epoch; ``None`` if not known beforehand.
        label_shape: of a batch; ``None`` if there are several kinds, or not known.
    """

    epoch: Callable[[int], Any]
    steps: int | None
    label_shape: tuple[int | None, ...] | None


def training_data(
    data: Any, *, batch_size: int, seed: int, finished: int, input_shape: Any
) -> TrainingData:
    """Takes training data of any kind.

    Args:
        data: a ``tf.data.Dataset`` of batches, a pair of arrays, or a function from an epoch's
            number to its dataset.
        batch_size: of the batches cut from arrays.
        seed: of the order of arrays.
        finished: epochs that an interrupted run has had already.
        input_shape: of the model, or ``None``.

    Raises:
        DataError: no examples, no labels, no end, or a shape that does not fit the model.
    """
    if is_dataset(data):
        _check_dataset(data, "training", input_shape)
        # A dataset that reshuffles moves on in its sequence of orders with every iterator that is
        # made. Those of the finished epochs are made, and not read.
        for _ in range(finished):
            iter(data)
        once = _one_iterator(data)
        return _described(lambda _: once, data)
    if callable(data):
        first = data(finished)
        if not is_dataset(first):
            raise DataError(
                "Expected the function for the training data to return the tf.data.Dataset of an "
                f"epoch; it returned {type(first).__name__}."
            )
        _check_dataset(first, "training", input_shape)
        return _described(data, first)
    epoch = _arrays_by_epoch(data, batch_size, seed, input_shape)
    return _described(epoch, epoch(finished))


def _one_iterator(data: Any) -> Any:
    """The same dataset, whose iterators make one of ``data`` when they are first read.

    ``fit`` makes an iterator too many after some epochs, by rules of its own, and would so skip
    orders of a dataset that reshuffles.
    """
    import tensorflow as tf

    outer = tf.data.Dataset.range(1).flat_map(lambda _: data)
    size = data.cardinality()
    if int(size) > 0:
        outer = outer.apply(tf.data.experimental.assert_cardinality(size))
    return outer.with_options(data.options())


def _described(epoch: Callable[[int], Any], example: Any) -> TrainingData:
    size = int(example.cardinality())
    return TrainingData(epoch, size if size > 0 else None, _label_shape(example.element_spec))


def fixed_order(data: Any, *, batch_size: int, input_shape: Any) -> Any:
    """Validation data as a dataset of batches.

    Raises:
        DataError: as for the training data.
    """
    import tensorflow as tf

    if is_dataset(data):
        _check_dataset(data, "validation", input_shape)
        return data
    _check_arrays(data, "validation", input_shape)
    return tf.data.Dataset.from_tensor_slices(_as_arrays(data)).batch(batch_size)


def _arrays_by_epoch(
    data: Any, batch_size: int, seed: int, input_shape: Any
) -> Callable[[int], Any]:
    import tensorflow as tf

    _check_arrays(data, "training", input_shape)
    count = count_examples(data) or 0
    with tf.device("CPU:0"):
        tensors = tf.nest.map_structure(tf.constant, _as_arrays(data))

    def epoch(number: int) -> Any:
        order = np.random.default_rng(np.random.SeedSequence([seed, number])).permutation(count)
        batches = tf.data.Dataset.from_tensor_slices(order).batch(batch_size)
        return batches.map(
            lambda index: tf.nest.map_structure(lambda part: tf.gather(part, index), tensors),
            num_parallel_calls=tf.data.AUTOTUNE,
        ).prefetch(tf.data.AUTOTUNE)

    return epoch


def _as_arrays(data: Any) -> tuple[Any, Any]:
    """Arrays of the whole set, whatever array-likes came."""
    ((x, y),) = iterate(data, batch_size=max(count_examples(data) or 1, 1), labels=True)
    # tf.data takes a list for one array: several inputs go in a tuple.
    return (tuple(x) if isinstance(x, list) else x), y


def _check_arrays(data: Any, role: str, input_shape: Any) -> None:
    if not has_labels(data):
        raise DataError(f"The {role} data have no labels. Expected a pair (x, y).")
    # Kind, lengths and shapes; one batch of one example shows them all.
    next(iterate(data, batch_size=1, labels=True, input_shape=input_shape))


def _check_dataset(data: Any, role: str, input_shape: Any) -> None:
    if not has_labels(data):
        raise DataError(
            f"The {role} data have no labels: the dataset's elements are {data.element_spec}. "
            "Expected batches (x, y)."
        )
    size = int(data.cardinality())
    if size == 0:
        raise DataError(f"The {role} data are empty: at least one batch is needed.")
    if size == -1:
        raise DataError(
            f"The {role} data have no end. Give an epoch: .take(number of batches), no .repeat()."
        )
    if input_shape is not None:
        check_shapes(data.element_spec[0], input_shape)


def _label_shape(spec: Any) -> tuple[int | None, ...] | None:
    labels = spec[1]
    if isinstance(labels, (Mapping, list, tuple)) or labels.shape.rank is None:
        return None
    return tuple(labels.shape)
