"""How KV bytes travel: in frames, each with rows of a prompt pass for a range of layers and a checksum; on
one host in shared memory, where the frame only says where.

Rows of one pass may belong to many hand-offs. They lie packed, as in the pass: per layer its planes (keys and
values, or their coded form), each plane [tokens of all rows, bytes per token]. So the cost of a frame does
not grow with the number of hand-offs, and decode writes a plane in one piece. Short prompts share a frame
among layers, too; a layer of a long pass is cut into token ranges.

Shared memory is made, offered, mapped, never trusted. Prefill makes a file that has no name and offers its
place among its own open files; decode maps it and shows the nonce that it found there, which proves that both
see the same memory (containers may each have process numbers of their own). Then prefill closes the file:
nothing is left behind whoever is killed. The file is sealed: nobody can make it shorter, which would kill
whoever reads behind its end. Places within it are taken and come free in a ring.
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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, Self, TypeVar

import xxhash

from kvtransfer.errors import CorruptError, ProtocolError
from kvtransfer.messages import decode, encode
from kvtransfer.proto import handoff_pb2 as pb
from prad.core.kv import KVLayout, ModelSpec

logger = logging.getLogger(__name__)

KVBytes = bytes | bytearray | memoryview

W = TypeVar("W")

NONCE_BYTES = 16
LARGEST = 1 << 30

_SCALE_BYTES = 4
_NAME = re.compile("/proc/[0-9]{1,10}/fd/[0-9]{1,10}")
_ALIGN = 64  # bytes: a tensor library may read any place as any number type
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20


class Encoding(IntEnum):
    """How KV bytes are written on the wire; the numbers are the proto's."""

    RAW = 0
    INT8 = 1


def plane_bytes(layout: KVLayout, layer: int, encoding: Encoding) -> tuple[int, ...]:
    """Bytes of one token in each plane of `layer`, in their order on the wire (see the proto)."""
    if encoding is Encoding.RAW:
        return layout.key_bytes(layer), layout.value_bytes(layer)
    kept = layout.layers[layer]
    scales = kept.heads * _SCALE_BYTES
    return kept.heads * kept.key_dim, scales, kept.heads * kept.value_dim, scales


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens first_token .. first_token + token_count of a hand-off's KV cache."""

    hand_off: int
    first_token: int
    token_count: int


@dataclass(frozen=True, slots=True)
class PlacedRows(Generic[W]):
    """Rows start .. start + token_count of a pass, or of a KV frame, are tokens first_token .. of `whose`: to
    prefill a stream and a hand-off's number on it, on the stream that number, at decode where they go."""

    whose: W
    start: int
    first_token: int
    token_count: int


@dataclass(slots=True)
class Outgoing:
    """A frame that is being filled: consecutive layers of the same rows. `chunks` are views, not copies."""

    first_layer: int
    rows: tuple[Rows, ...]
    encoding: Encoding
    layer_count: int = 0
    size: int = 0
    chunks: list[memoryview] = field(default_factory=list)

    def goes_on_with(self, layer: int, rows: tuple[Rows, ...], encoding: Encoding) -> bool:
        return (layer, rows, encoding) == (self.first_layer + self.layer_count, self.rows, self.encoding)

    def add(self, chunks: Sequence[memoryview]) -> None:
        """One more layer: its planes, in order, each in any number of pieces."""
        self.chunks += chunks
        self.size += sum(map(len, chunks))
        self.layer_count += 1

    def head(self) -> pb.KV:
        """The frame without its bytes, which go behind it (messages.py)."""
        return self._head(self.chunks)

    def placed(self, memory: memoryview, offset: int) -> pb.KV:
        """The frame with its bytes written to memory[offset : offset + size]."""
        at = offset
        for chunk in self.chunks:
            memory[at : at + len(chunk)] = chunk
            at += len(chunk)
        frame = self._head((memory[offset:at],))
        frame.place.offset, frame.place.size = offset, self.size
        return frame

    def _head(self, payload: Iterable[KVBytes]) -> pb.KV:
        checksum = xxhash.xxh3_64()
        for part in payload:
            checksum.update(part)
        return pb.KV(
            first_layer=self.first_layer,
            layer_count=self.layer_count,
            rows=map(encode, self.rows),
            encoding=pb.Encoding.ValueType(self.encoding),
            checksum=checksum.intdigest(),
        )


@dataclass(frozen=True, slots=True)
class Incoming:
    """A frame whose sizes and checksum are right: layers[i] has the planes of layer first_layer + i.

    token_bytes: of one token in all of these layers. The planes are views, perhaps read-only, and perhaps of
    memory that is overwritten later.
    """

    first_layer: int
    rows: tuple[Rows, ...]
    encoding: Encoding
    token_bytes: int
    layers: tuple[tuple[memoryview, ...], ...]


