"""One way to read data: whatever holds examples becomes numpy batches.

Criteria, calibration, reconstruction and reports all take "data", which is one of

- a ``tf.data.Dataset`` of batches ``x`` or ``(x, y)``;
- a pair ``(x, y)`` of arrays;
- ``x`` alone, where labels are not needed;

where ``x`` is an array, or a list or a dictionary of arrays for a model with several inputs. As in
Keras, a *tuple* separates inputs from labels and a *list* holds several inputs. Nothing here
imports TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any

import numpy as np

from tfprune.errors import ArgumentError, DataError

_EXPECTED = (
    "Expected a tf.data.Dataset of batches, a pair (x, y) of arrays, or x alone; several inputs "
    "are a list or a dictionary of arrays."
)


def iterate(
    data: Any,
    *,
    batch_size: int = 128,
    limit: int | None = None,
    labels: bool = False,
    input_shape: Any = None,
) -> Iterator[tuple[Any, Any]]:
    """Reads data once, in its own order.

    The kind of data and the presence of labels are checked at the call; shapes as the batches come.

    Args:
        data: see the module's description.
        batch_size: of the batches cut from arrays; a dataset has its own.
        limit: stop after this many batches; needed for a dataset without an end.
        labels: labels are needed. Without it they are still handed out where there are any.
        input_shape: what ``model.input_shape`` says, to check every batch against: a tuple such
            as ``(None, 32, 32, 3)``, or a list or dictionary of them.

    Yields:
        ``(x, y)``: numpy arrays with the batch as their first axis, in the structure of the data
        (array, list or dictionary), with the data's own dtypes. ``y`` is ``None`` if there are no
        labels.

    Raises:
        DataError: no examples, no labels where they are needed, sample weights, parts of
            different lengths, or a shape that does not fit ``input_shape``.
        ArgumentError: ``batch_size`` or ``limit`` is not positive.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ArgumentError(f"Expected a positive {name}; received {value}.")
    batches: Iterator[tuple[Any, Any]]
    if is_dataset(data):
        if labels and not has_labels(data):
            raise DataError(
                "Labels are needed, and the dataset yields inputs alone. Expected batches "
                f"(x, y); its elements are {data.element_spec}."
            )
        if limit is None and int(data.cardinality()) == -1:
            raise DataError("The dataset has no end. Use .take(number of batches), or a limit.")
        batches = (_split(element) for element in data.as_numpy_iterator())
    else:
        x, y = _split(data)
        if labels and y is None:
            raise DataError("Labels are needed, and inputs alone came. Expected a pair (x, y).")
        batches = _cut(_arrays(x), None if y is None else _arrays(y), batch_size)
    return _checked(batches, limit, labels, input_shape)


def is_dataset(data: Any) -> bool:
    """Whether data is a ``tf.data.Dataset``, told by what it can do."""
    return hasattr(data, "element_spec") and hasattr(data, "as_numpy_iterator")


def has_labels(data: Any) -> bool:
    """Whether data has labels, without reading any of it.

    Raises:
        DataError: it is of no known kind, or carries sample weights.
    """
    if is_dataset(data):
        return _split(data.element_spec)[1] is not None
    x, y = _split(data)
    _arrays(x)
    return y is not None


def count_examples(data: Any) -> int | None:
    """The number of examples of arrays; ``None`` for a dataset, which would have to be read."""
    return None if is_dataset(data) else _length(_arrays(_split(data)[0]))


def _split(data: Any) -> tuple[Any, Any]:
    """Inputs and labels of an element or of a whole set of arrays."""
    if not isinstance(data, tuple):
        return data, None
    if len(data) == 1:
        return data[0], None
    if len(data) == 2:
        return data[0], data[1]
    raise DataError(
        f"{_EXPECTED} Received a tuple of {len(data)}; sample weights are not taken into account, "
        "so drop them on purpose: dataset.map(lambda x, y, w: (x, y))."
    )


