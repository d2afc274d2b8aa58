"""Training in every way that Keras offers: masks follow the schedule, and hold."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfprune
from tests.layers.networks import normal, small
from tests.layers.twins import tfmot
from tfprune.errors import ModelError
from tfprune.layers import masks_of, prunable_weights

layers = keras.layers
# 3 does not divide 11: the last update, to the final sparsity, is one of its own.
SCHEDULE = tfprune.schedules.Linear(0.1, 0.8, 0, 11, frequency=3)
X, Y = normal(96, 8), normal(96, 4, seed=1)
BATCH = {"batch_size": 8, "verbose": 0, "shuffle": False}


def _kept_after(step, size):
    """What tfmot's rule keeps of ``size`` weights after a step: those of the last update."""
    updates, sparsities = SCHEDULE.curve(np.arange(step + 1))
    due = np.flatnonzero(updates[1:]) + 1  # an update at step 0 never happens
    return size if not due.size else round(size * (1 - float(sparsities[due[-1]])))


def _require_schedule(model, step):
    for path, mask in masks_of(model).items():
        # to one weight, which float32 may round the other way
        assert abs(np.count_nonzero(mask) - _kept_after(step, mask.size)) <= 1, (path, step)


def _steps(model):
    return {int(np.asarray(w.pruning_step)) for w in model.layers if hasattr(w, "pruning_step")}