def unpack(
    frame: pb.KV, model: ModelSpec, segment: memoryview | None = None, data: memoryview | None = None
) -> Incoming:
    """Checks a frame and opens it. data: its bytes, if they are not in it.

    Raises CorruptError if the ranges are not the model's, the size does not follow from them, the place lies
    outside the segment or the checksum differs; ProtocolError for an unknown encoding, or a place where there
    is no segment.
    """
    first, last = frame.first_layer, frame.first_layer + frame.layer_count
    rows = tuple(decode(Rows, r) for r in frame.rows)
    count = len(model.layout.layers)
    if first >= last or last > count or not all(r.token_count for r in rows):
        raise CorruptError(f"a KV frame names layers {first}..{last} of {count}, or no tokens")
    try:
        encoding = Encoding(frame.encoding)
    except ValueError as error:
        raise ProtocolError(f"a KV frame has the unknown encoding {frame.encoding}") from error
    tokens = sum(r.token_count for r in rows)
    widths = [plane_bytes(model.layout, layer, encoding) for layer in range(first, last)]
    token_bytes = sum(map(sum, widths))
    expected = tokens * token_bytes
    payload = _payload(frame, segment) if data is None else data
    if len(payload) != expected:
        raise CorruptError(f"a KV frame has {len(payload)} bytes, its ranges make {expected}")
    if xxhash.xxh3_64_intdigest(payload) != frame.checksum:
        raise CorruptError(f"the checksum of the KV frame of layers {first}..{last} differs")
    at, layers = 0, []
    for planes in widths:
        views = []
        for width in planes:
            views.append(payload[at : at + tokens * width])
            at += tokens * width
        layers.append(tuple(views))
    return Incoming(first, rows, encoding, token_bytes, tuple(layers))


def _payload(frame: pb.KV, segment: memoryview | None) -> memoryview:
    if frame.WhichOneof("payload") != "place":
        return memoryview(frame.data)
    if segment is None:
        raise ProtocolError("a KV frame lies in shared memory, but none is mapped")
    start, end = frame.place.offset, frame.place.offset + frame.place.size
    if end > len(segment):
        raise CorruptError(f"a KV frame lies at {start}..{end} of {len(segment)} bytes of shared memory")
    return segment[start:end]


class Segment:
    """Prefill's side: `memory` is the whole segment, its first NONCE_BYTES the nonce; `name` is where decode
    finds it, until `close_file`."""

    def __init__(self, size: int) -> None:
        """Raises OSError if this system has no such files, or not so much memory."""
        if not hasattr(os, "memfd_create"):
            raise OSError("this system makes no sealed files in memory")
        self.size = size
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self._file = os.memfd_create("prad-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.name = f"/proc/{os.getpid()}/fd/{self._file}"
        try:
            # memory that is missing is an error here, not a SIGBUS later
            os.posix_fallocate(self._file, 0, size)
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, _seals() | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(self._file, size)
        except BaseException:
            self.close_file()
            raise
        self.memory = memoryview(self._map)
        self.memory[:NONCE_BYTES] = self.nonce

    def close_file(self) -> None:
        """Closes the file; whoever has mapped it keeps the memory. Twice is once."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def close(self) -> None:
        """Gives the memory back."""
        self.close_file()
        self.memory.release()
        self._map.close()


def map_segment(name: str, size: int) -> mmap.mmap:
    """Decode's side: maps what prefill offers.

    Raises OSError if it is not there or may not be opened, ValueError if the name is none of ours, or the
    file is not a sealed one of this user and of this size.
    """
    if not _NAME.fullmatch(name):
        raise ValueError("the segment's name is none that a prefill service makes")
    if not NONCE_BYTES < size <= LARGEST:
        raise ValueError(f"a segment of {size} bytes is refused")
    # whatever else may be open there: opening it neither waits nor makes it this process's terminal
    file = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size != size:
            raise ValueError("the segment is not a plain file of this user, or of another size than offered")
        if fcntl.fcntl(file, fcntl.F_GET_SEALS) & _seals() != _seals():
            raise ValueError("the segment's file is not sealed: it could be cut while it is read")
        return mmap.mmap(file, size)
    finally:
        os.close(file)


def _seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


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
        """None if it is switched off (size 0) or this system has no such memory to give."""
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
        """Decode's answer; False if it does not see this memory. Its file is needed no longer."""
        self._confirmed = nonce == self._segment.nonce
        self._segment.close_file()
        logger.info("KV travels %s", "through shared memory" if self._confirmed else "in messages")
        return self._confirmed

    async def place(self, frame: Outgoing) -> pb.KV | None:
        """The frame, its bytes in shared memory; None if they may not go there. Waits for places that come
        free."""
        if not self._confirmed or frame.size > self._ring.largest:
            return None
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
