"""Trainings that are killed at a random step and started again end as those that were not."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.methods.killed import train

KILLED = ("sfp", "ista", "gdp")
STEPS = 16  # 4 epochs of 4


def _start(folder, name):
    program = pathlib.Path(__file__).with_name("killed.py")
    root = str(pathlib.Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, str(program), str(folder), name],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.mark.slow
def test_killed_and_started_again(tmp_path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    torn.mkdir()
    train(whole, KILLED)
    random = np.random.default_rng(20)
    for name in KILLED:
        moment = f"{name} {random.integers(1, STEPS)}\n"
        process = _start(torn, name)
        assert process.stdout is not None
        assert moment in process.stdout  # reads up to that line
        process.kill()
        process.communicate()
        assert not (torn / f"{name}-weights.npz").exists()
    train(torn, KILLED)
    for name in KILLED:
        with (
            np.load(whole / f"{name}-weights.npz") as a,
            np.load(torn / f"{name}-weights.npz") as b,
        ):
            assert a.files == b.files and len(a.files) > 20
            for part in a.files:
                np.testing.assert_array_equal(a[part], b[part], err_msg=f"{name} {part}")
