"""Data of every accepted kind become numpy batches, and the others are refused in words."""

import numpy as np
import pytest
import tensorflow as tf

from tfprune.batches import count_examples, has_labels, iterate
from tfprune.errors import ArgumentError, DataError

X = np.arange(20, dtype=np.float32).reshape(10, 2)
Y = np.arange(10)


def read(data, **options):
    return list(iterate(data, **options))


def test_arrays_are_cut_in_order_with_the_rest_at_the_end() -> None:
    batches = read((X, Y), batch_size=4)
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert np.array_equal(np.concatenate([x for x, _ in batches]), X)
    assert np.array_equal(np.concatenate([y for _, y in batches]), Y)


def test_a_dataset_keeps_its_batches_and_dtypes() -> None:
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(3)
    batches = read(dataset, batch_size=7, labels=True)
    assert [len(x) for x, _ in batches] == [3, 3, 3, 1]
    x, y = batches[0]
    assert isinstance(x, np.ndarray) and x.dtype == np.float32 and y.dtype == Y.dtype
    assert np.array_equal(x, X[:3])


@pytest.mark.parametrize("data", [X, (X,), tf.constant(X), tf.data.Dataset.from_tensors(X)])
def test_inputs_alone(data) -> None:
    ((x, y),) = read(data)
    assert y is None and np.array_equal(x, X)
    assert not has_labels(data)


def test_several_inputs_as_a_list_and_as_a_dictionary() -> None:
    ((x, y),) = read(([X, X + 1], Y))
    assert isinstance(x, list) and np.array_equal(x[1], X + 1) and np.array_equal(y, Y)
    for data in (
        ({"a": X, "b": X + 1}, Y),
        tf.data.Dataset.from_tensors(({"a": X, "b": X + 1}, Y)),
    ):
        ((x, y),) = read(data)
        assert sorted(x) == ["a", "b"] and np.array_equal(x["b"], X + 1)


def test_labels_of_several_outputs() -> None:
    ((_, y),) = read((X, {"one": Y, "two": Y * 2}))
    assert np.array_equal(y["two"], Y * 2)


def test_a_plain_list_of_numbers_is_one_array() -> None:
    ((x, y),) = read((X.tolist(), Y.tolist()))
    assert x.shape == (10, 2) and np.array_equal(y, Y)


def test_the_limit_stops_an_endless_dataset() -> None:
    endless = tf.data.Dataset.from_tensors(X).repeat()
    assert len(read(endless, limit=3)) == 3
    with pytest.raises(DataError, match=r"no end.*\.take"):
        iterate(endless)


def test_the_limit_does_not_read_a_batch_too_many() -> None:
    drawn = []

    class Counted:
        element_spec = tf.TensorSpec((None, 2), tf.float32)

        def as_numpy_iterator(self):
            for number in range(5):
                drawn.append(number)
                yield X

    assert len(read(Counted(), limit=2)) == 2
    assert drawn == [0, 1]


def test_counts() -> None:
    assert count_examples((X, Y)) == 10
    assert count_examples({"a": X}) == 10
    assert count_examples(tf.data.Dataset.from_tensors(X)) is None
    assert has_labels((X, Y)) and has_labels(tf.data.Dataset.from_tensors((X, Y)))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (X, {"labels": True}, r"Labels are needed.*pair \(x, y\)"),
        ((X, None), {"labels": True}, "Labels are needed"),
        (tf.data.Dataset.from_tensors(X), {"labels": True}, "Labels are needed.*inputs alone"),
        ((X[:0], Y[:0]), {}, "empty"),
        (tf.data.Dataset.from_tensors((X, Y)).take(0), {}, "empty"),
        ((X, Y[:4]), {}, r"first axis.*\(10, 2\).*\(4,\)"),
        (([X, X[:3]], Y), {}, "first axis"),
        ((X, Y, Y), {}, "sample weights"),
        (tf.data.Dataset.from_tensors((X, Y, Y)), {}, "sample weights"),
        ("cifar10", {}, "Expected a tf.data.Dataset.*Received str"),
        (None, {}, "Received NoneType"),
        ((x for x in X), {}, "Received generator"),
        (np.float32(3), {}, r"shape \(\)"),
        (np.array([{}, {}]), {}, "dtype object"),
        ([[1, 2], [3]], {}, "no array"),
        (X, {"input_shape": (None, 3)}, r"\(None, 3\); received \(10, 2\)"),
        (tf.data.Dataset.from_tensor_slices(X), {"input_shape": (None, 2)}, r"\.batch\(n\)"),
        (X, {"input_shape": [(None, 2), (None, 2)]}, "2 inputs; received 1"),
        ({"a": X}, {"input_shape": {"b": (None, 2)}}, r"named \['b'\]; received \['a'\]"),
        (X, {"input_shape": {"b": (None, 2)}}, "received ndarray"),
    ],
)
def test_bad_data_are_refused(data, options, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(data, **options)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"limit": 0}])
def test_bad_sizes_are_refused(options) -> None:
    with pytest.raises(ArgumentError, match="positive"):
        iterate(X, **options)


def test_fitting_shapes_are_taken() -> None:
    assert len(read(X, input_shape=(None, 2))) == 1
    assert len(read([X, X], input_shape=[(None, 2), (None, None)])) == 1
    assert len(read({"a": X}, input_shape={"a": (None, 2)})) == 1
