"""The kernels' library for this machine's CPU: as it was installed, or built once and kept.

Nothing here runs while serving: a model loads them before its first pass.
"""

import hashlib
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from prad.lm.errors import ModelError
from prad.lm.kernels.cpus import (
    FLAGS,
    SOURCES,
    CompileError,
    carried,
    compile_kernels,
    compiler,
    instructions,
)

_NATIVE = ("-march=native",)

DEFAULT_KEPT_BYTES = 64 << 20
_FRESH_S = 3600.0
"""What was used so lately may be on its way into another process, and is left alone."""


class BuildError(ModelError):
    """There is no C++ compiler, or it refused the kernels."""


def installed() -> Path | None:
    """The shared library that was installed with us for this CPU. None if CXX or CXXFLAGS ask for another."""
    if "CXX" in os.environ or "CXXFLAGS" in os.environ:
        return None
    return carried(instructions())


def built(cache_dir: Path, kept_bytes: int = DEFAULT_KEPT_BYTES) -> Path:
    """The shared library, compiled now if this machine has not yet; CXX names the compiler, CXXFLAGS more of
    its flags. Raises BuildError.

    Those of other sources, flags or processors stay beside it, `kept_bytes` of them.
    """
    library = place(cache_dir)
    try:
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_own(library.parent)
        if library.exists():
            require_own(library)
        else:
            _built_once(library, _flags())
        _sweep(library, kept_bytes)
        return library
    except OSError as error:
        raise BuildError(f"the kernels cannot be kept in {library.parent}: {error}") from error


def place(cache_dir: Path) -> Path:
    """Where the library for this CPU, of these sources and flags, is once it is compiled."""
    sources = sorted(p for p in SOURCES.iterdir() if p.suffix in (".cpp", ".h"))
    made_by = (*FLAGS, *_flags(), platform.machine(), *instructions())
    known = hashlib.sha256("\0".join((*made_by, *(p.read_text(encoding="utf-8") for p in sources))).encode())
    return cache_dir.expanduser() / "kernels" / f"{known.hexdigest()[:16]}.so"


def _flags() -> tuple[str, ...]:
    return (*_NATIVE, *os.environ.get("CXXFLAGS", "").split())


def _built_once(library: Path, flags: Sequence[str]) -> None:
    try:
        found = compiler()
        with FileLock(library.with_suffix(".lock")):  # both services may start at once
            if not library.exists():
                fresh = library.with_suffix(".new")
                compile_kernels(found, flags, fresh)
                fresh.rename(library)
    except CompileError as error:
        raise BuildError(str(error)) from error


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


def require_own(path: Path) -> None:
    """What is loaded is executed, or decides what a model says: nobody else may have written it. Raises
    OSError."""
    found = path.stat()
    if found.st_uid not in (0, os.getuid()) or found.st_mode & 0o022:
        raise PermissionError(
            f"{path} can be written by other users of this machine: chmod go-w, or remove it"
        )
