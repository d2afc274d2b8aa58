"""Everything that needs no gradients works on any backend of Keras 3."""

import importlib.util
import os
import subprocess
import sys

import pytest

SCRIPT = """
import keras
import numpy as np
import tfprune
from tfprune import zoo
from tfprune.testing import check_surgery, randomize

model = randomize(zoo.digits_resnet(14))
for criterion in ("l1", "l2", "bn_scale", "fpgm", "random"):
    plan = tfprune.plan(model, macs=0.5, criterion=criterion)
check_surgery(model, tolerance=1e-4)

x = inputs = keras.Input((6, 8))
x = keras.layers.LayerNormalization()(keras.layers.Dense(8)(x))
x = keras.layers.GroupNormalization(2)(x)
x = keras.layers.MultiHeadAttention(4, 8)(x, x)
x = x * keras.ops.mean(x, axis=-1, keepdims=True)
x = keras.layers.GRU(5)(x)
check_surgery(randomize(keras.Model(inputs, keras.layers.Dense(2)(x))), tolerance=1e-5)

data = np.zeros((4, 8, 8, 1), "float32"), np.zeros(4, int)
try:
    tfprune.plan(model, 0.5, criterion="taylor", data=data)
except tfprune.TfpruneError as error:
    print(keras.backend.backend(), "refuses:", error)
"""


# Keras's NumPy backend borrows from JAX.
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax")
@pytest.mark.parametrize("backend", ["jax", "numpy"])
def test_backend(backend):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{backend} refuses: Expected a model on TensorFlow" in done.stdout
