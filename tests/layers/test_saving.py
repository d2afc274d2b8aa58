"""Saved in the middle of training and loaded again, a model goes on as if nothing had been."""

from __future__ import annotations

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tf_keras

import tfprune
from tests.layers.networks import normal, small
from tests.layers.twins import tfmot
from tests.schedules.examples import ALL, name_of
from tfprune.layers import masks_of
from tfprune.layers.prunable import is_wrapper

layers = keras.layers
SCHEDULE = tfprune.schedules.Cosine(0.0, 0.8, 0, 14, frequency=3)
X, Y = normal(64, 8), normal(64, 4, seed=1)
BATCH = {"batch_size": 8, "verbose": 0, "shuffle": False}


def _compiled(momentum):
    model = tfprune.prune_low_magnitude(small(), SCHEDULE)
    model.compile(keras.optimizers.SGD(0.05, momentum=momentum), "mse")
    return model


def _fit(model, first, *callbacks):
    model.fit(X[first:], Y[first:], callbacks=[tfprune.UpdatePruningStep(), *callbacks], **BATCH)


def _steps(model):
    return [int(np.asarray(w.pruning_step)) for w in model.layers if is_wrapper(w)]


class _SaveAt(keras.callbacks.Callback):
    """After batch 4 of 8, where masked weights hold what the optimizer put there."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_train_batch_end(self, batch, logs=None):
        if batch == 4:
            whole = self.path.suffix == ".keras"
            (self.model.save if whole else self.model.save_weights)(self.path)


# .weights.h5 is loaded into a model whose optimizer is new: only one without memory goes on.
@pytest.mark.parametrize(("file", "momentum"), [("run.keras", 0.9), ("run.weights.h5", 0.0)])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(file, momentum, tmp_path) -> None:
    path = tmp_path / file
    model = _compiled(momentum)
    _fit(model, 0, _SaveAt(path))
    _fit(model, 0)
    if path.suffix == ".keras":
        resumed = keras.models.load_model(path)
    else:
        resumed = _compiled(momentum)
        resumed.load_weights(path)
    assert _steps(resumed) == [5, 5]
    assert masks_of(resumed).sparsity > 0.05
    _fit(resumed, 40)  # the three batches that were left
    _fit(resumed, 0)
    assert _steps(resumed) == _steps(model) == [16, 16]
    assert masks_of(resumed) == masks_of(model)
    for mine, other in zip(resumed.weights, model.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))


_PROGRAM = """
import json, sys
import numpy as np, keras
folder = sys.argv[1]
found = {}
bare = keras.models.load_model(folder + "/bare.keras")
found["tfprune for the stripped"] = any(name.startswith("tfprune") for name in sys.modules)
try:
    keras.models.load_model(folder + "/wrapped.keras")
except Exception as error:
    found["unknown"] = [type(error).__name__, str(error)]
import tfprune
with tfprune.prune_scope():
    model = keras.models.load_model(folder + "/wrapped.keras")
