"""What a model's KV cache looks like on the wire: per layer its planes, of so many bytes per token."""

from enum import IntEnum
from functools import lru_cache

from kvtransfer.errors import RejectedError, RejectReason
from kvtransfer.proto import handoff_pb2 as pb
from prad.core.layout import KVLayout, LayerKV, ModelSpec

SCALE_BYTES = 4


class Encoding(IntEnum):
    """How KV bytes are written on the wire; the numbers are the proto's."""

    RAW = 0
    INT8 = 1


def plane_bytes(layout: KVLayout, layer: int, encoding: Encoding) -> tuple[int, ...]:
    """Bytes of one token in each plane of `layer`, in their order on the wire (see the proto)."""
    if encoding is Encoding.RAW:
        return layout.key_bytes(layer), layout.value_bytes(layer)
    kept = layout.layers[layer]
    scales = kept.heads * SCALE_BYTES
    return kept.heads * kept.key_dim, scales, kept.heads * kept.value_dim, scales


def require_same(decode: ModelSpec, hand_off: ModelSpec) -> None:
    """Raises RejectedError (WRONG_MODEL) with both sides' values unless they are one model."""
    difference = decode.difference(hand_off, "decode", "the hand-off")
    if difference is not None:
        raise RejectedError(RejectReason.WRONG_MODEL, difference)


# every Open of a burst names the same model: it is written and read once
@lru_cache(maxsize=8)
def spec_to_proto(spec: ModelSpec) -> pb.ModelSpec:
    layers = [
        pb.LayerSpec(kv_heads=la.heads, key_dim=la.key_dim, value_dim=la.value_dim)
        for la in spec.layout.layers
    ]
    return pb.ModelSpec(fingerprint=spec.fingerprint, dtype=spec.layout.dtype, layers=layers)


def spec_from_proto(message: pb.ModelSpec) -> ModelSpec:
    """Raises ValueError for an unknown dtype, or no layers."""
    return _from_bytes(message.SerializeToString(deterministic=True))


@lru_cache(maxsize=8)
def _from_bytes(data: bytes) -> ModelSpec:
    message = pb.ModelSpec.FromString(data)
    layers = tuple(LayerKV(la.kv_heads, la.key_dim, la.value_dim) for la in message.layers)
    return ModelSpec(message.fingerprint, KVLayout(layers, message.dtype))
