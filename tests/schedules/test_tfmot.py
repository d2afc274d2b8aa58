"""tfmot is imported, and nothing of the user's changes; its own function takes our schedules."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tfprune import schedules
from tfprune.schedules import tfmot

_PROGRAM = """
import os, sys, warnings
import keras, tensorflow as tf, tfprune
before, filters = dict(os.environ), list(warnings.filters)
import tfprune.schedules
from tfprune.schedules.tfmot import load
import json
print(json.dumps({
    "environment": {k: v for k, v in os.environ.items() if before.get(k) != v},
    "gone": [k for k in before if k not in os.environ],
    "filters": filters == list(warnings.filters),
    "tf.keras": tf.keras.__version__,
    "same": tf.keras.Model is keras.Model,
    "twice": load() is load() is sys.modules["tensorflow_model_optimization"],
}))
"""


def test_the_process_is_left_alone():
    """tf.keras stays Keras 3 although nobody has used it before; no variable, no warning."""
    environment = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", _PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("tf.keras").startswith("3.")
    assert found == {
        "environment": {}, "gone": [], "filters": True, "same": True, "twice": True,
    }  # fmt: skip


@pytest.mark.parametrize("own", [None, "0", "1", ""])
@pytest.mark.parametrize("fails", [False, True])
def test_the_variable_is_as_before(monkeypatch, own, fails):
    """The user's own value too, and where the import fails; tfmot is replaced by what it does."""

    def imported(name):
        os.environ["TF_USE_LEGACY_KERAS"] = "1"
        if fails:
            raise ModuleNotFoundError("No module named 'distutils'", name="distutils")
        return name

    monkeypatch.delitem(sys.modules, "tensorflow_model_optimization")
    monkeypatch.setattr(tfmot.importlib, "import_module", imported)
    if own is None:
        monkeypatch.delenv("TF_USE_LEGACY_KERAS", raising=False)
    else:
        monkeypatch.setenv("TF_USE_LEGACY_KERAS", own)
    if fails:
        with pytest.raises(ImportError, match=r"'distutils'.*pip install") as caught:
            tfmot.load()
        assert caught.value.name == "distutils"
    else:
        assert tfmot.load() == "tensorflow_model_optimization"
    assert os.environ.get("TF_USE_LEGACY_KERAS") == own


def test_the_names_of_tfmot():
    keras = tfmot.load().sparsity.keras
    assert schedules.PruningSchedule is keras.PruningSchedule
    assert schedules.ConstantSparsity is keras.ConstantSparsity
    assert schedules.PolynomialDecay is keras.PolynomialDecay
    assert all(getattr(schedules, name) is not None for name in schedules.__all__)


def test_the_wrapper_of_tfmot_takes_them():
    """Zeros in the mask after each batch; step 1 is the first batch, step 7 the forced last one."""
    import tf_keras

    schedule = schedules.Linear(0.1, 0.8, 0, 7, frequency=3)
    layer = tf_keras.layers.Dense(10, use_bias=False)
    wrapped = tfmot.load().sparsity.keras.prune_low_magnitude(layer, schedule)
    batch = np.ones((2, 10), np.float32)
    wrapped.build(batch.shape)
    # What tfmot's callback does at the beginning of a training.
    wrapped.pruning_step.assign(0)
    zeros = []
    for _ in range(9):
        wrapped(batch, training=True)
        zeros.append(int((wrapped.pruning_vars[0][1].numpy() == 0).sum()))
    # round(100 s) with s = .1 + .7 p: p = 3/7 is .4, p = 6/7 is .7.
    assert zeros == [0, 0, 40, 40, 40, 70, 80, 80, 80]
