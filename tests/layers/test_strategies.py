"""Pruning under distribution strategies, each in a process of its own."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

# 80 % of 128 and 64 weights: tfmot keeps round(25.6) and round(12.8).
FINAL = [102 / 128, 51 / 64]


def _run(kind):
    program = pathlib.Path(__file__).with_name("strategies.py")
    done = subprocess.run(
        [sys.executable, str(program), kind], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _require_pruned(found, replicas, steps=16):
    assert found["sparsities"] == FINAL
    assert found["masked"] and found["equal"]
    assert found["steps"] == [steps, steps]
    assert found["replicas"] == replicas


@pytest.mark.slow
def test_two_replicas() -> None:
    found = _run("mirrored")
    ours, theirs = found["losses"]
    # 16 steps of float32 sums in another order
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert ours[1] < ours[0]
    _require_pruned(found["after fit"], 2)
    # the same sums in batches of another size
    np.testing.assert_allclose(found["outside"], 0, atol=1e-6)
    replaced = found["replaced"]
    assert replaced["chess"] and replaced["sparsities"] == [0.5, FINAL[1]]
    assert replaced["masked"] and replaced["equal"] and replaced["steps"] == [24, 24]
    _require_pruned(found["loop"], 2)
    # the loop is fit, written out
    np.testing.assert_allclose(found["loop"]["losses"], ours, rtol=1e-5)


@pytest.mark.slow
def test_a_loop_over_workers() -> None:
    """A cluster of one: more need as many processes, and Keras's fit does not know them."""
    found = _run("workers")["loop"]
    _require_pruned(found, 1)
    assert found["losses"][1] < found["losses"][0]