class _Watch(keras.callbacks.Callback):
    """Compares the masks with the schedule after every batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        (step,) = _steps(self.model)
        _require_schedule(self.model, step)
        self.seen.append(step)


def _started(model):
    callback = tfprune.UpdatePruningStep()
    callback.set_model(model)
    callback.on_train_begin()
    return callback


def _require_masked(model):
    for (path, mask), weight in zip(
        masks_of(model).items(), prunable_weights(model).values(), strict=True
    ):
        assert not np.asarray(weight)[~mask].any(), path
        assert np.asarray(weight)[mask].all(), path


SGD = {"optimizer": lambda: keras.optimizers.SGD(0.05, momentum=0.9)}
WAYS = {
    "sgd": SGD,
    "adam-jit": {"optimizer": keras.optimizers.Adam, "jit_compile": True},
    "eager": {**SGD, "run_eagerly": True},
    "steps": {**SGD, "steps_per_execution": 5},
    "accumulation": {"optimizer": lambda: keras.optimizers.Adam(gradient_accumulation_steps=3)},
    "mixed_bfloat16": SGD,
    "mixed_float16": {"optimizer": keras.optimizers.Adam},
}


@pytest.mark.parametrize("way", WAYS)
def test_masks_follow_the_schedule_in_fit(way) -> None:
    options = dict(WAYS[way])
    policy = way if way.startswith("mixed") else "float32"
    keras.config.set_dtype_policy(policy)
    try:
        model = tfprune.prune_low_magnitude(small(), SCHEDULE)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.layers[0].compute_dtype == policy.removeprefix("mixed_")
    model.compile(options.pop("optimizer")(), "mse", **options)
    watch = _Watch()
    model.fit(X, Y, callbacks=[tfprune.UpdatePruningStep(), watch], **BATCH)
    # with accumulation too, every forward pass is a step
    assert watch.seen == ([5, 10, 12] if way == "steps" else list(range(1, 13)))
    assert [round(1 - m.mean(), 1) for m in masks_of(model).values()] == [0.8, 0.8]
    _require_masked(model)
    assert not np.isnan(model.layers[0].layer.kernel.numpy()).any()
    # another fit goes on where this one ended
    model.fit(X[:16], Y[:16], callbacks=[tfprune.UpdatePruningStep()], **BATCH)
    assert _steps(model) == {14}


def test_tfmots_schedule_stops_short_of_the_final_sparsity_and_tfprunes_does_not() -> None:
    sparsities = []
    for schedule in (
        tfmot.PolynomialDecay(0.0, 0.75, 0, 11, power=1, frequency=3),
        tfprune.schedules.Polynomial(0.0, 0.75, 0, 11, power=1, frequency=3),
    ):
        model = tfprune.prune_low_magnitude(small(), schedule)
        model.compile("sgd", "mse")
        model.fit(X, Y, callbacks=[tfprune.UpdatePruningStep()], **BATCH)
        sparsities.append(masks_of(model).sparsity)
    assert sparsities[1] == 0.75
    assert sparsities[0] < 0.65  # 9/11 of 0.75


@pytest.mark.parametrize("graph", [True, False])
def test_a_training_loop_of_your_own(graph) -> None:
    model = tfprune.prune_low_magnitude(small(), SCHEDULE)
    optimizer, loss = keras.optimizers.SGD(0.05, momentum=0.9), keras.losses.MeanSquaredError()
    callback = _started(model)
    traced = []

    def step(x, y):
        traced.append(x.shape)
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(value, weights), weights, strict=True))

    run = tf.function(step) if graph else step
    for number in range(12):
        batch = slice(8 * number, 8 * number + 8)
        run(tf.constant(X[batch]), tf.constant(Y[batch]))
        assert _steps(model) == {number + 1}
        _require_schedule(model, number + 1)
    # twice: the optimizer makes its variables in the first
    assert len(traced) <= 2 if graph else len(traced) == 12
    assert any(np.asarray(w)[~m].any() for w, m in zip(
        prunable_weights(model).values(), masks_of(model).values(), strict=True))  # fmt: skip
    callback.on_epoch_end(batch=-1)
    _require_masked(model)


def test_a_model_is_masked_in_the_middle_of_an_epoch() -> None:
    model = tfprune.prune_low_magnitude(small(), SCHEDULE)
    model.compile(**_sgd())
    _started(model)
    for _ in range(7):
        model.train_on_batch(X[:8], Y[:8])
    _require_schedule(model, 7)
    weights = prunable_weights(model)
    mask = masks_of(model)["hidden/kernel"]
    filled = np.asarray(weights["hidden/kernel"]).copy()
    assert filled[~mask].any()  # momentum has filled it
    bare = tfprune.strip_pruning(model)
    np.testing.assert_array_equal(np.asarray(weights["hidden/kernel"]), filled)
    bare.compile(**_sgd())
    assert model.evaluate(X, Y, verbose=0) == bare.evaluate(X, Y, verbose=0)
    _require_masked(model)
    weights["hidden/kernel"].assign(filled)
    np.testing.assert_array_equal(model.predict(X, verbose=0), bare.predict(X, verbose=0))
    weights["hidden/kernel"].assign(filled)
    np.testing.assert_array_equal(model.predict_on_batch(X), bare.predict_on_batch(X))
    assert model.test_on_batch(X, Y) == bare.test_on_batch(X, Y)
    # nothing but training moves the counter
    assert _steps(model) == {7}
    model(X), model(X, training=False), model(X, training=None)
    assert _steps(model) == {7}


def _sgd():
    return {"optimizer": keras.optimizers.SGD(0.05, momentum=0.9), "loss": "mse"}


def test_a_layer_that_is_called_twice_counts_two_steps() -> None:
    layer, inputs = layers.Dense(8, name="twice"), keras.Input((8,))
    model = tfprune.prune_low_magnitude(keras.Model(inputs, layer(layer(inputs))), SCHEDULE)
    _started(model)
    model(X[:2], training=True)
    assert _steps(model) == {2}


def test_a_symbolic_call_counts_no_step() -> None:
    wrapped = tfprune.prune_low_magnitude(layers.Dense(3), SCHEDULE)
    inputs = keras.Input((8,))
    model = keras.Model(inputs, wrapped(inputs, training=True))
    _started(model)
    model.compute_output_spec(keras.KerasTensor((2, 8)), training=True)
    assert _steps(model) == {0}
    model(X[:2])  # training=True was built in, so this is a training call
    assert _steps(model) == {1}


class Own(keras.Model):
    """A subclassed model; Keras hands ``training`` only to a call that takes it."""

    def __init__(self):
        super().__init__()
        self.first = tfprune.prune_low_magnitude(layers.Dense(6), SCHEDULE)
        self.second = layers.Dense(4)

    def call(self, x):
        return self.second(self.first(x))


class OwnWithTraining(Own):
    def call(self, x, training=None):
        return self.second(self.first(x, training=training))


def test_wrapped_layers_in_a_subclassed_model() -> None:
    model = OwnWithTraining()
    model.compile("sgd", "mse")
    model.fit(X, Y, callbacks=[tfprune.UpdatePruningStep()], **BATCH)
    assert _steps(model) == {12}
    assert model.first.masks[0].sum() == round(48 * 0.2)
    model = Own()
    model.compile("sgd", "mse")
    with pytest.raises(ModelError, match=r"none in <Own.*argument training"):
        model.fit(X, Y, callbacks=[tfprune.UpdatePruningStep()], **BATCH)


def test_old_models_are_freed() -> None:
    import gc
    import weakref

    model = tfprune.prune_low_magnitude(small(), SCHEDULE)
    _started(model)
    model(X[:2], training=True)
    left = weakref.ref(model.layers[0])
    del model
    gc.collect()
    assert left() is None
