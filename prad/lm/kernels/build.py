"""Builds the kernels once for this machine's CPU, and keeps them.

Nothing here runs while serving: a model loads them before its first pass.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

from prad.lm.errors import ModelError

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
_BUILD_S = 300.0


class BuildError(ModelError):
    """There is no C++ compiler, or it refused the kernels."""


def built(cache_dir: Path) -> Path:
    """The shared library, compiled now if this machine has not yet. Raises BuildError."""
    sources = sorted(p for p in _SOURCES.iterdir() if p.suffix in (".cpp", ".h"))
    known = hashlib.sha256("\0".join((*_FLAGS, _cpu(), *(p.read_text() for p in sources))).encode())
    library = cache_dir.expanduser() / "kernels" / f"{known.hexdigest()[:16]}.so"
    if library.exists():
        return library
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise BuildError("no C++ compiler (g++, or what CXX names)")
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):  # both services may start at once
        if not library.exists():
            _compile(compiler, library)
    return library


def _compile(compiler: str, library: Path) -> None:
    fresh = library.with_suffix(".new")
    command = [compiler, *_FLAGS, str(_SOURCES / "kernels.cpp"), "-o", str(fresh)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} did not build the kernels: {error}") from error
    if done.returncode:
        raise BuildError(f"{compiler} refuses the kernels:\n{done.stderr[-2000:]}")
    fresh.rename(library)


def _cpu() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return platform.machine() + next((line for line in lines if line.startswith("flags")), "")
