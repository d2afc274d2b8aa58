"""Running a model on LiteRT's GPU accelerator for real, whatever that does to its process."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import tfprune
from tfprune.litert.check import relative_difference, to_floats
from tfprune.litert.delegates import short_name
from tfprune.litert.examples import Array
from tfprune.litert.flatbuffer import Graph, read_graph
from tfprune.litert.latency import CpuRunner, summary
from tfprune.litert.report import GpuObstacle, GpuRun

# What rounding explains. A float model that is computed in float32 on both sides differs by the
# order of summation, some 1e-5 of the largest output; untrained networks enlarge that to 1e-3. A
# GPU computes an int8 model in float and leaves out roundings that the CPU makes. Wrong kernels
# give differences as large as the outputs.
_FLOAT_AGREEMENT = 1e-2
_QUANTISED_AGREEMENT = 0.25

_REFUSALS = "Following operations are not supported by GPU delegate:"
_SPLIT = re.compile(
    r"(\d+) operations will run on the GPU, and the remaining (\d+) operations will run on the CPU"
)
_ICD_VARIABLES = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES", "VK_ADD_DRIVER_FILES")
_ICD_FOLDERS = (
    "/etc/vulkan/icd.d",
    "/usr/share/vulkan/icd.d",
    "/usr/local/share/vulkan/icd.d",
    "/usr/local/etc/vulkan/icd.d",
    "~/.local/share/vulkan/icd.d",
)
NO_DRIVER = (
    "no usable Vulkan driver on this machine, so the GPU was not tried; a software one such as "
    "SwiftShader is enough to see what would be delegated"
)


def driver_announced() -> bool:
    """Whether anything on this machine says that it is a GPU driver; does not load it.

    On systems other than Linux the accelerator needs no Vulkan, and the answer is yes.
    """
    if not sys.platform.startswith("linux"):
        return True
    named = [
        path
        for variable in _ICD_VARIABLES
        for path in os.environ.get(variable, "").split(os.pathsep)
        if path and Path(path).exists()
    ]
    folders = (Path(folder).expanduser() for folder in _ICD_FOLDERS)
    return bool(named) or any(folder.is_dir() and any(folder.glob("*.json")) for folder in folders)


def run_on_gpu(
    content: bytes, *, runs: int, warmup: int, timeout_s: float, seed: int = 0
) -> GpuRun:
    """Runs a model on the GPU accelerator in a child process, and on the CPU for comparison.

    Args:
        content: A LiteRT model.
        runs: How often it is timed.
        warmup: How often it runs untimed before.
        timeout_s: After how many seconds the child is ended. No timed run is begun in the
            second half of that.
        seed: Of the random inputs.

    Returns:
        What happened. No driver, refused operations, a crash and a timeout are results.

    Raises:
        ModelError: The model does not even run on the CPU.
    """
    graph = read_graph(content)
    runner = CpuRunner(content, threads=1, seed=seed)
    runner.run()
    with tempfile.TemporaryDirectory(prefix="tfprune-gpu-") as name:
        folder = Path(name)
        (folder / "model.tflite").write_bytes(content)
        names = [info.name for info in graph.inputs]
        given: dict[str, Any] = dict(zip(names, runner.inputs, strict=True))
        np.savez(folder / "inputs.npz", **given)
        status = _run_child(folder, runs, warmup, timeout_s)
        log_file = folder / "log.txt"
        log = log_file.read_text("utf-8", "replace") if log_file.exists() else ""
        result_file = folder / "result.json"
        if status is None:
            run = GpuRun("timed out", f"did not finish in {timeout_s:g} s")
        elif not result_file.exists():
            words = _last_words(log, status)
            run = GpuRun("crashed", f"the GPU runtime ended its process: {words}")
        else:
            result = json.loads(result_file.read_text(encoding="utf-8"))
            if result["error"]:
                run = _refusal(result["error"], log)
            else:
                with np.load(folder / "outputs.npz") as arrays:
                    found = {key: arrays[key] for key in arrays.files}
                run = _success(graph, runner.outputs(), found, result["nanoseconds"])
    adapter, software = _device(log)
    return dataclasses.replace(run, adapter=adapter, software=software)


def _run_child(folder: Path, runs: int, warmup: int, timeout_s: float) -> int | None:
    """The child's exit status, or None where it had to be ended."""
    # the child shall find this very tfprune, however the parent came by it
    path = [str(Path(tfprune.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    arguments = [str(folder), str(runs), str(warmup), str(timeout_s / 2)]
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "tfprune.litert.gpu_child", *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return child.returncode


def _refusal(error: str, log: str) -> GpuRun:
    if re.search("No adapters found", log):
        return GpuRun("no driver", NO_DRIVER)
    obstacles = _obstacles(log)
    if not obstacles:
        reasons = [line for line in log.splitlines() if re.match(r"ERROR: |E\d{4} ", line)]
        words = reasons[-1] if reasons else " ".join(error.split())
        return GpuRun("failed", f"the GPU accelerator failed: {words}")
    split = _SPLIT.search(log)
    on_gpu, on_cpu = (int(split[1]), int(split[2])) if split else (None, None)
    count = f"{on_cpu} of {int(split[1]) + int(split[2])}" if split else "some"
    message = f"the GPU accelerator does not take {count} operations"
    return GpuRun("refused", message, obstacles, on_gpu, on_cpu)


def _obstacles(log: str) -> tuple[GpuObstacle, ...]:
    """The lines between the heading and the summary: ``OP: reason. place``, in no fixed order."""
    _, heading, rest = log.partition(_REFUSALS)
    if not heading:
        return ()
    lines = []
    for line in rest.strip().splitlines():
        match = re.match(r"([A-Z][A-Z0-9_]*):(.*)$", line)
        if not match:
            break
        # behind the reason stands the name of a tensor, sometimes
        reason, _, place = match[2].strip().rpartition(". ")
        if not reason or " " in place:
            reason, place = match[2].strip(" ."), ""
        lines.append(GpuObstacle(match[1], short_name(place), reason or "no reason given"))
    return tuple(lines)


def _success(
    graph: Graph, expected: list[Array], found: Mapping[str, Array], nanoseconds: list[int]
) -> GpuRun:
    want = {
        info.name: to_floats(array, info)
        for info, array in zip(graph.outputs, expected, strict=True)
    }
    got = {
        info.name: to_floats(found[info.name], info).reshape(want[info.name].shape)
        for info in graph.outputs
    }
    difference = relative_difference(want, got)
    quantised = any(
        tensor.dtype == "int8" for operation in graph.operations for tensor in operation.inputs
    )
    return GpuRun(
        "delegated",
        f"all {len(graph.operations)} operations run on the GPU accelerator",
        operations_on_gpu=len(graph.operations),
        operations_on_cpu=0,
        relative_difference=difference,
        # NaN is not at most anything
        agrees=difference <= (_QUANTISED_AGREEMENT if quantised else _FLOAT_AGREEMENT),
        latency=summary(nanoseconds),
    )


def _device(log: str) -> tuple[str, bool]:
    """The adapter's name and whether it is software, from the runtime's line about it."""
    match = re.search(r"Selected adapter: (.+)$", log, re.MULTILINE)
    if not match:
        return "", False
    line = match[1]
    software = re.search(
        r"adapterType=CPU|swiftshader|llvmpipe|lavapipe|Basic Render", line, re.IGNORECASE
    )
    return line.split(", arch=")[0], software is not None


def _last_words(log: str, status: int) -> str:
    fatal = [
        line for line in log.splitlines() if re.match(r"F\d{4} ", line) or "Check fail" in line
    ]
    if fatal:
        return fatal[-1].split("] ", 1)[-1]
    return f"signal {-status}" if status < 0 else f"exit status {status}"
