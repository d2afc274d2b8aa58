"""Tasks wherever an executor works; the models and data that travel there."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from tests import toys
from tests.protocols.models import classifier
from tfprune import workers
from tfprune.errors import ArgumentError, DataError
from tfprune.workers import PortableModel, digest_of, gather, run_tasks

opened: list[int] = []


@dataclass(frozen=True)
class Number:
    """What all tasks share."""

    value: int

    def open(self):
        opened.append(self.value)
        return self.value


def product(value, task):
    if task == "wrong":
        raise ZeroDivisionError("task")
    return value * task


class Lazy(Executor):
    """Does the first calls at once and leaves the others waiting."""

    def __init__(self, ready):
        self.ready = ready
        self.futures = []
        self.most = 0

    def submit(self, function, /, *args):
        future = Future()
        self.futures.append(future)
        waiting = sum(not f.done() for f in self.futures)
        self.most = max(self.most, waiting)
        if len(self.futures) <= self.ready:
            try:
                future.set_result(function(*args))
            except ZeroDivisionError as error:
                future.set_exception(error)
        return future


@pytest.mark.parametrize("per_call", [None, 1, 3, 100])
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_the_same_results_however_they_are_made(threads, per_call):
    expected = [(i, 7 * i) for i in range(10)]
    if not threads:
        assert list(run_tasks(None, product, Number(7), range(10))) == expected
        return
    with ThreadPoolExecutor(threads) as executor:
        results = run_tasks(executor, product, Number(7), range(10), per_call=per_call, in_flight=2)
        assert sorted(results) == expected


def test_no_tasks():
    opened.clear()
    assert list(run_tasks(None, product, Number(7), [])) == []
    assert list(run_tasks(Lazy(9), product, Number(7), [])) == []
    assert opened == []


def test_tasks_are_spread_over_64_calls():
    executor = Lazy(1000)
    assert len(list(run_tasks(executor, product, Number(7), range(130)))) == 130
    assert len(executor.futures) == 44  # ceil(130 / 64) = 3 a call
    executor = Lazy(1000)
    list(run_tasks(executor, product, Number(7), range(20)))
    assert len(executor.futures) == 20


def test_opened_once_per_worker():
    opened.clear()
    with ThreadPoolExecutor(1) as executor:
        for value in (1, 2, 1, 2, 3, 1):
            list(run_tasks(executor, product, Number(value), range(4), per_call=1))
    # Two are kept: the third puts out 1, which was used longest ago.
    assert opened == [1, 2, 3, 1]


def test_a_failure_cancels_what_waits():
    executor = Lazy(3)
    results = run_tasks(executor, product, Number(7), [1, "wrong", 2, 3, 4], per_call=1)
    # What is complete beside the failure comes out before it.
    assert [next(results), next(results)] == [(0, 7), (2, 14)]
    with pytest.raises(ZeroDivisionError, match="task"):
        next(results)
    assert [future.cancelled() for future in executor.futures] == [False] * 3 + [True] * 2


def test_an_interruption_cancels_what_waits():
    executor = Lazy(1)
    results = run_tasks(executor, product, Number(7), range(9), per_call=1, in_flight=4)
    assert next(results) == (0, 0)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    assert len(executor.futures) == 4  # never more at a time
    assert all(future.cancelled() for future in executor.futures[1:])


def test_closing_cancels_what_waits():
    executor = Lazy(1)
    results = run_tasks(executor, product, Number(7), range(3))
    next(results)
    results.close()
    assert [future.cancelled() for future in executor.futures] == [False, True, True]


@pytest.mark.parametrize("executor", ["dask", 2, ThreadPoolExecutor, object()],
                         ids=["text", "number", "class", "object"])  # fmt: skip
def test_no_executor(executor):
    with pytest.raises(ArgumentError, match=r"Expected an executor.*get_executor"):
        run_tasks(executor, product, Number(7), [1])


def test_a_pool_that_forks():
    """Refused at once: TensorFlow would hang in it."""
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as executor,
        pytest.raises(ArgumentError, match=r"get_context\('spawn'\)"),
    ):
        run_tasks(executor, product, Number(7), [1])


def test_what_cannot_be_pickled():
    shared = Number(lambda: 1)  # type: ignore[arg-type]
    executor = Lazy(1)
    with pytest.raises(ArgumentError, match=r"cannot be pickled.*top level"):
        run_tasks(executor, product, shared, [1])
    assert executor.futures == []


@keras.saving.register_keras_serializable(package="workers tests")
class Doubled(keras.layers.Layer):
    """A layer of somebody's own."""

    def call(self, x):
        return 2 * x


