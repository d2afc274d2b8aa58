"""Latency on the CPU, and what is said about a GPU without one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import tfprune
from tfprune.errors import ArgumentError, ModelError
from tfprune.litert import benchmark_many, gpu, latency
from tfprune.litert.convert import convert
from tfprune.litert.keras_model import keras_model


def convolutions(width: int) -> Any:
    import keras

    layers = [keras.layers.Conv2D(width, 3, padding="same") for _ in range(3)]
    return keras.Sequential([keras.Input((32, 32, 4)), *layers], name=f"width_{width}")


@pytest.fixture(scope="module")
def wide() -> bytes:
    return convert(keras_model(convolutions(64)))


@pytest.fixture(scope="module")
def narrow() -> bytes:
    return convert(keras_model(convolutions(8)))


def test_all_kinds_of_models(tmp_path) -> None:
    model = convolutions(8)
    narrow = convert(keras_model(model))
    path = tmp_path / "narrow.tflite"
    path.write_bytes(narrow)
    reports = benchmark_many(
        {"keras": model, "path": path, "text": str(path), "bytes": narrow},
        runs=3,
        warmup=1,
        gpu=False,
    )
    assert list(reports) == ["keras", "path", "text", "bytes"]
    assert {report.size_bytes for report in reports.values()} == {len(narrow)}
    assert tfprune.benchmark(path, runs=1, warmup=0, gpu=False).name == "narrow"
    assert tfprune.benchmark(convolutions(8), runs=1, gpu=False).name == "width_8"


def test_open_sizes() -> None:
    import keras

    model = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(2, 3)])
    with pytest.raises(ArgumentError, match="Pass input_shape"):
        tfprune.benchmark(model, gpu=False)
    assert tfprune.benchmark(model, runs=1, gpu=False, input_shape=(9, 9, 3)).wall.runs == 1


def test_statistics_and_text(wide) -> None:
    report = tfprune.benchmark(wide, runs=20, warmup=2, gpu=False)
    for times in (report.cpu, report.wall):
        assert times.runs == 20
        assert 0 < times.min_ms <= times.lower_quartile_ms <= times.median_ms
        assert times.median_ms <= times.upper_quartile_ms <= times.max_ms
    assert report.latency_ms == report.cpu.median_ms
    assert report.processor
    assert report.gpu.status == "not run"
    text = str(report)
    assert f"{len(wide):,} bytes" in text
    assert f"{report.processor}, 1 thread" in text
    assert f"CPU time   median {report.cpu.median_ms:.3f} ms" in text


def test_more_threads_are_judged_by_the_wall_time(wide) -> None:
    report = tfprune.benchmark(wide, threads=2, runs=10, gpu=False)
    assert report.latency_ms == report.wall.median_ms
    assert "2 threads" in str(report)


def test_more_work_takes_longer(wide, narrow) -> None:
    """50 times the MACs; the ratio measured is 15 to 25, and CPU time hardly depends on load."""
    reports = benchmark_many({"narrow": narrow, "wide": wide}, runs=20, gpu=False)
    assert reports["wide"].latency_ms > 3 * reports["narrow"].latency_ms


def test_models_run_in_turn() -> None:
    order: list[str] = []

    class Runner:
        def __init__(self, name: str) -> None:
            self.run = lambda: order.append(name)

    runners: Any = {"a": Runner("a"), "b": Runner("b")}
    times = latency.measure(runners, threads=1, runs=7, warmup=2)
    assert "".join(order) == "aabb" + "aaaaabbbbb" + "aabb"
    assert times["a"].cpu.runs == times["b"].wall.runs == 7


def test_summary_is_of_milliseconds() -> None:
    times = latency.summary([1_000_000, 2_000_000, 3_000_000, 4_000_000, 9_000_000])
    assert (times.min_ms, times.lower_quartile_ms, times.median_ms) == (1, 2, 3)
    assert (times.upper_quartile_ms, times.max_ms) == (4, 9)


def test_profile_adds_up(wide) -> None:
    report = tfprune.benchmark(wide, runs=20, gpu=False, profile=True)
    assert [operation.op for operation in report.operations] == ["CONV_2D"] * 3
    assert len({operation.name for operation in report.operations}) == 3
    total = sum(operation.median_us for operation in report.operations) / 1e3
    # each alone finds its data in the cache, or pays for being called: 0.95 to 1.05 measured
    assert report.cpu.median_ms == pytest.approx(total, rel=0.5)
    # 4 input channels against 64
    assert report.operations[0].median_us < report.operations[1].median_us
    assert "each measured alone" in str(report)


@pytest.mark.parametrize("quantize", ["float16", "dynamic", "int8"])
def test_profile_of_quantised_models(quantize, keras3_toy, images, tmp_path) -> None:
    report = tfprune.export(keras3_toy, tmp_path / "m", quantize=quantize, calibration=images)
    timed = tfprune.benchmark(report.path, runs=2, gpu=False, profile=True).operations
    assert all(operation.median_us > 0 for operation in timed)
    # unpacking float16 constants is folded into who reads them
    expected = sum(report.operations.values())
    assert len(timed) == (7 if quantize == "float16" else expected)


def test_profile_of_what_cannot_run_alone() -> None:
    import keras

    model = keras.Sequential([keras.Input((6, 4)), keras.layers.LSTM(3), keras.layers.Dense(2)])
    report = tfprune.benchmark(model, runs=2, gpu=False, profile=True)
    times = {operation.op: operation.median_us for operation in report.operations}
    assert math.isnan(times["WHILE"]) and times["FULLY_CONNECTED"] > 0
    assert "cannot run alone: WHILE" in str(report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "threads to be 1 or more"),
        ({"runs": 0}, "runs to be 1 or more"),
        ({"warmup": -1}, "warmup to be 0 or more"),
        ({"gpu": "yes"}, "gpu to be True, False or 'auto'"),
        ({"gpu_timeout_s": 0}, "gpu_timeout_s to be positive"),
    ],
)
def test_arguments(arguments, message, narrow) -> None:
    with pytest.raises(ArgumentError, match=message):
        tfprune.benchmark(narrow, **arguments)


def test_models_that_are_none(tmp_path) -> None:
    with pytest.raises(ArgumentError, match="No such file"):
        tfprune.benchmark(tmp_path / "nothing.tflite")
    with pytest.raises(ArgumentError, match="Received an object of type float"):
        tfprune.benchmark(1.5)
    with pytest.raises(ArgumentError, match="at least one entry"):
        benchmark_many({})
    with pytest.raises(ModelError, match="LiteRT refuses it"):
        tfprune.benchmark(b"not a model at all")


class TestWithoutGpu:
    """A driver that is not there, from whichever side one looks."""

    @pytest.fixture(autouse=True)
    def no_driver(self, monkeypatch, tmp_path) -> None:
        for variable in ("VK_DRIVER_FILES", "VK_ADD_DRIVER_FILES"):
            monkeypatch.delenv(variable, raising=False)
        # this hides whatever driver the machine has
        monkeypatch.setenv("VK_ICD_FILENAMES", str(tmp_path / "nothing.json"))
        monkeypatch.setattr(gpu, "_ICD_FOLDERS", (str(tmp_path),))

    def test_auto_does_not_try(self, narrow, monkeypatch) -> None:
        monkeypatch.setattr(gpu, "_run_child", lambda *a: pytest.fail("a child was started"))
        run = tfprune.benchmark(narrow, runs=1).gpu
        assert (run.status, run.delegated) == ("no driver", False)
        assert "no usable Vulkan driver" in str(run)

    def test_true_tries_and_says_so(self, narrow, capfd) -> None:
        report = tfprune.benchmark(narrow, runs=1, gpu=True)
        assert report.gpu.status == "no driver"
        assert "GPU        no usable Vulkan driver" in str(report)
        assert capfd.readouterr() == ("", "")

    def test_driver_announced(self, tmp_path) -> None:
        assert not gpu.driver_announced()
        (tmp_path / "nothing.json").write_text("{}")
        assert gpu.driver_announced()


class TestChild:
    """What the child process may do, played by hand."""

    def run(self, content: bytes, monkeypatch, log: str, status: int | None, **files: str) -> Any:
        def child(folder: Any, *arguments: object) -> int | None:
            (folder / "log.txt").write_text(log)
            for name, text in files.items():
                (folder / f"{name}.json").write_text(text)
            return status

        monkeypatch.setattr(gpu, "_run_child", child)
        return gpu.run_on_gpu(content, runs=1, warmup=0, timeout_s=5)

    def test_crash(self, narrow, monkeypatch) -> None:
        log = "F0000 00:00:17.5 99 model.cc:218] Check failed: !IsInput(consumer, value)\n"
        run = self.run(narrow, monkeypatch, log, 1)
        assert run.status == "crashed"
        assert run.message.endswith("Check failed: !IsInput(consumer, value)")

    def test_signal(self, narrow, monkeypatch) -> None:
        assert "signal 11" in str(self.run(narrow, monkeypatch, "", -11))

    def test_refusal(self, narrow, monkeypatch) -> None:
        log = (
            "I0000 a.cc:1] Selected adapter: Some GPU, arch=x, vendor=y, backend=Vulkan, "
            "adapterType=Discrete GPU\n"
            "ERROR: Following operations are not supported by GPU delegate:\n"
            "DEQUANTIZE: \n"
            "RESHAPE: Tensor dimensions must be less than 5. net/one;net/permute\n"
            "TRANSPOSE: Permutation for transpose is invalid.\n"
            "4 operations will run on the GPU, "
            "and the remaining 3 operations will run on the CPU.\n"
        )
        run = self.run(narrow, monkeypatch, log, 0, result='{"error": "Some ops are not"}')
        assert (run.status, run.operations_on_gpu, run.operations_on_cpu) == ("refused", 4, 3)
        assert [str(obstacle) for obstacle in run.obstacles] == [
            "DEQUANTIZE: no reason given",
            "RESHAPE (net/permute): Tensor dimensions must be less than 5",
            "TRANSPOSE: Permutation for transpose is invalid",
        ]
        assert (run.adapter, run.software) == ("Some GPU", False)
        assert "does not take 3 of 7 operations" in str(run)

    def test_other_failure(self, narrow, monkeypatch) -> None:
        log = "ERROR: out of memory\n"
        run = self.run(narrow, monkeypatch, log, 0, result='{"error": "failed"}')
        assert (run.status, run.message) == (
            "failed",
            "the GPU accelerator failed: ERROR: out of memory",
        )

    def test_timeout(self, narrow) -> None:
        """No process starts, imports NumPy and runs a model in a millisecond."""
        run = gpu.run_on_gpu(narrow, runs=1, warmup=0, timeout_s=0.001)
        assert run.status == "timed out"


def test_outputs_that_are_nan_do_not_agree(narrow) -> None:
    from tfprune.litert.flatbuffer import read_graph

    graph = read_graph(narrow)
    want = np.ones((1, 32, 32, 8), "float32")
    name = graph.outputs[0].name
    run = gpu._success(graph, [want], {name: want * np.nan}, [1])
    assert math.isnan(run.relative_difference) and run.agrees is False
    assert "DISAGREES" in str(run)
    assert gpu._success(graph, [want], {name: want.ravel()}, [1]).agrees is True


def test_operations_alone_keep_constants_behind_the_flatbuffer(monkeypatch):
    # Quantisers store the constants of larger models there: an operation that is cut out must take
    # them along, not ask for them as inputs.
    import keras

    from tfprune.litert import operations
    from tfprune.litert.flatbuffer import read_graph

    x = inputs = keras.Input((8, 8, 64))
    for _ in range(2):
        x = keras.layers.Conv2D(64, 3, padding="same", activation="relu")(x)
    content = constants_behind(convert(keras_model(keras.Model(inputs, x))))
    cut = []
    monkeypatch.setattr(operations, "_median_us", lambda content, *rest: cut.append(content) or 1.0)
    operations.operation_latencies(content, runs=1, warmup=0, seed=0)
    convolutions = [graph for graph in map(read_graph, cut) if "CONV_2D" in graph.counts()]
    assert len(convolutions) == 2
    for graph in convolutions:
        (operation,) = graph.operations
        assert [tensor.constant for tensor in operation.inputs] == [False, True, True]


def constants_behind(content):
    """The same model with its constants appended to the flatbuffer."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    moved = [buffer for buffer in model.buffers if buffer.data is not None]
    parts = [bytes(buffer.data) for buffer in moved]

    def packed(start):
        for buffer, part in zip(moved, parts, strict=True):
            buffer.data, buffer.offset, buffer.size = None, start, len(part)
            start += -(-len(part) // 16) * 16
        return bytes(flatbuffer_utils.convert_object_to_bytearray(model))

    # Offsets have a fixed width: what they say does not change the flatbuffer's length.
    length = -(-len(packed(16)) // 16) * 16
    return packed(length).ljust(length, b"\0") + b"".join(
        part.ljust(-(-len(part) // 16) * 16, b"\0") for part in parts
    )
