"""Training under a distribution strategy; run as a program, because devices are set up once.

Usage: python strategies.py mirrored|workers. Prints JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
KIND = sys.argv[1]
if KIND == "workers":  # a cluster of one
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": [f"127.0.0.1:{port}"]}, "task": {"type": "worker", "index": 0}}
    )

import tensorflow as tf  # noqa: E402

if KIND == "workers":  # before any operation
    STRATEGY = tf.distribute.MultiWorkerMirroredStrategy()
else:
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    STRATEGY = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tf_keras  # noqa: E402

import tfprune  # noqa: E402
from tfprune.layers import Masks, masks_of, prunable_weights, set_masks  # noqa: E402
from tfprune.schedules.tfmot import load  # noqa: E402

tfmot = load().sparsity.keras
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((64, 8)).astype("float32")
Y = RANDOM.standard_normal((64, 4)).astype("float32")
WEIGHTS = [RANDOM.standard_normal(s).astype("float32") / 3 for s in ((8, 16), (16,), (16, 4), (4,))]
SCHEDULE = tfmot.PolynomialDecay(0.0, 0.8, 0, 9, frequency=3)
BATCH = {"batch_size": 8, "shuffle": False, "verbose": 0}


def make(framework, api):
    """A wrapped and compiled model under the strategy."""
    layers = framework.layers
    first = framework.Input((8,)) if framework is keras else layers.InputLayer((8,))
    with STRATEGY.scope():
        model = framework.Sequential(
            [first, layers.Dense(16, activation="relu", name="a"), layers.Dense(4, name="b")]
        )
        model.set_weights(WEIGHTS)
        wrapped = api.prune_low_magnitude(model, SCHEDULE)
        wrapped.compile(framework.optimizers.SGD(0.1, momentum=0.9), "mse")
    return wrapped


def replicas(model):
    """Masks and weights on each device."""
    values = [
        [np.asarray(one) for one in getattr(variable._value, "values", [variable._value])]
        for layer in model.layers
        for three in layer.pruning_vars
        for variable in three
    ]
    return {
        "replicas": len(values[0]),
        "equal": all(np.array_equal(first, other) for first, *rest in values for other in rest),
    }


def state(model):
    weights = prunable_weights(model)
    masks = masks_of(model)
    return {
        "sparsities": list(masks.sparsities.values()),
        "masked": all(not np.asarray(weights[path])[~masks[path]].any() for path in masks),
        "steps": [int(np.asarray(layer.pruning_step)) for layer in model.layers],
        **replicas(model),
    }


def mirrored():
    """fit, then everything outside the scope."""
    ours, theirs = make(keras, tfprune), make(tf_keras, tfmot)
    history = [
        model.fit(X, Y, epochs=2, callbacks=[api.UpdatePruningStep()], **BATCH).history["loss"]
        for model, api in ((ours, tfprune), (theirs, tfmot))
    ]
    found = {"losses": history, "after fit": state(ours)}
    bare = tfprune.strip_pruning(ours)
    bare.compile(loss="mse")
    found["outside"] = [
        float(np.abs(ours.predict(X, verbose=0) - np.asarray(bare(X))).max()),
        ours.evaluate(X, Y, verbose=0) - bare.evaluate(X, Y, verbose=0),
    ]
    chess = Masks({**masks_of(ours), "a/kernel": np.indices((8, 16)).sum(axis=0) % 2})

    class Replace(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                set_masks(self.model, chess)

    ours.fit(X, Y, callbacks=[tfprune.UpdatePruningStep(), Replace()], **BATCH)
    found["replaced"] = {**state(ours), "chess": masks_of(ours) == chess}
    return found


def loop():
    """The training loop of one's own that the docstring of UpdatePruningStep speaks of."""
    model = make(keras, tfprune)
    callback = tfprune.UpdatePruningStep()
    callback.set_model(model)
    callback.on_train_begin()
    with STRATEGY.scope():
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        optimizer.build(model.trainable_variables)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            loss /= STRATEGY.num_replicas_in_sync
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function
    def run(x, y):
        return STRATEGY.reduce("SUM", STRATEGY.run(step, (x, y)), None)

    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    losses = []
    for epoch in range(2):
        batches = STRATEGY.experimental_distribute_dataset(data)
        losses.append(float(np.mean([float(run(x, y)) for x, y in batches])))
        callback.on_epoch_end(epoch)
    return {"losses": losses, **state(model)}


print(json.dumps(({} if KIND == "workers" else mirrored()) | {"loop": loop()}))
