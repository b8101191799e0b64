"""Where the bytes of KV frames lie: shared memory between a prefill and a decode service of one host, and
what malloc keeps of the rest.

Shared memory is made, offered, mapped, never trusted. Prefill makes a file in /dev/shm and offers its name;
decode maps it and shows the nonce that it found there, which proves that both see the same memory (containers
may each have a /dev/shm of their own). Then prefill removes the name, and nothing is left behind whoever is
killed. Until then prefill holds a lock on the file: a name whose lock is free belongs to a process that died,
and the next one removes it. Places within it are taken and come free in a ring.
"""

import asyncio
import ctypes
import fcntl
import logging
import mmap
import os
import re
import secrets
import stat
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Self

from kvtransfer.errors import ProtocolError
from kvtransfer.frames import Outgoing
from kvtransfer.proto import handoff_pb2 as pb

logger = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")
NONCE_BYTES = 16
LARGEST = 1 << 30

_PREFIX = "prad-kv-"
_NAME = re.compile(_PREFIX + "[0-9a-f]{32}")
_ALIGN = 64  # bytes: a tensor library may read any place as any number type
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20


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


class Ring:
    """Places in bytes first .. end of a segment, taken in a ring and freed in the order they were taken; pure
    arithmetic."""

    def __init__(self, first: int, end: int) -> None:
        self._first = -(-first // _ALIGN) * _ALIGN
        self._end = end
        self._next = self._first
        self._taken: deque[int] = deque()  # offsets, oldest first

    @property
    def largest(self) -> int:
        """What fits at most, when nothing is taken."""
        return max(0, self._end - self._first)

    def take(self, size: int) -> int | None:
        """The offset of `size` free bytes, None if there are none now."""
        if not self._taken:
            self._next = self._first  # the same few pages again: they are warm
        oldest = self._taken[0] if self._taken else None
        if oldest is None or self._next > oldest:
            if self._next + size <= self._end:
                return self._take(self._next, size)
            if oldest is None or self._first + size > oldest:
                return None
            return self._take(self._first, size)
        return self._take(self._next, size) if self._next + size <= oldest else None

    def free_oldest(self, count: int) -> None:
        """Raises ValueError for more than are taken."""
        if count > len(self._taken):
            raise ValueError(f"{count} places come free, {len(self._taken)} are taken")
        for _ in range(count):
            self._taken.popleft()

    def _take(self, offset: int, size: int) -> int:
        self._taken.append(offset)
        self._next = -(-(offset + size) // _ALIGN) * _ALIGN
        return offset


class SharedPayload:
    """Prefill's side, from the offer to the last place that comes free.

    Used once decode has confirmed it; until then, and for frames that never fit, bytes go inline.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._ring = Ring(NONCE_BYTES, segment.size)
        self._confirmed = False
        self._freed = asyncio.Event()

    @classmethod
    def offered(cls, size: int) -> Self | None:
        """None if it is switched off (size 0) or this host has no shared memory to give."""
        if size == 0:
            return None
        try:
            return cls(Segment(size))
        except OSError as error:
            logger.info("no shared memory for the hand-off (%s): KV travels in messages", error)
            return None

    def offer(self) -> pb.Segment:
        return pb.Segment(name=self._segment.name, size=self._segment.size)

    def confirm(self, nonce: bytes) -> bool:
        """Decode's answer; False if it does not see this memory. The name is needed no longer."""
        self._confirmed = nonce == self._segment.nonce
        self._segment.unlink()
        logger.info("KV travels %s", "through shared memory" if self._confirmed else "in messages")
        return self._confirmed

    async def place(self, frame: Outgoing) -> pb.KV:
        """The frame, its bytes in shared memory if they may. Waits for places that come free."""
        if not self._confirmed or frame.size > self._ring.largest:
            return frame.inline()
        while (offset := self._ring.take(frame.size)) is None:
            self._freed.clear()
            await self._freed.wait()
        return frame.placed(self._segment.memory, offset)

    def free(self, frames: int) -> None:
        """Decode has taken the oldest frames. Raises ProtocolError if there are not so many."""
        try:
            self._ring.free_oldest(frames)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        self._freed.set()

    def close(self) -> None:
        self._segment.close()


def keep_freed_memory(nbytes: int = 256 << 20) -> None:
    """Lets malloc keep up to about `nbytes` that are free, in this process, from now on.

    By itself glibc gives the memory of each KV frame back to the system and takes it anew for the next, page
    by page: with frames of megabytes that was more than half of a sender's CPU time. No effect with another
    libc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_TRIM_THRESHOLD, nbytes)
