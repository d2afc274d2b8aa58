"""Runs scripts with a LiteRT that takes this machine's CPU for one without AVX.

On x86 with AVX, XNNPACK switches its sparse path off; nothing in LiteRT's interface asks it not to.
It learns of AVX by the instruction ``cpuid``. So the installed wheel is copied to a temporary
folder, every ``cpuid`` in the copy's libraries is replaced by bytes that are no instruction, and
``hide_avx.c``, preloaded, answers where the processor stumbles over them. The installation itself
is only read.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_PACKAGE = "ai_edge_litert"
_SHIM = Path(__file__).with_name("hide_avx.c")
_CPUID, _NO_INSTRUCTION = b"\x0f\xa2", b"\x06\xa2"
_UNUSED = ("vendors", "aot", "tools", "*WebGpu*", "__pycache__")
_LOADED = 1  # type of the program headers that say what of a file is loaded where


class NothingHiddenError(RuntimeError):
    """AVX cannot be hidden here; the message says why and what is needed."""


@dataclass(frozen=True)
class HiddenAvx:
    """A changed copy of LiteRT, and the library that answers in place of the processor."""

    site: Path
    shim: Path

    def run(
        self, script: Path, *arguments: str, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Runs a Python script for which the copy is the installed LiteRT."""
        return subprocess.run(
            [sys.executable, str(script), *arguments],
            env={**os.environ, "LD_PRELOAD": str(self.shim), "PYTHONPATH": str(self.site)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )


@contextlib.contextmanager
def hidden_avx() -> Iterator[HiddenAvx]:
    """Prepares the copy, and removes it afterwards.

    Raises:
        NothingHiddenError: It is not Linux on x86-64, the CPU has no AVX, LiteRT is not installed,
            or a C compiler or objdump is missing.
    """
    compiler, objdump = _tools()
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise NothingHiddenError(f"Expected {_PACKAGE} to be installed: pip install ai-edge-litert")
    with tempfile.TemporaryDirectory(prefix="tfprune-hidden-avx-") as name:
        folder = Path(name)
        shim, site = folder / "hide_avx.so", folder / "site"
        command = [compiler, "-O1", "-fPIC", "-shared", "-o", str(shim), str(_SHIM)]
        compiled = subprocess.run(command, capture_output=True, text=True, check=False)
        if compiled.returncode:
            raise NothingHiddenError(f"{compiler} does not compile the shim: {compiled.stderr}")
        shutil.copytree(
            Path(spec.origin).parent, site / _PACKAGE, ignore=shutil.ignore_patterns(*_UNUSED)
        )
        replaced = sum(_replace(path, objdump) for path in sorted(site.rglob("*.so")))
        if not replaced:
            raise NothingHiddenError("LiteRT's libraries have no cpuid instruction to replace")
        yield HiddenAvx(site, shim)


def _tools() -> tuple[str, str]:
    """The C compiler and objdump."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise NothingHiddenError(
            f"Expected Linux on x86-64. This is {platform.system()} on {platform.machine()}; on "
            "ARM nothing need be hidden"
        )
    if "avx" not in Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
        raise NothingHiddenError("This CPU has no AVX to hide: LiteRT has its sparse path as it is")
    wanted = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    compiler = next(filter(None, map(shutil.which, wanted)), None)
    objdump = shutil.which("objdump")
    if compiler is None or objdump is None:
        raise NothingHiddenError(
            "Expected a C compiler (cc, gcc, clang or what CC names) and objdump (of binutils) on "
            "the PATH; on Debian and Ubuntu: apt install gcc"
        )
    return compiler, objdump


def _replace(library: Path, objdump: str) -> int:
    """Makes every cpuid of a library an illegal instruction; how many there were."""
    content = bytearray(library.read_bytes())
    if _CPUID not in content:
        return 0
    addresses = list(_cpuid_addresses(library, objdump))
    for address in addresses:
        place = _offset(content, address)
        if content[place : place + 2] != _CPUID:
            raise NothingHiddenError(f"{library.name} has no cpuid where objdump sees one")
        content[place : place + 2] = _NO_INSTRUCTION
    library.write_bytes(content)
    return len(addresses)


def _cpuid_addresses(library: Path, objdump: str) -> Iterator[int]:
    # the two bytes alone may as well be the middle of another instruction
    command = [objdump, "--disassemble", "--no-show-raw-insn", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.rstrip().endswith(b"cpuid"):
                yield int(line.split(b":")[0], 16)
    if process.returncode:
        raise NothingHiddenError(f"objdump does not read {library.name}")


def _offset(elf: bytearray, address: int) -> int:
    """Where in an ELF file the byte is that is loaded at an address."""
    (headers,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    for number in range(count):
        kind, _, offset, start, _, length = struct.unpack_from(
            "<IIQQQQ", elf, headers + number * size
        )
        if kind == _LOADED and start <= address < start + length:
            return int(address - start + offset)
    raise NothingHiddenError(f"Nothing is loaded at address {address:#x}")
