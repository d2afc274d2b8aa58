"""What holds for every training-time method for channels."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

import tfprune
from tests.methods.models import residual, same, snapshot, stir, stripes
from tests.methods.training_time import METHODS
from tfprune import recipes
from tfprune.layers.batch_gate import without_gates
from tfprune.layers.method_model import MethodModel

DATA = stripes(64)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def trained(method, epochs=2, model=None, **options):
    """A prepared model after some epochs."""
    model = method.prepare(stir(residual())) if model is None else model
    if not model.compiled:
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), LOSS, **options)
    done = int(np.asarray(model.optimizer.iterations)) // 4
    model.fit(
        *DATA, batch_size=16, initial_epoch=done, epochs=epochs, shuffle=False, verbose=0,
        callbacks=method.callbacks(),
    )  # fmt: skip
    return model


@functools.cache
def plainly_trained(name):
    """A method, its source, and the model after training without anything special."""
    method, source = METHODS[name](), stir(residual())
    before = snapshot(source)
    whole = trained(method, model=method.prepare(source))
    assert same(before, source)
    return method, source, whole


def test_every_method_is_here() -> None:
    classes = {type(make()) for make in METHODS.values()}
    shared = tfprune.methods.StructuredMethod
    assert classes == {kind for kind in recipes.METHODS.values() if issubclass(kind, shared)}


@pytest.mark.filterwarnings("ignore:Filters of a cluster")  # C-SGD after eight steps
@pytest.mark.parametrize("name", METHODS)
def test_half_way_through_a_file(name, tmp_path) -> None:
    """Saved with its optimizer and loaded, a model goes on as if nothing had been."""
    method, source, whole = plainly_trained(name)
    half = trained(METHODS[name](), epochs=1)
    half.save(tmp_path / "half.keras")
    loaded = keras.models.load_model(tmp_path / "half.keras")
    assert isinstance(loaded, MethodModel)
    trained(METHODS[name](), model=loaded)
    for a, b in zip(whole.variables, loaded.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=a.path)
    # and what is left meets the request
    small = method.finish(whole, DATA)
    macs = [tfprune.cost.measure(model).macs for model in (small, source)]
    assert macs[0] <= 0.5 * macs[1]
    assert type(small) is type(source)


@pytest.mark.parametrize("name", METHODS)
def test_compiled_by_xla(name) -> None:
    _, _, plain = plainly_trained(name)
    compiled = trained(METHODS[name](), jit_compile=True)
    for a, b in zip(plain.trainable_variables, compiled.trainable_variables, strict=True):
        # float32 in another order, over 8 steps of a network with batch normalisation
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-3, err_msg=a.path)


@pytest.mark.parametrize("name", METHODS)
def test_mixed_precision(name) -> None:
    """Float16, in which Keras scales the loss around the method's optimizer."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        source = stir(residual())
    finally:
        keras.config.set_dtype_policy("float32")
    method = METHODS[name]()
    model = trained(method, model=method.prepare(source))
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    assert all(np.isfinite(np.asarray(v)).all() for v in model.variables)
    bare = without_gates(model)  # what plans are for
    moved = [
        not np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(source.trainable_variables, bare.trainable_variables, strict=True)
    ]
    assert np.mean(moved) > 0.9
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert tfprune.verify(bare, method.plan(model), tolerance=2e-2).passed


def _program(*arguments):
    root = pathlib.Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, str(pathlib.Path(__file__).with_name("strategies.py")), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def _result(process):
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error[-3000:]
    return json.loads(out.splitlines()[-1])


# One of each kind: added to gradients, weights of its own, masks, state every few steps, means.
REPLICATED = ("slimming", "ista", "gdp", "ssr", "csgd")


@pytest.mark.slow
def test_two_replicas() -> None:
    """``python tests/methods/strategies.py mirrored NAME...`` runs others alike."""
    found = _result(_program("mirrored", *REPLICATED))
    assert tuple(found) == REPLICATED
    for name, values in found.items():
        assert values["replicas"] == [2] and values["equal"] and values["finite"], name
        assert values["macs"] <= 0.5, name
        assert values["parameters"][1] < values["parameters"][0], name


@pytest.mark.slow
def test_two_workers() -> None:
    """Two processes on the loopback. Keras 3's fit does not know them: a loop of one's own."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(str(probe.getsockname()[1]))
    workers = [_program("worker", str(number), *ports, "slimming", "ista") for number in (0, 1)]
    first, second = (_result(worker) for worker in workers)
    for name in ("slimming", "ista"):
        assert first[name]["workers"] == 2
        assert first[name]["losses"][-1] < first[name]["losses"][0]
        # both hold the same weights: each applied the sum of both gradients
        assert first[name] == second[name]
