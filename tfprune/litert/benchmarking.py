"""How fast models are on this machine, and whether a GPU would take them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tfprune.errors import ArgumentError
from tfprune.litert.convert import convert
from tfprune.litert.gpu import NO_DRIVER, driver_announced, run_on_gpu
from tfprune.litert.keras_model import InputShape, is_keras3, is_tf_keras, keras_model
from tfprune.litert.latency import CpuLatency, CpuRunner, measure, processor
from tfprune.litert.operations import operation_latencies
from tfprune.litert.progress import progress
from tfprune.litert.report import BenchmarkReport, GpuRun, OperationLatency


def benchmark(
    model: Any,
    *,
    threads: int = 1,
    runs: int = 50,
    warmup: int = 10,
    gpu: bool | Literal["auto"] = "auto",
    gpu_timeout_s: float = 120.0,
    profile: bool = False,
    input_shape: InputShape | None = None,
    seed: int = 0,
    verbose: int = 0,
) -> BenchmarkReport:
    """Measures a model's latency on this machine's CPU, and runs it on the GPU accelerator.

    To compare models use :func:`benchmark_many`, which measures them side by side.

    Args:
        model: A Keras 3 or tf_keras model (converted to float32 with batch size 1), the path of a
            LiteRT file, or its bytes.
        threads: CPU threads. With one, CPU time is measured, which hardly depends on what else
            the machine does; with more, go by the wall time and keep the machine quiet.
        runs: How often the model is timed.
        warmup: How often it runs untimed before.
        gpu: True runs the model on LiteRT's GPU accelerator, in a process of its own, and compares
            its outputs with the CPU's; ``"auto"`` does so where a driver is installed; False
            leaves it out. A machine without a driver is a line in the report, not an error.
        gpu_timeout_s: After how many seconds that process is ended.
        profile: Also times every operation alone.
        input_shape: For a Keras model with inputs of open size, see :func:`tfprune.export`.
        seed: Of the random inputs.
        verbose: 1 shows progress on standard error.

    Returns:
        The figures, which print as text. They are this machine's: a phone has other kernels.

    Raises:
        ArgumentError: An argument has a value that is not allowed, or there is no such file.
        ModelError: Not a LiteRT model, or one that LiteRT cannot run here.
        ExportError: A Keras model that cannot be converted.
    """
    name = _name(model)
    return benchmark_many(
        {name: model},
        threads=threads,
        runs=runs,
        warmup=warmup,
        gpu=gpu,
        gpu_timeout_s=gpu_timeout_s,
        profile=profile,
        input_shape=input_shape,
        seed=seed,
        verbose=verbose,
    )[name]


def benchmark_many(
    models: Mapping[str, Any],
    *,
    threads: int = 1,
    runs: int = 50,
    warmup: int = 10,
    gpu: bool | Literal["auto"] = "auto",
    gpu_timeout_s: float = 120.0,
    profile: bool = False,
    input_shape: InputShape | None = None,
    seed: int = 0,
    verbose: int = 0,
) -> dict[str, BenchmarkReport]:
    """Measures several models side by side: in turn, a few runs each, round after round.

    Args:
        models: Names to models, in any of the forms that :func:`benchmark` takes.
        threads: See :func:`benchmark`, as for all that follow.
        runs: How often each model is timed.
        warmup: How often each runs untimed before.
        gpu: Whether to run them on the GPU accelerator as well.
        gpu_timeout_s: The limit for each.
        profile: Whether to time every operation alone.
        input_shape: For Keras models with inputs of open size.
        seed: Of the random inputs.
        verbose: 1 shows progress on standard error.

    Returns:
        A report for each name, in the same order.

    Raises:
        ArgumentError: See :func:`benchmark`, or no models.
        ModelError: See :func:`benchmark`.
        ExportError: See :func:`benchmark`.
    """
    _check_arguments(models, threads, runs, warmup, gpu, gpu_timeout_s)
    with progress(verbose, total=len(models) * (3 if profile else 2) + 1) as step:
        contents: dict[str, bytes] = {}
        for name, model in models.items():
            step(f"load {name}")
            contents[name] = content_of(model, input_shape=input_shape)
        step(f"time on the CPU, {runs} runs each")
        runners = {n: CpuRunner(c, threads=threads, seed=seed) for n, c in contents.items()}
        times = measure(runners, threads=threads, runs=runs, warmup=warmup)
        del runners
        profiles: dict[str, tuple[OperationLatency, ...]] = {}
        for name, content in contents.items() if profile else ():
            step(f"time the operations of {name}")
            profiles[name] = operation_latencies(content, runs=runs, warmup=warmup, seed=seed)
        reports = {}
        for name, content in contents.items():
            step(f"run {name} on the GPU")
            on_gpu = _gpu(content, gpu, runs, warmup, gpu_timeout_s, seed)
            reports[name] = _report(name, content, threads, times[name], profiles, on_gpu)
    return reports


def _report(
    name: str,
    content: bytes,
    threads: int,
    times: CpuLatency,
    profiles: Mapping[str, tuple[OperationLatency, ...]],
    gpu: GpuRun,
) -> BenchmarkReport:
    return BenchmarkReport(
        name=name,
        size_bytes=len(content),
        threads=threads,
        wall=times.wall,
        cpu=times.cpu,
        processor=processor(),
        operations=profiles.get(name, ()),
        gpu=gpu,
    )


def _gpu(
    content: bytes,
    wanted: bool | Literal["auto"],
    runs: int,
    warmup: int,
    timeout_s: float,
    seed: int,
) -> GpuRun:
    if wanted is False:
        return GpuRun("not run", "not run")
    if wanted == "auto" and not driver_announced():
        return GpuRun("no driver", NO_DRIVER)
    return run_on_gpu(content, runs=runs, warmup=warmup, timeout_s=timeout_s, seed=seed)


def _name(model: Any) -> str:
    if isinstance(model, (str, os.PathLike)):
        return Path(model).stem
    return str(getattr(model, "name", "model"))


def content_of(model: Any, *, input_shape: InputShape | None = None) -> bytes:
    """The LiteRT form of a Keras model, of a file, or of bytes that are one already.

    Raises:
        ArgumentError: Something else, or a file that cannot be read.
        ModelError: A Keras model that cannot be taken.
        ExportError: A Keras model that cannot be converted.
    """
    if isinstance(model, (bytes, bytearray, memoryview)):
        return bytes(model)
    if isinstance(model, (str, os.PathLike)):
        try:
            return Path(model).read_bytes()
        except OSError as error:
            raise ArgumentError(
                f"Expected the path of a LiteRT file. Cannot read {os.fspath(model)!r}: "
                f"{error.strerror or error}."
            ) from error
    if is_keras3(model) or is_tf_keras(model):
        return convert(keras_model(model, input_shape=input_shape))
    raise ArgumentError(
        "Expected a Keras model, the path of a LiteRT file or its bytes. "
        f"Received an object of type {type(model).__qualname__}."
    )


def _check_arguments(
    models: object, threads: object, runs: object, warmup: object, gpu: object, timeout_s: object
) -> None:
    if not isinstance(models, Mapping) or not models:
        raise ArgumentError(
            "Expected a mapping from names to models with at least one entry. "
            f"Received: {models!r}."
        )
    for name, count, least in (("threads", threads, 1), ("runs", runs, 1), ("warmup", warmup, 0)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ArgumentError(f"Expected {name} to be {least} or more. Received: {count!r}.")
    if gpu not in (True, False, "auto"):
        raise ArgumentError(f"Expected gpu to be True, False or 'auto'. Received: {gpu!r}.")
    if not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise ArgumentError(f"Expected gpu_timeout_s to be positive. Received: {timeout_s!r}.")
