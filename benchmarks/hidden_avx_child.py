"""What the process does from which AVX is hidden: it runs two files and compares them.

It needs NumPy and LiteRT and nothing of tfprune. ``hidden_avx_child.py FOLDER ROUNDS`` reads
``dense.tflite`` and ``sparse.tflite`` there and leaves ``result.json``.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

_WARMUP = 3


class Runner:
    """A file on one thread of the CPU, which is then the one that calls."""

    def __init__(self, path: Path) -> None:
        self.interpreter = Interpreter(model_path=str(path), num_threads=1)
        self.interpreter.allocate_tensors()
        generator = np.random.default_rng(0)
        for detail in self.interpreter.get_input_details():
            values = generator.standard_normal(detail["shape"]).astype(detail["dtype"])
            self.interpreter.set_tensor(detail["index"], values)
        self.interpreter.invoke()

    def outputs(self) -> dict[str, Any]:
        """What the last run computed, by the names in the signature."""
        details = self.interpreter.get_signature_runner().get_output_details()
        return {n: self.interpreter.get_tensor(d["index"]) for n, d in details.items()}

    def seconds(self) -> float:
        """The CPU time of one run."""
        before = time.thread_time()
        self.interpreter.invoke()
        return time.thread_time() - before


def difference(want: dict[str, Any], got: dict[str, Any]) -> float | None:
    """The largest, in units of the largest value of its output; None where shapes differ."""
    if any(want[name].shape != got[name].shape for name in want):
        return None
    return max(float(np.abs(got[n] - want[n]).max() / np.abs(want[n]).max()) for n in want)


def main(folder: Path, rounds: int) -> None:
    result: dict[str, Any] = {"error": "", "difference": None, "speedup": None}
    dense = Runner(folder / "dense.tflite")
    try:
        sparse = Runner(folder / "sparse.tflite")
    except (RuntimeError, ValueError) as error:
        result["error"] = " ".join(str(error).split())
    else:
        result["difference"] = difference(dense.outputs(), sparse.outputs())
        times = [(dense.seconds(), sparse.seconds()) for _ in range(_WARMUP + rounds)][_WARMUP:]
        result["speedup"] = statistics.median(a / b for a, b in times)
    result["answered"] = ctypes.CDLL(None).hide_avx_answered()
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
