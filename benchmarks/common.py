"""What all benchmarks say about themselves: machine, versions, date and command."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tfprune.litert.latency import processor

PACKAGES = ("tfprune", "keras", "tensorflow", "ai-edge-litert", "ai-edge-quantizer", "numpy")


def instruction_set() -> str:
    """The widest vector instructions of the CPU, which decide the width of LiteRT's kernels."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return ""
    for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON")):
        if flag in flags:
            return name + (" with VNNI" if flag == "avx512f" and "avx512_vnni" in flags else "")
    return ""


def circumstances(module: str, arguments: Sequence[str] | None = None) -> str:
    """A Markdown paragraph: how the figures came about.

    Args:
        module: of the script, such as ``"benchmarks.latency"``.
        arguments: of the command line; by default those of this process.
    """
    command = " ".join(["python -m", module, *(sys.argv[1:] if arguments is None else arguments)])
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    vectors = instruction_set()
    cpu = processor() + (f" ({vectors})" if vectors else "")
    return (
        f"Made on {datetime.now(UTC):%Y-%m-%d} by `{command}` with "
        f"Python {platform.python_version()}, {packages}; CPU: {cpu}."
    )


def write(text: str, path: Path | None) -> None:
    """Prints the text, and writes it to a file if one is named."""
    print(text)
    if path is not None:
        path.write_text(text.rstrip() + "\n", encoding="utf-8")