x = np.load(folder + "/x.npy")
found["steps"] = [int(layer.pruning_step.numpy()) for layer in model.layers]
found["schedule"] = repr(model.layers[0].pruning_schedule)
found["sparsity"] = tfprune.layers.masks_of(model).sparsity
found["bare"] = np.asarray(bare(x)).tolist()
found["wrapped"] = np.asarray(model(x)).tolist()
model.fit(x, x[:, :4], verbose=0, callbacks=[tfprune.UpdatePruningStep()])
found["later"] = [int(layer.pruning_step.numpy()) for layer in model.layers]
print(json.dumps(found))
"""


def test_in_a_new_process(tmp_path) -> None:
    model = _compiled(0.9)
    _fit(model, 0)
    model.save(tmp_path / "wrapped.keras")
    tfprune.strip_pruning(model).save(tmp_path / "bare.keras")
    np.save(tmp_path / "x.npy", X)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["tfprune for the stripped"]
    kind, message = found["unknown"]
    assert kind == "TypeError"
    assert "Could not locate class 'PruneLowMagnitude'" in message
    assert "register_keras_serializable" in message
    assert (found["steps"], found["later"]) == ([8, 8], [10, 10])  # 64 in batches of 32
    assert found["schedule"] == repr(SCHEDULE)
    assert found["sparsity"] == masks_of(model).sparsity > 0.3
    expected = np.asarray(model(X))
    for kind in ("bare", "wrapped"):
        # floats go through JSON unchanged
        np.testing.assert_array_equal(np.array(found[kind], "float32"), expected)


def test_every_schedule_survives(tmp_path) -> None:
    """One layer for each, so that one file will do."""
    schedules = [
        *ALL,
        tfmot.ConstantSparsity(0.4, 3, 9, frequency=2),
        tfmot.PolynomialDecay(0.1, 0.6, 2, 8, power=2, frequency=3),
    ]
    model = keras.Sequential(
        [
            keras.Input((2,)),
            *(
                tfprune.prune_low_magnitude(layers.Dense(2, name=f"{name_of(one)}{n}"), one)
                for n, one in enumerate(schedules)
            ),
        ]
    )
    model.save(tmp_path / "all.keras")
    loaded = keras.models.load_model(tmp_path / "all.keras")
    for layer, schedule in zip(loaded.layers, schedules, strict=True):
        assert type(layer.pruning_schedule) is type(schedule)
        assert layer.pruning_schedule.get_config() == schedule.get_config()


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity_m_by_n": (2, 4)},  # tfmot's wrapper forgets it
        {"block_size": (4, 2), "block_pooling_type": "MAX"},
    ],
)
def test_options_survive(options, tmp_path) -> None:
    model = tfprune.prune_low_magnitude(
        small(), tfprune.schedules.Constant(0.5, 1, frequency=1), **options
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for name, value in options.items():
        assert {getattr(layer, name) for layer in loaded.layers} == {value}
    for one in (model, loaded):
        one.compile("sgd", "mse")
        _fit(one, 48)
    assert masks_of(loaded) == masks_of(model)
    mask = masks_of(loaded)["hidden/kernel"]
    if "block_size" in options:
        blocks = mask.reshape(2, 4, 8, 2).swapaxes(1, 2).reshape(16, 8)
        assert set(blocks.mean(axis=1)) == {0.0, 1.0}
    else:
        assert (mask.T.reshape(-1, 4).sum(axis=1) == 2).all()


def test_configurations_and_clones_are_made_anew() -> None:
    model = _compiled(0.9)
    _fit(model, 0)
    for other in (
        type(model).from_config(model.get_config()),
        keras.models.model_from_json(model.to_json()),
        keras.models.clone_model(model),
    ):
        assert [layer.name for layer in other.layers] == [layer.name for layer in model.layers]
        assert [layer.pruning_schedule for layer in other.layers] == [SCHEDULE] * 2
        assert not {id(v) for v in other.variables} & {id(v) for v in model.variables}
        # without weights, as with every layer of Keras: masks of ones, not started
        assert masks_of(other).sparsity == 0 and _steps(other) == [-1, -1]
        other.set_weights(model.get_weights())
        assert masks_of(other) == masks_of(model) and _steps(other) == [8, 8]


def test_loading_stays_safe(tmp_path) -> None:
    inputs = keras.Input((4,))
    doubled = layers.Lambda(lambda x: 2 * x)(layers.Dense(3)(inputs))
    model = tfprune.prune_low_magnitude(keras.Model(inputs, doubled))
    model.save(tmp_path / "model.keras")
    with tfprune.prune_scope(), pytest.raises(ValueError, match="safe_mode=False"):
        keras.models.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("file", ["model.keras", "model.h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")
def test_a_model_of_keras2_with_a_schedule_of_tfprune(file, tmp_path) -> None:
    def build():
        model = tf_keras.Sequential([tf_keras.layers.Dense(4, input_shape=(8,))])
        return model, tfprune.prune_low_magnitude(model, SCHEDULE)

    (_, wrapped), options = build(), {"callbacks": [tfprune.UpdatePruningStep()], **BATCH}
    wrapped.compile(tf_keras.optimizers.SGD(0.05), "mse")
    wrapped.fit(X, Y, **options)
    wrapped.save(tmp_path / file)
    with tfprune.prune_scope():
        loaded = tf_keras.models.load_model(tmp_path / file)
    schedule = loaded.layers[-1].pruning_schedule
    assert schedule.schedule == SCHEDULE
    assert [float(v) for v in schedule(6)] == [float(v) for v in SCHEDULE(6)]
    # and goes on
    for model in (wrapped, loaded):
        model.fit(X, Y, **options)
        assert int(model.layers[-1].pruning_step) == 16
        assert float(np.mean(model.layers[-1].pruning_vars[0][1] == 0)) == 26 / 32
    for mine, other in zip(loaded.weights, wrapped.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))
    # tfmot's own schedules go to it as they are
    plain = tfmot.ConstantSparsity(0.5, 0)
    again = tfprune.prune_low_magnitude(build()[0], plain)
    assert again.layers[-1].pruning_schedule is plain
