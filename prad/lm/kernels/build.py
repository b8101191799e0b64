"""Builds the kernels once for this machine's CPU, and keeps them; of others, what was used last.

Nothing here runs while serving: a model loads them before its first pass.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from prad.lm.errors import ModelError

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
_BUILD_S = 300.0

DEFAULT_KEPT_BYTES = 64 << 20
_FRESH_S = 3600.0
"""What was used so lately may be on its way into another process, and is left alone."""


class BuildError(ModelError):
    """There is no C++ compiler, or it refused the kernels."""


def built(cache_dir: Path, kept_bytes: int = DEFAULT_KEPT_BYTES) -> Path:
    """The shared library, compiled now if this machine has not yet. Raises BuildError.

    Those of other sources, flags or processors stay beside it, `kept_bytes` of them.
    """
    sources = sorted(p for p in _SOURCES.iterdir() if p.suffix in (".cpp", ".h"))
    known = hashlib.sha256(
        "\0".join((*_FLAGS, _cpu(), *(p.read_text(encoding="utf-8") for p in sources))).encode()
    )
    library = cache_dir.expanduser() / "kernels" / f"{known.hexdigest()[:16]}.so"
    try:
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(library.parent)
        if library.exists():
            _require_own(library)
        else:
            _built_once(library)
        _sweep(library, kept_bytes)
        return library
    except OSError as error:
        raise BuildError(f"the kernels cannot be kept in {library.parent}: {error}") from error


def _built_once(library: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise BuildError("no C++ compiler (g++, or what CXX names)")
    with FileLock(library.with_suffix(".lock")):  # both services may start at once
        if not library.exists():
            _compile(compiler, library)


def _sweep(used: Path, kept_bytes: int) -> None:
    """Removes what was not used for longest. A process that has loaded a library keeps it all the same."""
    with suppress(OSError):  # somebody else's folder, or another sweep at the same time
        os.utime(used)
        now = used.stat().st_mtime  # by the clock of where the files are, which may be another host's
        files = {path: path.stat() for path in used.parent.iterdir() if path.stem != used.stem}
        left = sum(found.st_size for path, found in files.items() if path.suffix == ".so")
        for path, found in sorted(files.items(), key=lambda entry: entry[1].st_mtime):
            if now - found.st_mtime < _FRESH_S:
                break
            if path.suffix == ".new":  # of a compiler that was killed
                path.unlink(missing_ok=True)
            elif path.suffix == ".so" and left > kept_bytes:
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)
                left -= found.st_size


def _require_own(path: Path) -> None:
    """What is loaded is executed: nobody else may have written it."""
    found = path.stat()
    if found.st_uid not in (0, os.getuid()) or found.st_mode & 0o022:
        raise BuildError(f"{path} can be written by other users of this machine")


def _compile(compiler: str, library: Path) -> None:
    fresh = library.with_suffix(".new")
    command = [compiler, *_FLAGS, str(_SOURCES / "kernels.cpp"), "-o", str(fresh)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=_BUILD_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} did not build the kernels: {error}") from error
    if done.returncode:
        raise BuildError(f"{compiler} refuses the kernels:\n{done.stderr[-2000:]}")
    fresh.rename(library)


def _cpu() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return platform.machine() + next((line for line in lines if line.startswith("flags")), "")
