"""What a model's KV cache looks like on the wire: per layer, keys and values of so many bytes per token."""

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from kvtransfer.errors import RejectedError, RejectReason
from kvtransfer.proto import handoff_pb2 as pb

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
SCALE_BYTES = 4


class Encoding(IntEnum):
    """How KV bytes are written on the wire; the numbers are the proto's."""

    RAW = 0
    INT8 = 1


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer's keys [tokens, kv_heads, key_dim] and values [tokens, kv_heads, value_dim]."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The adapter-independent KV layout of a frozen model; equal fingerprints mean equal caches.

    Raises ValueError for a dtype that does not travel, or no layers.
    """

    fingerprint: str
    dtype: str
    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV of dtype {self.dtype!r} does not travel (known: {', '.join(ITEM_BYTES)})")
        if not self.layers:
            raise ValueError("a model without layers has no KV cache")

    def key_bytes(self, layer: int) -> int:
        """Bytes of one token's keys in `layer`."""
        spec = self.layers[layer]
        return spec.kv_heads * spec.key_dim * ITEM_BYTES[self.dtype]

    def value_bytes(self, layer: int) -> int:
        """Bytes of one token's values in `layer`."""
        spec = self.layers[layer]
        return spec.kv_heads * spec.value_dim * ITEM_BYTES[self.dtype]

    def plane_bytes(self, layer: int, encoding: Encoding) -> tuple[int, ...]:
        """Bytes of one token in each plane of `layer`, in their order on the wire (see the proto)."""
        if encoding is Encoding.RAW:
            return self.key_bytes(layer), self.value_bytes(layer)
        spec = self.layers[layer]
        scales = spec.kv_heads * SCALE_BYTES
        return spec.kv_heads * spec.key_dim, scales, spec.kv_heads * spec.value_dim, scales

    def layer_bytes(self, layer: int) -> int:
        """Bytes of one token in `layer`, keys and values."""
        return self.key_bytes(layer) + self.value_bytes(layer)

    @property
    def bytes_per_token(self) -> int:
        return sum(self.layer_bytes(layer) for layer in range(len(self.layers)))

    def require_same(self, other: "ModelSpec") -> None:
        """Raises RejectedError (WRONG_MODEL) with both sides' values unless `other` is this model."""
        for what, mine, theirs in (
            ("dtype", self.dtype, other.dtype),
            ("layers", len(self.layers), len(other.layers)),
            ("KV layout", self.layers, other.layers),
            ("fingerprint", self.fingerprint, other.fingerprint),
        ):
            if mine != theirs:
                raise RejectedError(
                    RejectReason.WRONG_MODEL, f"decode has {what} {mine}, the hand-off has {theirs}"
                )

    def to_proto(self) -> pb.ModelSpec:
        return _to_proto(self)

    @classmethod
    def from_proto(cls, message: pb.ModelSpec) -> "ModelSpec":
        return _from_bytes(message.SerializeToString(deterministic=True))


# every Open of a burst names the same model: it is written and read once
@lru_cache(maxsize=8)
def _to_proto(spec: ModelSpec) -> pb.ModelSpec:
    layers = [
        pb.LayerSpec(kv_heads=la.kv_heads, key_dim=la.key_dim, value_dim=la.value_dim) for la in spec.layers
    ]
    return pb.ModelSpec(fingerprint=spec.fingerprint, dtype=spec.dtype, layers=layers)


@lru_cache(maxsize=8)
def _from_bytes(data: bytes) -> ModelSpec:
    message = pb.ModelSpec.FromString(data)
    layers = tuple(LayerSpec(la.kv_heads, la.key_dim, la.value_dim) for la in message.layers)
    return ModelSpec(message.fingerprint, message.dtype, layers)
