"""KV bytes in frames: one frame carries rows of a prompt pass for a range of layers, with a checksum.

Rows of one pass may belong to many hand-offs. They lie packed, as in the pass: per layer its planes (keys and
values, or their coded form), each plane [tokens of all rows, bytes per token]. So the cost of a frame does
not grow with the number of hand-offs, and decode writes a plane in one piece. Short prompts share a frame
among layers, too; a layer of a long pass is cut into token ranges.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import xxhash

from kvtransfer import codec
from kvtransfer.errors import CorruptError, ProtocolError
from kvtransfer.proto import handoff_pb2 as pb
from prad.core.kv import KVLayout, ModelSpec

KVBytes = bytes | bytearray | memoryview

_SCALE_BYTES = 4


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

    def inline(self) -> pb.KV:
        """The frame with its bytes inside."""
        data = b"".join(self.chunks)
        frame = self._head(data)
        frame.data = data
        return frame

    def placed(self, memory: memoryview, offset: int) -> pb.KV:
        """The frame with its bytes written to memory[offset : offset + size]."""
        at = offset
        for chunk in self.chunks:
            memory[at : at + len(chunk)] = chunk
            at += len(chunk)
        frame = self._head(memory[offset:at])
        frame.place.offset, frame.place.size = offset, self.size
        return frame

    def _head(self, payload: KVBytes) -> pb.KV:
        return pb.KV(
            first_layer=self.first_layer,
            layer_count=self.layer_count,
            rows=map(codec.encode, self.rows),
            encoding=pb.Encoding.ValueType(self.encoding),
            checksum=xxhash.xxh3_64_intdigest(payload),
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


def decode(frame: pb.KV, model: ModelSpec, segment: memoryview | None = None) -> Incoming:
    """Checks a frame and opens it.

    Raises CorruptError if the ranges are not the model's, the size does not follow from them, the place lies
    outside the segment or the checksum differs; ProtocolError for an unknown encoding, or a place where there
    is no segment.
    """
    first, last = frame.first_layer, frame.first_layer + frame.layer_count
    rows = tuple(codec.decode(Rows, r) for r in frame.rows)
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
    payload = _payload(frame, segment)
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
