"""KV bytes in frames: one frame carries a token range of a layer range, with a checksum over all of it.

Prompts are often short, and a message per layer would drown in gRPC's cost per message, so the sender
coalesces layers; a long prompt's layer is cut into token ranges instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from kvtransfer.errors import CorruptError
from kvtransfer.layout import ModelSpec
from kvtransfer.proto import handoff_pb2 as pb

KVBytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class LayerSlice:
    """Keys and values of tokens first_token .. first_token + token_count of one layer, as raw bytes.

    key [token_count, kv_heads, key_dim], value [token_count, kv_heads, value_dim], little endian; both
    writable, so that a tensor library may wrap them.
    """

    layer: int
    first_token: int
    token_count: int
    key: memoryview
    value: memoryview


def encode(
    first_layer: int, layers: Sequence[tuple[KVBytes, KVBytes]], first_token: int, token_count: int
) -> pb.KV:
    """A frame of consecutive layers' (key, value) bytes, all of the same token range; C-contiguous."""
    data = b"".join(part for layer in layers for part in layer)
    return pb.KV(
        first_layer=first_layer,
        layer_count=len(layers),
        first_token=first_token,
        token_count=token_count,
        data=data,
        checksum=xxhash.xxh3_64_intdigest(data),
    )


def decode(frame: pb.KV, model: ModelSpec) -> Iterator[LayerSlice]:
    """The frame's layers, in order.

    Raises CorruptError, before anything is yielded, if the layer range is not the model's, the size does
    not follow from the ranges, or the checksum differs.
    """
    data = bytearray(frame.data)
    last = frame.first_layer + frame.layer_count
    if frame.layer_count == 0 or frame.token_count == 0 or last > len(model.layers):
        raise CorruptError(
            f"a KV frame names layers {frame.first_layer}..{last} of {len(model.layers)} "
            f"and {frame.token_count} tokens"
        )
    expected = frame.token_count * sum(model.layer_bytes(la) for la in range(frame.first_layer, last))
    if len(data) != expected:
        raise CorruptError(f"a KV frame has {len(data)} bytes, its ranges make {expected}")
    if xxhash.xxh3_64_intdigest(data) != frame.checksum:
        raise CorruptError(f"the checksum of the KV frame of layers {frame.first_layer}..{last} differs")
    return _slices(frame, memoryview(data), model)


def _slices(frame: pb.KV, data: memoryview, model: ModelSpec) -> Iterator[LayerSlice]:
    at = 0
    for layer in range(frame.first_layer, frame.first_layer + frame.layer_count):
        middle = at + frame.token_count * model.key_bytes(layer)
        end = middle + frame.token_count * model.value_bytes(layer)
        yield LayerSlice(layer, frame.first_token, frame.token_count, data[at:middle], data[middle:end])
        at = end
