"""The common kinds of CPU that a wheel carries the kernels for: nobody needs a compiler or waits for one.

Only the standard library is imported: what builds a wheel loads this file by itself.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = Path(__file__).parent
CARRIED = SOURCES / "carried"
"""Where a wheel has them; a source checkout has no such folder."""

FLAGS = (
    "-std=c++20",
    # -O3 for ARM takes a compiler minutes; macOS calls it arm64
    "-O2" if platform.machine() in ("aarch64", "arm64") else "-O3",
    "-fno-math-errno",
    "-ffp-contract=off",  # lanes.h says where products and sums are fused
    "-Wno-psabi",
    "-Werror=switch",
    "-fPIC",
    "-shared",
    "-pthread",
)
_BUILD_S = 300.0


class CompileError(Exception):
    """There is no C++ compiler, or it refused the kernels."""


@dataclass(frozen=True)
class CpuKind:
    """CPUs of one machine type (`platform.machine()`) that have what `needs` names as Linux does."""

    name: str
    machine: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()

    @property
    def library(self) -> Path:
        return CARRIED / f"{self.name}.so"


_V3 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_VNNI = _V4 | {"avx512_vnni"}
_BF16 = _VNNI | {"avx512_bf16"}
_AMX = _BF16 | {"amx_tile", "amx_bf16", "amx_int8"}
_WITH_BF16 = ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16")

KINDS = (
    CpuKind("amx", "x86_64", (*_WITH_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"), _AMX),
    CpuKind("avx512-bf16", "x86_64", _WITH_BF16, _BF16),
    CpuKind("avx512-vnni", "x86_64", ("-march=x86-64-v4", "-mavx512vnni"), _VNNI),
    CpuKind("avx512", "x86_64", ("-march=x86-64-v4",), _V4),
    CpuKind("avx2", "x86_64", ("-march=x86-64-v3",), _V3),
    CpuKind("aarch64", "aarch64", ()),
)
"""The better before the lesser."""


def carried(instructions: Collection[str]) -> Path | None:
    """The best of the carried libraries that a CPU with these instructions can run."""
    for kind in KINDS:
        if kind.machine == platform.machine() and kind.needs <= set(instructions) and kind.library.exists():
            return kind.library
    return None


def instructions() -> list[str]:
    """What this CPU has beyond its machine type, by Linux's names; nothing where that cannot be read."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "").split()[2:]


def compiler() -> str:
    """What CXX names, or g++ or clang++. Raises CompileError."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise CompileError("no C++ compiler (g++, clang++, or what CXX names)")
    return found


def compile_kernels(compiler: str, flags: Sequence[str], library: Path) -> None:
    """Builds `library`, which only we can write to, whatever this process lets others do: it is executed.
    Raises CompileError."""
    command = [compiler, *FLAGS, *flags, str(SOURCES / "kernels.cpp"), "-o", str(library)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_BUILD_S,
            umask=0o022,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{compiler} did not build the kernels: {error}") from error
    if done.returncode:
        raise CompileError(f"{compiler} refuses the kernels:\n{done.stderr[-2000:]}")


def compile_carried(folder: Path) -> None:
    """The kernels for every kind of CPU of this machine's type, into `folder`: all of them, or none. Raises
    CompileError."""
    kinds = [kind for kind in KINDS if kind.machine == platform.machine()]
    found = compiler()
    with TemporaryDirectory() as place, ThreadPoolExecutor(os.cpu_count()) as pool:
        libraries = {kind: Path(place) / kind.library.name for kind in kinds}
        jobs = [pool.submit(compile_kernels, found, kind.flags, at) for kind, at in libraries.items()]
        for kind, job in zip(kinds, jobs, strict=True):
            job.result()
            print(f"kernels for {kind.name}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        for library in libraries.values():
            shutil.copy(library, folder)