def _arrays(part: Any) -> Any:
    """The same structure with numpy arrays in it."""
    if isinstance(part, Mapping):
        return {key: _array(value) for key, value in part.items()}
    if isinstance(part, list) and part and all(hasattr(value, "shape") for value in part):
        return [_array(value) for value in part]
    return _array(part)


def _array(part: Any) -> np.ndarray[Any, Any]:
    if not hasattr(part, "shape") and not isinstance(part, list):
        raise DataError(f"{_EXPECTED} Received {type(part).__name__}.")
    try:
        array = np.asarray(part)
    except ValueError as error:
        raise DataError(f"{_EXPECTED} Received a list that is no array: {error}") from error
    if array.ndim == 0 or array.dtype == object:
        raise DataError(
            f"{_EXPECTED} Received an array of shape {array.shape} and dtype {array.dtype}."
        )
    return array


def _leaves(part: Any) -> list[Any]:
    if isinstance(part, Mapping):
        return list(part.values())
    return list(part) if isinstance(part, (list, tuple)) else [part]


def _map(function: Callable[[Any], Any], part: Any) -> Any:
    if isinstance(part, Mapping):
        return {key: function(value) for key, value in part.items()}
    return [function(value) for value in part] if isinstance(part, list) else function(part)


def _length(*parts: Any) -> int:
    lengths = {leaf.shape[0] if leaf.ndim else None for part in parts for leaf in _leaves(part)}
    if len(lengths) != 1 or None in lengths:
        shapes = [[tuple(leaf.shape) for leaf in _leaves(part)] for part in parts]
        raise DataError(
            f"Inputs and labels must agree in their first axis, the examples; the shapes are "
            f"{shapes}."
        )
    length = lengths.pop()
    return 0 if length is None else int(length)


def _cut(x: Any, y: Any, batch_size: int) -> Iterator[tuple[Any, Any]]:
    length = _length(x) if y is None else _length(x, y)
    for start in range(0, length, batch_size):
        cut = itemgetter(slice(start, start + batch_size))
        yield _map(cut, x), None if y is None else _map(cut, y)


def _checked(
    batches: Iterator[tuple[Any, Any]], limit: int | None, labels: bool, input_shape: Any
) -> Iterator[tuple[Any, Any]]:
    seen = 0
    for x, y in batches:
        if labels and y is None:
            raise DataError("Labels are needed, and a batch came without them.")
        if input_shape is not None:
            check_shapes(x, input_shape)
        if _length(x) if y is None else _length(x, y):
            seen += 1
            yield x, y
        if seen == limit:
            return
    if not seen:
        raise DataError("The data are empty: at least one example is needed.")


def check_shapes(x: Any, input_shape: Any) -> None:
    """Checks one batch against ``model.input_shape``; ``None`` in a shape fits every size.

    Args:
        x: arrays, or the specifications of a dataset's elements.
        input_shape: a tuple, or a list or dictionary of them.

    Raises:
        DataError: another number of inputs, other names, or a shape that does not fit.
    """
    if isinstance(input_shape, Mapping):
        if not isinstance(x, Mapping) or set(x) != set(input_shape):
            names = sorted(x) if isinstance(x, Mapping) else type(x).__name__
            raise DataError(f"Expected inputs named {sorted(input_shape)}; received {names}.")
        pairs = [(x[key], input_shape[key]) for key in input_shape]
    else:
        several = isinstance(input_shape, list)
        shapes = input_shape if several else [input_shape]
        leaves = _leaves(x)
        if len(leaves) != len(shapes):
            raise DataError(f"Expected {len(shapes)} inputs; received {len(leaves)}.")
        pairs = list(zip(leaves, shapes, strict=True))
    for leaf, shape in pairs:
        if getattr(leaf.shape, "rank", 0) is None:
            continue
        came = tuple(leaf.shape)
        fits = len(came) == len(shape) and all(
            size is None or length is None or size == length
            for size, length in zip(shape, came, strict=True)
        )
        if not fits:
            unbatched = len(came) == len(shape) - 1
            advice = " It seems not to be batched: use .batch(n)." if unbatched else ""
            raise DataError(f"Expected batches of shape {tuple(shape)}; received {came}.{advice}")
