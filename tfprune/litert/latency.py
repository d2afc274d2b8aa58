"""How long LiteRT models take on this machine's CPU.

Times on a busy machine are only comparable if they are taken side by side: the models run in turn,
a few times each, round after round. With one thread XNNPACK computes in the thread that calls, so
that thread's CPU time is the model's time and what other programs do hardly shows in it: on a
machine loaded with other work its median stayed within 5 % of the quiet wall time, while the
median of the wall time doubled.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfprune.errors import ModelError
from tfprune.litert.examples import Array
from tfprune.litert.quiet import captured_output
from tfprune.litert.report import Latency

_RUNS_PER_TURN = 5


@dataclass(frozen=True)
class CpuLatency:
    """Times of one model.

    Attributes:
        cpu: CPU time: of the calling thread with one thread, otherwise of the whole process.
        wall: Wall time.
    """

    cpu: Latency
    wall: Latency


class CpuRunner:
    """A LiteRT model loaded on the CPU, with random inputs in place.

    Attributes:
        inputs: Those, in the order of the model's inputs.
        run: Runs the model once.
    """

    def __init__(self, content: bytes, *, threads: int, seed: int) -> None:
        from ai_edge_litert.interpreter import Interpreter

        try:
            with captured_output():
                self._interpreter = Interpreter(model_content=content, num_threads=threads)
                self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"Expected a LiteRT model that runs here. LiteRT refuses it: {error}"
            ) from error
        self.inputs: list[Array] = []
        generator = np.random.default_rng(seed)
        for detail in self._interpreter.get_input_details():
            values = random_values(tuple(detail["shape"]), np.dtype(detail["dtype"]), generator)
            self.inputs.append(values)
            self._interpreter.set_tensor(detail["index"], values)
        self.run: Callable[[], None] = self._interpreter.invoke

    def outputs(self) -> list[Array]:
        """What the last run computed, in the order of the model's outputs."""
        details = self._interpreter.get_output_details()
        return [self._interpreter.get_tensor(detail["index"]) for detail in details]


def random_values(
    shape: tuple[int, ...], dtype: np.dtype[Any], generator: np.random.Generator
) -> Array:
    """Standard normal numbers, any int8, or 0 and 1 for the other types."""
    if np.issubdtype(dtype, np.floating):
        return generator.standard_normal(shape).astype(dtype)
    if dtype in (np.int8, np.uint8):
        limits = np.iinfo(dtype)
        return generator.integers(limits.min, limits.max + 1, shape).astype(dtype)
    # indices, for which these are valid whatever they point into
    return generator.integers(0, 2, shape).astype(dtype)


def measure(
    runners: Mapping[str, CpuRunner], *, threads: int, runs: int, warmup: int
) -> dict[str, CpuLatency]:
    """Times models in turn.

    Args:
        runners: The models by name.
        threads: With how many threads they were loaded.
        runs: How often each is timed.
        warmup: How often each runs untimed before.
    """
    clock = time.thread_time_ns if threads == 1 else time.process_time_ns
    cpu: dict[str, list[int]] = {name: [] for name in runners}
    wall: dict[str, list[int]] = {name: [] for name in runners}
    for runner in runners.values():
        for _ in range(warmup):
            runner.run()
    order = list(runners)
    while len(cpu[order[-1]]) < runs:
        for name in order:
            run = runners[name].run
            for _ in range(min(_RUNS_PER_TURN, runs - len(cpu[name]))):
                wall_start, cpu_start = time.perf_counter_ns(), clock()
                run()
                cpu_end, wall_end = clock(), time.perf_counter_ns()
                cpu[name].append(cpu_end - cpu_start)
                wall[name].append(wall_end - wall_start)
    return {name: CpuLatency(summary(cpu[name]), summary(wall[name])) for name in order}


def summary(nanoseconds: list[int]) -> Latency:
    """Quartiles and extremes of times."""
    ms = np.asarray(nanoseconds, dtype=np.float64) / 1e6
    least, lower, median, upper, most = np.percentile(ms, [0, 25, 50, 75, 100])
    return Latency(
        median_ms=float(median),
        lower_quartile_ms=float(lower),
        upper_quartile_ms=float(upper),
        min_ms=float(least),
        max_ms=float(most),
        runs=len(ms),
    )


def processor() -> str:
    """The name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
