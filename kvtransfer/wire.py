"""HandOffFrames on the wire, with KV bytes copied once on their way in and not at all on their way out.

The bytes are protobuf's own, as the proto says: whoever has its generated code reads and writes them, too.
Ours leaves out what a message object costs: a copy of the bytes into it, one for each message around it, and
one as it is serialised; and as many the other way. A message whose last field is long needs none: what stands
before it is serialised without, and its bytes follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvtransfer.proto import handoff_pb2 as pb

_FRAMES = pb.HandOffFrames.DESCRIPTOR.fields_by_name["frames"].number
_KV = pb.HandOffFrame.DESCRIPTOR.fields_by_name["kv"].number
_DATA = pb.KV.DESCRIPTOR.fields_by_name["data"].number
_VARINT, _EIGHT_BYTES, _SIZED = 0, 1, 2  # protobuf's wire types
_MOST_VARINT_BYTES = 10


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame as it came. data: a KV frame's bytes, which are then not in `message`; None for any other."""

    message: pb.HandOffFrame
    data: memoryview | None = None


def with_data(frames: pb.HandOffFrames, kv: pb.KV, chunks: Sequence[memoryview], size: int) -> bytes:
    """`frames` and behind them a KV frame: `kv`, and its bytes, `size` altogether, in pieces."""
    inner = kv.SerializeToString() + _start(_DATA, size)
    frame = _start(_KV, len(inner) + size) + inner
    return b"".join((frames.SerializeToString(), _start(_FRAMES, len(frame) + size), frame, *chunks))


def frames_of(message: bytes) -> list[Frame]:
    """The frames of a HandOffFrames message. Raises protobuf's DecodeError if it is none."""
    whole = memoryview(message)
    found, at = list[Frame](), 0
    try:
        while at < len(whole):
            start, end = _sized(whole, at, _FRAMES)
            found.append(_frame(whole[start:end]))
            at = end
    except _OtherwiseError:
        return [Frame(frame) for frame in pb.HandOffFrames.FromString(message).frames]
    return found


class _OtherwiseError(Exception):
    """Written by somebody else, or no message at all: protobuf's own reader tells which."""


def _frame(written: memoryview) -> Frame:
    try:
        start, end = _sized(written, 0, _KV)
        if end != len(written):
            raise _OtherwiseError
        kv = written[start:end]
        at = _data_start(kv)
    except _OtherwiseError:
        return Frame(pb.HandOffFrame.FromString(written))
    start, end = _sized(kv, at, _DATA)
    head = pb.KV.FromString(kv[:at])
    if head.WhichOneof("payload") is not None:  # of two the last one counts
        return Frame(pb.HandOffFrame.FromString(written))
    return Frame(pb.HandOffFrame(kv=head), kv[start:end])


def _data_start(kv: memoryview) -> int:
    """Where the field of the bytes begins, which is the last one."""
    at = 0
    while at < len(kv):
        key, after = _varint(kv, at)
        number, kind = key >> 3, key & 7
        if kind == _SIZED:
            _, end = _sized(kv, at, number)
            if number == _DATA:
                if end != len(kv):
                    break
                return at
            at = end
        elif kind == _EIGHT_BYTES:
            at = after + 8
        elif kind == _VARINT:
            _, at = _varint(kv, after)
        else:
            break
    raise _OtherwiseError


def _start(number: int, size: int) -> bytes:
    """What stands before a field of `size` bytes."""
    return bytes((*_as_varint(number << 3 | _SIZED), *_as_varint(size)))


def _sized(written: memoryview, at: int, number: int) -> tuple[int, int]:
    """Start and end of what the field of bytes at `at` holds, which must be number `number`."""
    key, at = _varint(written, at)
    size, start = _varint(written, at)
    if key != number << 3 | _SIZED or start + size > len(written):
        raise _OtherwiseError
    return start, start + size


def _varint(written: memoryview, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    value = 0
    for index, byte in enumerate(written[at : at + _MOST_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise _OtherwiseError


def _as_varint(value: int) -> list[int]:
    written = []
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return [*written, value]
