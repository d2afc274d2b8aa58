"""The same numbers here, in threads, in other processes and on a Dask cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import keras
import numpy as np
import pytest
import tf_keras

import tfprune
from tests.search.models import DISTANCE, broken, examples, network, trained, validation
from tests.test_workers import Doubled
from tfprune.criteria import AOFP
from tfprune.errors import ArgumentError
from tfprune.search import Metric, Retraining, eagle_eye, netadapt, sensitivity_analysis


@contextlib.contextmanager
def _processes():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        yield executor


@contextlib.contextmanager
def _dask():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()


PLACES = {"threads": lambda: ThreadPoolExecutor(2), "processes": _processes}


@pytest.fixture(
    scope="module", params=["threads", pytest.param("processes", marks=pytest.mark.slow)]
)
def executor(request):
    with PLACES[request.param]() as made:
        yield made


def analyse(model=None, **options):
    options = {"metric": DISTANCE, "ratios": [0.5, 0.9], "progress": False, **options}
    return sensitivity_analysis(model or trained(), validation(), **options)


def test_sensitivity(executor, tmp_path):
    """Values, and the file, byte for byte; retraining in the worker."""
    options = {
        "recalibrate": examples(50, seed=2)[0],
        "retrain": Retraining(learning_rate=0.01, batch_size=10, seed=3),
        "train": examples(20, seed=3),
        "groups": ["conv1"],
        "ratios": [0.5],
    }
    here = analyse(path=tmp_path / "here.json", **options)
    there = analyse(path=tmp_path / "there.json", executor=executor, **options)
    for name, group in here.groups.items():
        np.testing.assert_array_equal(group.values, there.groups[name].values)
        # The threads of one process and of another may add gradients in another order.
        np.testing.assert_allclose(group.retrained, there.groups[name].retrained, rtol=1e-5)
    masked = {"recalibrate": options["recalibrate"], "groups": ["conv[01]"]}
    analyse(path=tmp_path / "a.json", **masked)
    analyse(path=tmp_path / "b.json", executor=executor, **masked)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_netadapt(executor):
    """One step: proposals are trained and measured in the workers, and the weights come back."""
    options = {"budget": 0.85, "first_step": 0.15, "round_to": 1, "metric": DISTANCE,
               "retraining": Retraining(batches=1, batch_size=10, seed=3),
               "progress": False}  # fmt: skip
    train = examples(20, seed=3)
    here = netadapt(trained(), train, validation(), **options)
    there = netadapt(trained(), train, validation(), executor=executor, **options)
    assert len(here.steps) == len(there.steps) == 1
    assert [(p.group, p.width, p.cost) for p in here.steps[0].proposals] == [
        (p.group, p.width, p.cost) for p in there.steps[0].proposals
    ]
    assert here.steps[0].taken == there.steps[0].taken
    for a, b in zip(here.model.weights, there.model.weights, strict=True):
        # The threads of one process and of another may add gradients in another order.
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6)


def test_aofp(executor):
    """The damage of every group is measured in the workers."""
    options = {"draws": 1, "batches": 1, "batch_size": 16}
    graph = tfprune.analyse(trained())
    here = AOFP(validation()[0], **options)(graph)
    there = AOFP(validation()[0], executor=executor, **options)(graph)
    for name in here:
        np.testing.assert_array_equal(here[name], there[name])


def test_eagle_eye(executor):
    options = {"macs": 0.5, "candidates": 5, "tolerance": 0.02, "round_to": 1, "metric": DISTANCE,
               "progress": False}  # fmt: skip
    train = examples(50, seed=2)
    here = eagle_eye(trained(), train, validation(), **options)
    assert eagle_eye(trained(), train, validation(), executor=executor, **options) == here
    assert len({candidate.score for candidate in here.candidates}) > 1


def test_own_layers_and_metrics_of_keras(executor):
    """The module that registers a layer is imported where the model is opened."""
    inputs = keras.Input((6, 6, 2))
    x = keras.layers.Conv2D(4, 3, name="conv", kernel_initializer="ones")(inputs)
    x = keras.layers.GlobalAveragePooling2D(name="average")(Doubled(name="double")(x))
    model = keras.Model(inputs, keras.layers.Dense(3, name="last")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    options = {"metric": Metric(loss, False), "ratios": [0.5]}
    # Doubled is no operation that the graph knows, so that what it reads stays.
    wide = keras.layers.Dense(8, name="wide")(model.output)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(wide))
    assert analyse(model, executor=executor, **options) == analyse(model, **options)


def test_models_of_keras_2(executor):
    model = network(tf_keras, widths=(6,))
    found = analyse(model, executor=executor)
    assert found == analyse(model)


def test_a_failure_there(executor):
    """It comes back as it is, and the executor works on."""
    with pytest.raises(ZeroDivisionError, match="broken"):
        analyse(metric=Metric(broken, True), executor=executor)
    assert analyse(groups=["conv0"], executor=executor) == analyse(groups=["conv0"])


def test_what_cannot_travel(executor):
    inputs = keras.Input((6, 6, 2))
    x = keras.layers.Lambda(lambda x: x + 1, name="code")(inputs)
    x = keras.layers.Dense(4, name="first")(keras.layers.Flatten(name="flat")(x))
    model = keras.Model(inputs, keras.layers.Dense(3, name="last")(x))
    assert analyse(model).groups.keys() == {"first"}
    with pytest.raises(ArgumentError, match=r"Lambda.*Leave executor out"):
        analyse(model, executor=executor)
    with pytest.raises(ArgumentError, match="cannot be pickled"):
        analyse(metric=Metric(lambda y, p: 0.0, True), executor=executor)


@pytest.mark.slow
def test_on_a_dask_cluster(tmp_path):
    """What travels there is what travels to a process; so not all of the above again."""
    with _dask() as made:
        test_sensitivity(made, tmp_path)
        test_eagle_eye(made)
        test_a_failure_there(made)
