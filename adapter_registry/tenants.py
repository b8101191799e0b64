"""Who uses what in a folder that processes share: each says so in a file that it keeps locked while it lives.

    <folder>/lock      held while somebody says what it uses, or looks at what nobody does
    <folder>/<id>      one process: the names that it uses, a line each

The lock of a process ends with it, however it ends: what it used, and what it left half-done under its id,
is then nobody's.
"""

import fcntl
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

_LOOK_S = 0.002
"""How often it is tried to be alone: others are so for a moment, and requests wait behind it."""


class Tenant:
    """This process, among those that share `folder`. Raises OSError if that cannot be written."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.id = uuid.uuid4().hex
        self._folder = folder
        self._lock = FileLock(folder / "lock", thread_local=False)
        with self._lock:
            self._own = os.open(folder / self.id, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._own, fcntl.LOCK_EX)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else says or looks inside: keep it short."""
        with self._lock.acquire(poll_interval=_LOOK_S):
            yield

    def say(self, names: Iterable[str]) -> None:
        """What this process uses, from now on. To be called `alone`."""
        text = "".join(f"{name}\n" for name in sorted(names)).encode()
        os.ftruncate(self._own, 0)
        os.pwrite(self._own, text, 0)

    def add(self, name: str) -> None:
        """It uses that as well. To be called `alone`."""
        os.lseek(self._own, 0, os.SEEK_END)
        os.write(self._own, f"{name}\n".encode())

    def living(self) -> dict[str, frozenset[str]]:
        """What each process that lives uses, by its id; the dead are forgotten. To be called `alone`."""
        found = {}
        for path in self._folder.iterdir():
            if path.name == "lock":
                continue
            if path.name != self.id and _dead(path):
                path.unlink(missing_ok=True)
            else:
                found[path.name] = frozenset(path.read_bytes().decode().split())
        return found

    def close(self) -> None:
        with suppress(OSError), self._lock:
            (self._folder / self.id).unlink(missing_ok=True)
        os.close(self._own)


def _dead(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
