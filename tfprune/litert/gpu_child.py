"""The process in which a model is run on LiteRT's GPU accelerator.

Some graphs end the process inside the runtime, and which operations it refuses it tells on file
descriptor 2 only. So this runs by itself, ``python -m tfprune.litert.gpu_child FOLDER RUNS WARMUP
SECONDS``: it reads ``model.tflite`` and ``inputs.npz`` there, sends everything that is printed to
``log.txt``, and leaves ``outputs.npz`` and ``result.json``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: Path, runs: int, warmup: int, seconds: float) -> None:
    """Runs the model and writes what happened.

    Args:
        folder: Where the files are.
        runs: How often the model is timed.
        warmup: How often it runs untimed before.
        seconds: After how long no further run is begun.
    """
    log = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    result: dict[str, object] = {"error": ""}
    try:
        result["nanoseconds"] = _run(folder, runs, warmup, seconds)
    except (RuntimeError, ValueError) as error:
        result["error"] = str(error)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    # the runtime's clean-up after a failure is nobody's concern and may itself fail
    os._exit(0)


def _run(folder: Path, runs: int, warmup: int, seconds: float) -> list[int]:
    from ai_edge_litert.compiled_model import (
        CompiledModel,
        GpuOptions,
        HardwareAccelerator,
        Options,
    )

    # GPU alone: together with the CPU everything counts as accelerated. In float32, so that the
    # outputs can be compared with the CPU's.
    options = Options(
        hardware_accelerators=HardwareAccelerator.GPU,
        gpu_options=GpuOptions(enforce_f32=True),
    )
    model = CompiledModel.from_file(str(folder / "model.tflite"), options=options)
    inputs = model.create_input_buffers(0)
    outputs = model.create_output_buffers(0)
    key = next(iter(model.get_signature_list()))
    signature = model.get_signature_list()[key]
    details = model.get_output_tensor_details(key)
    with np.load(folder / "inputs.npz") as given:
        arrays = [np.ascontiguousarray(given[name]) for name in signature["inputs"]]

    def run() -> list[Any]:
        for buffer, array in zip(inputs, arrays, strict=True):
            buffer.write(array)
        model.run_by_index(0, inputs, outputs)
        read = []
        for buffer, name in zip(outputs, signature["outputs"], strict=True):
            detail = details[name]
            count = int(np.prod(detail["shape"]))
            read.append(buffer.read(count, np.dtype(detail["dtype"]).type))
        return read

    found = run()
    np.savez(folder / "outputs.npz", **dict(zip(signature["outputs"], found, strict=True)))
    begin = time.monotonic()
    times: list[int] = []
    for number in range(warmup + runs):
        if time.monotonic() - begin > seconds and times:
            break
        start = time.perf_counter_ns()
        run()
        if number >= warmup or time.monotonic() - begin > seconds:
            times.append(time.perf_counter_ns() - start)
    return times


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
