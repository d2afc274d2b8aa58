"""Training-time methods under a distribution strategy; run as a program, as devices are set once.

Usage: python strategies.py mirrored METHOD... | python strategies.py worker NUMBER PORT PORT METHOD
Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
KIND, *REST = sys.argv[1:]
if KIND == "worker":
    number, *ports = REST[:3]
    os.environ["TF_CONFIG"] = json.dumps(
        {
            "cluster": {"worker": [f"127.0.0.1:{port}" for port in ports]},
            "task": {"type": "worker", "index": int(number)},
        }
    )

import tensorflow as tf  # noqa: E402

if KIND == "worker":  # before any operation
    STRATEGY = tf.distribute.MultiWorkerMirroredStrategy()
    NAMES = REST[3:]
else:
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    STRATEGY = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    NAMES = REST

import keras  # noqa: E402
import numpy as np  # noqa: E402

from tests.methods.models import residual, stir, stripes  # noqa: E402
from tests.methods.training_time import METHODS  # noqa: E402

X, Y = stripes(64)


def rate():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def replicas_equal(variable):
    values = [np.asarray(one) for one in getattr(variable.value, "values", [variable.value])]
    return len(values), all(np.array_equal(values[0], other) for other in values[1:])


def fitted(name):
    """fit under the strategy, and what came of it."""
    method = METHODS[name]()
    with STRATEGY.scope():
        model = method.prepare(stir(residual()))
        model.compile(rate(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(
        X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0, callbacks=method.callbacks()
    ).history
    # statistics of batch normalisation are each replica's own until they are read
    states = [w for w in model.update.weights if not w.name.startswith("moving_")]
    kept = [*model.trainable_variables, *states]
    found = [replicas_equal(variable) for variable in kept]
    small = method.finish(model, (X, Y))
    return {
        "replicas": sorted({count for count, _ in found}),
        "equal": all(equal for _, equal in found),
        "finite": bool(np.isfinite(history["loss"]).all()),
        "macs": history["macs"][-1],
        "parameters": [model.count_params(), small.count_params()],
    }


def loop(name):
    """The loop that Keras 3 needs under several workers, where its own fit fails."""
    method = METHODS[name]()
    with STRATEGY.scope():
        model = method.prepare(stir(residual()))
        model.compile(rate())
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True)) / 16
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function
    def run(x, y):
        return STRATEGY.reduce("SUM", STRATEGY.run(step, (x, y)), None)

    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16).with_options(options)
    losses = [float(run(x, y)) for x, y in STRATEGY.experimental_distribute_dataset(data)]
    kept = [*model.trainable_variables, *model.update.weights]
    return {
        "workers": STRATEGY.num_replicas_in_sync,
        "losses": losses,
        "sums": [float(np.abs(np.asarray(v)).sum()) for v in kept],
    }


print(json.dumps({name: (loop if KIND == "worker" else fitted)(name) for name in NAMES}))
