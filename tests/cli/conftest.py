"""Model files, good and bad, and running commands in this process and in one of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tfprune.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys) -> Callable[..., Outcome]:
    """Runs a command in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse's way out
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture
def refused(run) -> Callable[..., str]:
    """Runs a command that must be refused: the message, once it is known to be the only thing."""

    def call(*arguments: object, code: int = 1) -> str:
        outcome = run(*arguments)
        assert outcome.code == code
        assert outcome.out == ""
        assert "Traceback" not in outcome.err
        if code == 1:
            assert outcome.err.startswith(f"tfprune {arguments[0]}: ")
            assert outcome.err.count("\n") == 1
        return str(outcome.err)

    return call


def command(*arguments: object, cwd: Path | None = None, module: str = "tfprune") -> Outcome:
    """Runs a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env={**os.environ, "COLUMNS": "100"},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def network(keras: Any, operator: bool = False) -> Any:
    """A little classifier of 8x8 images, for the digits; both inner groups can be halved."""
    layers = keras.layers
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(16, 3, padding="same", name="first")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    if operator:
        x = x * 2.0 + 1.0
    x = layers.ReLU(name="relu")(x)
    x = layers.Conv2D(16, 3, name="second")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(10, name="head")(x), name="net")


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """A folder of good files."""
    import keras

    folder = tmp_path_factory.mktemp("models")
    model = network(keras)
    model.save(folder / "net.keras")
    images = np.random.default_rng(0).uniform(0, 1, (40, 8, 8, 1))
    np.save(folder / "images.npy", images.astype("float32"))
    inputs = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(16, 3, name="wide")(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    keras.Model(inputs, keras.layers.Dense(2)(x), name="open").save(folder / "open.keras")
    return folder


@pytest.fixture(scope="session")
def bad(tmp_path_factory, files) -> Path:
    """A folder of files that are to be refused."""
    import h5py
    import keras

    folder = tmp_path_factory.mktemp("bad")
    whole = (files / "net.keras").read_bytes()
    (folder / "truncated.keras").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.keras").write_bytes(b"")
    (folder / "text.h5").write_bytes(b"hello")
    (folder / "folder.keras").mkdir()
    with zipfile.ZipFile(folder / "other.keras", "w") as archive:
        archive.writestr("readme.txt", "a zip file of another kind")

    inputs = keras.Input((4,))
    doubled = keras.layers.Lambda(lambda t: t * 2)(inputs)
    keras.Model(inputs, keras.layers.Dense(3)(doubled)).save(folder / "lambda.keras")

    config = {"class_name": "Sequential", "config": [{"class_name": "Lambda", "config": {}}]}
    with h5py.File(folder / "lambda.h5", "w") as archive:
        archive.attrs["model_config"] = json.dumps(config)
    with h5py.File(folder / "garbled.h5", "w") as archive:
        archive.attrs["model_config"] = '{"class_name": "Sequ'

    model = network(keras)
    model.save_weights(folder / "only.weights.h5")
    values = model.get_weights()
    values[0][0, 0, 0, 0] = np.nan
    model.set_weights(values)
    model.save(folder / "nan.keras")

    class Mine(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, x):
            return self.dense(x)

    subclassed = Mine()
    subclassed(np.ones((1, 4), "float32"))
    subclassed.save(folder / "subclassed.keras")
    return folder
