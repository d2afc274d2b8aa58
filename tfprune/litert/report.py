"""What an export and a benchmark found out, as values that print as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tfprune.litert.flatbuffer import TensorInfo
from tfprune.sparse_path import SparsePathReport

GpuStatus = Literal[
    "delegated", "refused", "no driver", "crashed", "timed out", "failed", "not run"
]

_SLOWEST = 10
_LARGEST = 6


@dataclass(frozen=True)
class OutputDifference:
    """How far one output of a LiteRT model is from the Keras model's.

    Attributes:
        name: The output's name.
        largest_difference: The largest absolute difference of any element, in the output's unit.
        largest_value: The largest absolute value of the Keras model's output.
        top1_agreement: The fraction of positions at which both have their largest value at the
            same index of the last axis; None where that axis has fewer than two.
    """

    name: str
    largest_difference: float
    largest_value: float
    top1_agreement: float | None

    @property
    def relative_difference(self) -> float:
        """``largest_difference`` as a fraction of ``largest_value``."""
        if self.largest_difference == 0:
            return 0.0
        return self.largest_difference / max(self.largest_value, 1e-30)


@dataclass(frozen=True)
class ComparisonReport:
    """A LiteRT model compared with the Keras model it came from.

    Attributes:
        outputs: One entry per output.
        examples: On how many examples.
        source: Where those came from, in words.
    """

    outputs: tuple[OutputDifference, ...]
    examples: int
    source: str

    @property
    def relative_difference(self) -> float:
        """That of the worst output."""
        return max(output.relative_difference for output in self.outputs)

    @property
    def largest_difference(self) -> float:
        """The largest absolute difference of any output."""
        return max(output.largest_difference for output in self.outputs)

    @property
    def top1_agreement(self) -> float | None:
        """That of the worst output; None where no output has classes."""
        known = [o.top1_agreement for o in self.outputs if o.top1_agreement is not None]
        return min(known) if known else None

    def __str__(self) -> str:
        text = (
            f"{self.examples} examples of {self.source}: largest difference "
            f"{self.largest_difference:.2g}, {self.relative_difference:.1e} of the largest output"
        )
        agreement = self.top1_agreement
        return text if agreement is None else f"{text}; same top-1 for {agreement:.1%}"


@dataclass(frozen=True)
class CpuDelegation:
    """What XNNPACK, the CPU delegate, takes of a model; the rest runs on LiteRT's own kernels.

    Attributes:
        taken: Operation to how many of it XNNPACK runs.
        left: Operation to how many of it XNNPACK leaves.
        partitions: Into how many connected parts the taken operations fall.
    """

    taken: Mapping[str, int]
    left: Mapping[str, int]
    partitions: int

    def __str__(self) -> str:
        taken, left = sum(self.taken.values()), sum(self.left.values())
        parts = f"{self.partitions} part{'s' if self.partitions != 1 else ''}"
        if not left:
            return f"XNNPACK takes all {taken} operations, in {parts}"
        return (
            f"XNNPACK takes {taken} of {taken + left} operations, in {parts}; "
            f"not {_list(self.left)}"
        )


@dataclass(frozen=True)
class GpuObstacle:
    """One operation that a GPU delegate does not take.

    Attributes:
        op: Its kind, such as ``"TRANSPOSE"``.
        name: Where it stands in the model; may be empty.
        reason: Why.
    """

    op: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}{f' ({self.name})' if self.name else ''}: {self.reason}"


@dataclass(frozen=True)
class GpuAudit:
    """What the list of operations says about GPU delegates; nothing has been run.

    Attributes:
        obstacles: Operations that keep the model off the GPU.
        hazards: Patterns that GPU delegates are known to accept and then compute wrongly, or
            that end the process.
        undocumented: Operations that current delegates take although their documentation does
            not list them; older ones may not.
    """

    obstacles: tuple[GpuObstacle, ...]
    hazards: tuple[GpuObstacle, ...]
    undocumented: tuple[str, ...]

    @property
    def clear(self) -> bool:
        """Whether nothing stands against the whole model running on a GPU."""
        return not self.obstacles and not self.hazards

    def __str__(self) -> str:
        lines = []
        if self.clear:
            lines.append("nothing known stands against the GPU delegate")
        for title, found in (("not for the GPU", self.obstacles), ("hazard", self.hazards)):
            lines += [f"{title}: {text}" for text in _gathered(found)]
        if self.undocumented:
            lines.append(f"taken, but not on the documented list: {', '.join(self.undocumented)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class SparseTensor:
    """One tensor that a file stores without its zeros.

    Attributes:
        layer: The layer that it belongs to.
        shape: As LiteRT has it: (outputs, height, width, inputs) of a convolution's kernel,
            (outputs, inputs) of a dense layer's.
        sparsity: The fraction of its elements that are zero.
        block: The size of the blocks that are stored whole, along each axis; all 1 without blocks.
    """

    layer: str
    shape: tuple[int, ...]
    sparsity: float
    block: tuple[int, ...]

    def __str__(self) -> str:
        text = f"{self.layer} {list(self.shape)}: {self.sparsity:.1%} zeros"
        blocks = "x".join(map(str, self.block))
        return text if max(self.block, default=1) == 1 else f"{text}, in blocks of {blocks}"


@dataclass(frozen=True)
class SparseReport:
    """What a sparse file holds, and what it is good for.

    Attributes:
        tensors: Those stored without their zeros.
        sparsity: The fraction of zeros among all kernels of convolutions and dense layers.
        path: Whether XNNPACK computes the file sparsely on a phone.
    """

    tensors: tuple[SparseTensor, ...]
    sparsity: float
    path: SparsePathReport

    def __str__(self) -> str:
        largest = sorted(self.tensors, key=lambda t: -math.prod(t.shape))[:_LARGEST]
        more = len(self.tensors) - len(largest)
        lines = [
            f"{len(self.tensors)} tensors without their zeros; {self.sparsity:.1%} of all kernels' "
            "weights are zero",
            *(f"  {tensor}" for tensor in largest),
            *([f"  and {more} smaller ones"] if more else []),
            str(self.path),
            "GPU delegates refuse sparse files: export a second time without sparse=True for them",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class ExportReport:
    """A LiteRT model that has been written.

    Attributes:
        path: The file.
        quantize: ``None`` (float32), ``"float16"``, ``"dynamic"`` or ``"int8"``.
        size_bytes: The file's size.
        gzip_bytes: Its size after gzip at level 6, near what a download transfers.
        operations: Operation to how often it occurs, the most frequent first.
        inputs: In the order of the Keras model's inputs.
        outputs: In the order of the Keras model's outputs.
        comparison: With the Keras model; None when ``check=False``.
        cpu: What the CPU delegate takes.
        gpu: What the list of operations says about GPU delegates.
        calibration_examples: How many examples set the ranges of the activations; 0 but for int8.
        sparse: What is stored without zeros; None unless ``sparse=True``.
    """

    path: Path
    quantize: str | None
    size_bytes: int
    gzip_bytes: int
    operations: Mapping[str, int]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    comparison: ComparisonReport | None
    cpu: CpuDelegation
    gpu: GpuAudit
    calibration_examples: int = 0
    sparse: SparseReport | None = None

    @property
    def largest_difference(self) -> float | None:
        """Between any output and Keras's, in the output's unit; None without a check."""
        return None if self.comparison is None else self.comparison.largest_difference

    @property
    def top1_agreement(self) -> float | None:
        """With the Keras model, between 0 and 1; None without a check or without classes."""
        return None if self.comparison is None else self.comparison.top1_agreement

    def __str__(self) -> str:
        kind = (self.quantize or "float32") + (", sparse" if self.sparse else "")
        rows = [
            ("file", str(self.path)),
            ("kind", kind + self._calibrated()),
            ("size", f"{self.size_bytes:,} bytes, {self.gzip_bytes:,} gzipped"),
            ("inputs", "\n".join(map(str, self.inputs))),
            ("outputs", "\n".join(map(str, self.outputs))),
            ("operations", f"{sum(self.operations.values())}: {_list(self.operations)}"),
            (
                "check",
                "not compared with Keras" if self.comparison is None else str(self.comparison),
            ),
            ("CPU", str(self.cpu)),
            ("GPU", str(self.gpu)),
        ]
        if self.sparse is not None:
            rows.insert(-2, ("sparse", str(self.sparse)))
        return _table(rows)

    def _calibrated(self) -> str:
        if not self.calibration_examples:
            return ""
        return f", calibrated on {self.calibration_examples} examples"


@dataclass(frozen=True)
class Latency:
    """Times of one run of a model, in milliseconds.

    Attributes:
        median_ms: The median.
        lower_quartile_ms: A quarter of the runs were faster.
        upper_quartile_ms: A quarter of the runs were slower.
        min_ms: The fastest run.
        max_ms: The slowest run.
        runs: How many runs were timed.
    """

    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    min_ms: float
    max_ms: float
    runs: int

    def __str__(self) -> str:
        return (
            f"median {self.median_ms:.3f} ms "
            f"(quartiles {self.lower_quartile_ms:.3f} to {self.upper_quartile_ms:.3f}, "
            f"min {self.min_ms:.3f}, {self.runs} runs)"
        )


@dataclass(frozen=True)
class OperationLatency:
    """The time of one operation, measured alone.

    Attributes:
        op: Its kind, such as ``"CONV_2D"``.
        name: Where it stands in the model.
        median_us: CPU time of one run with one thread, in microseconds.
    """

    op: str
    name: str
    median_us: float


@dataclass(frozen=True)
class GpuRun:
    """What happened when the model was run on LiteRT's GPU accelerator, in a process of its own.

    Attributes:
        status: ``"delegated"`` (the whole model ran there), ``"refused"`` (some operations are not
            taken), ``"no driver"``, ``"crashed"`` (the runtime ended its process), ``"timed out"``,
            ``"failed"`` or ``"not run"``.
        message: The status in a sentence.
        obstacles: The operations that were not taken, with the runtime's reasons.
        operations_on_gpu: How many the runtime would take; None when it did not say.
        operations_on_cpu: How many it would leave to the CPU; None when it did not say.
        relative_difference: Between the GPU's outputs and the CPU's, as a fraction of the largest
            output; None when nothing ran. NaN when the GPU's outputs are not finite.
        agrees: Whether that difference is what rounding explains; None when nothing ran.
        latency: Wall time of a run, its data carried to the GPU and back; None when nothing ran.
        adapter: The driver's name for the device; empty when there is none.
        software: Whether that device is a CPU pretending; its latency then says nothing of phones.
    """

    status: GpuStatus
    message: str
    obstacles: tuple[GpuObstacle, ...] = ()
    operations_on_gpu: int | None = None
    operations_on_cpu: int | None = None
    relative_difference: float | None = None
    agrees: bool | None = None
    latency: Latency | None = None
    adapter: str = ""
    software: bool = False

    @property
    def delegated(self) -> bool:
        """Whether the whole model ran on the GPU."""
        return self.status == "delegated"

    def __str__(self) -> str:
        lines = [self.message]
        if self.relative_difference is not None:
            word = "agrees with the CPU" if self.agrees else "DISAGREES with the CPU"
            lines.append(f"{word}: {self.relative_difference:.1e} of the largest output")
        if self.latency is not None:
            lines.append(f"wall time {self.latency}")
        if self.adapter:
            note = "; a software driver, its times say nothing of a phone" if self.software else ""
            lines.append(f"device {self.adapter}{note}")
        return "\n".join(lines + _gathered(self.obstacles))


@dataclass(frozen=True)
class BenchmarkReport:
    """The latency of one model on this machine.

    Attributes:
        name: The model's.
        size_bytes: Of the LiteRT model.
        threads: With how many CPU threads.
        wall: Wall time of a run; other programs on the machine lengthen it.
        cpu: CPU time of a run. With one thread that of the thread, which other programs hardly
            touch; with more, that of the whole process, all its threads together.
        processor: The CPU's name.
        operations: Each operation measured alone, in the order they run; empty unless asked for.
            An estimate: what operations cost each other through the caches is not in it.
        gpu: What happened on the GPU.
    """

    name: str
    size_bytes: int
    threads: int
    wall: Latency
    cpu: Latency
    processor: str
    operations: tuple[OperationLatency, ...]
    gpu: GpuRun

    @property
    def latency_ms(self) -> float:
        """The median to compare models by: CPU time with one thread, wall time with more."""
        return self.cpu.median_ms if self.threads == 1 else self.wall.median_ms

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        rows = [
            ("model", f"{self.name}, {self.size_bytes:,} bytes"),
            ("processor", f"{self.processor}, {threads}"),
            ("CPU time", str(self.cpu)),
            ("wall time", str(self.wall)),
        ]
        if self.operations:
            rows.append(("operations", self._slowest()))
        rows.append(("GPU", str(self.gpu)))
        return _table(rows)

    def _slowest(self) -> str:
        timed = [o for o in self.operations if not math.isnan(o.median_us)]
        total = sum(o.median_us for o in timed)
        lines = [f"{total:,.0f} us in all, each measured alone; the slowest:"]
        lines += [
            f"{o.median_us:9.1f} us {o.median_us / max(total, 1e-9):6.1%}  {o.op}  {o.name}"
            for o in sorted(timed, key=lambda o: -o.median_us)[:_SLOWEST]
        ]
        untimed = [o.op for o in self.operations if math.isnan(o.median_us)]
        if untimed:
            lines.append(f"cannot run alone: {', '.join(untimed)}")
        return "\n".join(lines)


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(title) for title, _ in rows)
    lines = []
    for title, text in rows:
        first, *rest = text.splitlines() or [""]
        lines.append(f"{title:<{width}}  {first}")
        lines += [f"{'':<{width}}  {line}" for line in rest]
    return "\n".join(lines)


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {op}" for op, count in counts.items())


def _gathered(obstacles: tuple[GpuObstacle, ...]) -> list[str]:
    """One line per kind and reason, with the first place and how many more there are."""
    places: dict[tuple[str, str], list[str]] = {}
    for obstacle in obstacles:
        places.setdefault((obstacle.op, obstacle.reason), []).append(obstacle.name)
    lines = []
    for (op, reason), names in places.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        where = f" ({names[0]}{more})" if names[0] else more
        lines.append(f"{op}{where}: {reason}")
    return lines
