"""Shared memory between a prefill and a decode service of one host: made, offered, mapped, never trusted.

Prefill makes a file in /dev/shm and offers its name; decode maps it and shows the nonce that it found there,
which proves that both see the same memory (containers may each have a /dev/shm of their own). Then prefill
removes the name, and nothing is left behind whoever is killed. Until then prefill holds a lock on the file:
a name whose lock is free belongs to a process that died, and the next one removes it.
"""

import fcntl
import mmap
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

FOLDER = Path("/dev/shm")
NONCE_BYTES = 16
LARGEST = 1 << 30

_PREFIX = "prad-kv-"
_NAME = re.compile(_PREFIX + "[0-9a-f]{32}")


class Segment:
    """Prefill's side: `memory` is the whole segment, its first NONCE_BYTES the nonce."""

    def __init__(self, size: int) -> None:
        """Raises OSError if there is no /dev/shm, or not so much room in it."""
        remove_orphans()
        self.name = _PREFIX + secrets.token_hex(16)
        self.size = size
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self._file = os.open(FOLDER / self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(
                self._file, 0, size
            )  # room that is missing is an error here, not a SIGBUS later
            self._map = mmap.mmap(self._file, size)
        except BaseException:
            self.unlink()
            raise
        self.memory = memoryview(self._map)
        self.memory[:NONCE_BYTES] = self.nonce

    def unlink(self) -> None:
        """Removes the name; whoever has mapped it keeps the memory. Twice is once."""
        if self._file >= 0:
            with suppress(FileNotFoundError):
                os.unlink(FOLDER / self.name)
            os.close(self._file)
            self._file = -1

    def close(self) -> None:
        """Gives the memory back."""
        self.unlink()
        self.memory.release()
        self._map.close()


def map_segment(name: str, size: int) -> mmap.mmap:
    """Decode's side: maps what prefill offers.

    Raises OSError if it is not there or may not be opened, ValueError if the name is none of ours, or the
    file is not a plain one of this user and of this size.
    """
    if not _NAME.fullmatch(name):
        raise ValueError("the segment's name is none that a prefill service makes")
    if not NONCE_BYTES < size <= LARGEST:
        raise ValueError(f"a segment of {size} bytes is refused")
    file = os.open(FOLDER / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size != size:
            raise ValueError("the segment is not a plain file of this user, or of another size than offered")
        return mmap.mmap(file, size)
    finally:
        os.close(file)


def remove_orphans() -> None:
    """Removes this user's segments whose makers died before decode had mapped them."""
    for path in FOLDER.glob(_PREFIX + "*"):
        with suppress(OSError):  # someone else's, or gone already
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(file)