def _networks():
    yield toys.chain()
    yield toys.residual()
    inputs = keras.Input((3,))
    yield keras.Model(inputs, Doubled()(keras.layers.Dense(4)(inputs)))
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="inside")])
    yield keras.Sequential([keras.Input((3,)), inner, keras.layers.Dropout(0.5)])
    yield classifier(tf_keras)


@pytest.mark.parametrize("number", range(5))
def test_models_travel_as_files(number):
    model = list(_networks())[number]
    if number != 4:
        # A compiled model with a loss that has no name elsewhere
        model.compile("adam", loss=lambda y, p: keras.ops.mean(p))
    portable = PortableModel(model)
    assert portable.model is model
    again = pickle.loads(pickle.dumps(portable)).model
    assert again is not model and type(again).__module__ == type(model).__module__
    assert [layer.name for layer in again.layers] == [layer.name for layer in model.layers]
    assert not getattr(again, "optimizer", None)
    shape = (4, *model.input_shape[1:])
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))


def test_modules_that_register_layers_travel_along():
    model = list(_networks())[2]
    _, (modules, _) = PortableModel(model).__reduce__()
    assert modules == [__name__]


def test_a_model_with_code_stays_here():
    inputs = keras.Input((3,))
    outputs = keras.layers.Lambda(lambda x: x + 1)(inputs)
    model = keras.Model(inputs, outputs, name="coded")
    with pytest.raises(ArgumentError, match=r"'coded'.*Lambda.*Leave executor out"):
        pickle.dumps(PortableModel(model))


class Unregistered(keras.layers.Layer):
    """A layer that no file can name."""

    def call(self, x):
        return x


def test_a_layer_that_is_not_registered():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, Unregistered()(inputs))
    with pytest.raises(ArgumentError, match=r"Unregistered.*Leave executor out"):
        pickle.dumps(PortableModel(model))


class Forgetful(keras.layers.Layer):
    """A layer that does not save its weight."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, x):
        return x * self.scale

    def save_own_variables(self, store):
        store["0"] = np.float32(1)


def test_weights_that_get_lost():
    keras.saving.register_keras_serializable(package="workers tests")(Forgetful)
    inputs = keras.Input((3,))
    model = keras.Model(inputs, Forgetful()(inputs))
    model.layers[-1].scale.assign(3.0)
    with pytest.raises(ArgumentError, match="other weights when it is saved and loaded"):
        pickle.dumps(PortableModel(model))


def test_gathering_arrays():
    x, y = np.arange(20.0).reshape(10, 2), np.arange(10)
    found = gather((x, y), batch_size=4)
    assert found.batch_size == 4
    np.testing.assert_array_equal(found.x, x)
    np.testing.assert_array_equal(found.y, y)
    assert [len(part) for part, _ in found.batches()] == [4, 4, 2]
    assert len(gather((x, y), batch_size=4, batches=2).x) == 8
    assert gather(x).y is None and gather(x).data is not None


def test_gathering_a_dataset_keeps_its_batches():
    x, y = np.arange(20.0).reshape(10, 2), np.arange(10)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(3)
    found = gather(dataset)
    for (a, b), (c, d) in zip(found.batches(), dataset.as_numpy_iterator(), strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)
    endless = dataset.repeat()
    assert len(gather(endless, batches=6).x) == 16  # 3 3 3 1 3 3
    with pytest.raises(DataError, match="no end"):
        gather(endless)


def test_gathering_several_inputs():
    data = ({"a": np.zeros((5, 2)), "b": np.ones((5, 3))}, np.arange(5))
    found = gather(data, batch_size=2)
    assert found.x["a"].shape == (5, 2) and found.x["b"].shape == (5, 3)
    found = gather(([np.zeros((5, 2)), np.ones((5, 3))], np.arange(5)), batch_size=2)
    assert [part.shape for part in found.x] == [(5, 2), (5, 3)]


@pytest.mark.parametrize(
    "data", [(np.zeros((0, 2)), np.zeros(0)), np.zeros((3, 2))], ids=["empty", "unlabelled"]
)
def test_gathering_nothing(data):
    with pytest.raises(DataError):
        gather(data, labels=True)


def test_digests():
    x = np.arange(6, dtype=np.float32)
    different = [
        x, x.reshape(2, 3), x.astype(np.float64), x + 1, [x], [x, x], {"a": x}, {"b": x}, None,
        x.view(np.int32), [1, 2], [12], "12", {}, [],
    ]  # fmt: skip
    assert len({digest_of(value) for value in different}) == len(different)
    assert digest_of(x) == digest_of(x.copy()) == digest_of(np.concatenate([x, x])[:6])
    assert gather(x, batch_size=2).digest != gather(x, batch_size=3).digest
    assert workers.gather(x).digest == gather(x.copy()).digest
