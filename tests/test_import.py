"""Importing tfprune is light, and leaves the user's process as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

import tfprune

HEAVY = (
    "tensorflow", "keras", "tf_keras", "tensorflow_model_optimization", "matplotlib",
    "tensorflow_datasets", "ai_edge_litert", "ai_edge_quantizer", "sklearn",
)  # fmt: skip
LIGHT = (
    "tfprune", "tfprune.graph", "tfprune.criteria", "tfprune.allocation", "tfprune.surgery",
    "tfprune.cost", "tfprune.zoo", "tfprune.data", "tfprune.protocols", "tfprune.litert",
    "tfprune.reports", "tfprune.pruning", "tfprune.search", "tfprune.workers",
    "tfprune.cli.main", "tfprune.cli.commands",
)  # fmt: skip


def _in_a_new_process(program: str, **environment: str) -> Any:
    """What a program prints last, as JSON."""
    plain = {k: v for k, v in os.environ.items() if k not in ("TF_USE_LEGACY_KERAS",)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**plain, **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", LIGHT)
def test_light(name) -> None:
    program = (
        f"import importlib, json, sys; importlib.import_module({name!r})\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    assert _in_a_new_process(program) == []


def test_the_first_import_brings_nothing_of_the_package_along() -> None:
    program = (
        "import json, sys, tfprune\n"
        "print(json.dumps(sorted(n for n in sys.modules if n.startswith('tfprune.'))))"
    )
    assert _in_a_new_process(program) == []


_EVERYTHING = """
import json, os, pkgutil, sys, importlib, tempfile, warnings
# What these set by themselves is theirs.
import keras, tensorflow, sklearn, matplotlib
before = dict(os.environ)
import tfprune
names = [module.name for module in pkgutil.walk_packages(tfprune.__path__, "tfprune.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
imported = dict(os.environ)
import keras
inputs = keras.Input((8, 8, 1))
x = keras.layers.Conv2D(16, 3)(inputs)
model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
folder = tempfile.mkdtemp()
filters, handlers = list(warnings.filters), keras.config.backend()
small = tfprune.prune(model, 0.5)
tfprune.export(small, os.path.join(folder, "small.tflite"))
import tensorflow as tf
print(json.dumps({
    "modules": len(names),
    "imported": {k: v for k, v in imported.items() if before.get(k) != v},
    "exported": {k: v for k, v in os.environ.items()
                 if before.get(k) != v and k.startswith(("TF_USE", "KERAS", "TFPRUNE"))},
    "gone": [k for k in before if k not in os.environ],
    "tf.keras": tf.keras.__version__, "keras": keras.__version__,
    "tf.keras is keras": tf.keras.Model is keras.Model,
    "filters": filters == list(warnings.filters),
}))
"""


def test_everything_leaves_the_process_alone() -> None:
    """Every module, a pruning and an export: tf.keras stays Keras 3, no new variables."""
    found = _in_a_new_process(_EVERYTHING)
    assert found["modules"] > 60
    assert found["imported"] == {} and found["exported"] == {} and found["gone"] == []
    assert found["tf.keras"] == found["keras"] and found["keras"].startswith("3.")
    assert found["tf.keras is keras"]
    assert found["filters"]


def test_the_public_surface() -> None:
    names = dir(tfprune)
    assert names == sorted(tfprune.__all__) and len(set(names)) == len(names)
    assert {"analyse", "plan", "prune", "verify", "export", "compare"} <= set(names)
    for name in names:
        assert getattr(tfprune, name) is not None
    assert not [name for name in names if name.startswith("_") and name != "__version__"]


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'prume'"):
        _ = tfprune.prume
    assert not hasattr(tfprune, "prume")


def test_star_import() -> None:
    scope: dict[str, Any] = {}
    exec("from tfprune import *", scope)
    assert scope["prune"] is tfprune.prune and scope["zoo"] is tfprune.zoo
