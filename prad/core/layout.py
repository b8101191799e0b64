"""What a model's KV cache looks like, whoever holds it: per layer, keys and values of so many numbers."""

from dataclasses import dataclass

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class LayerKV:
    """What one layer stores per token: `heads` keys of `key_dim` and as many values of `value_dim`."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The adapter-independent KV layout of a model: one `LayerKV` per layer, one dtype, by its name.

    Raises ValueError for a dtype that no KV cache has here, or no layers.
    """

    layers: tuple[LayerKV, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV of dtype {self.dtype!r} is not known (known: {', '.join(ITEM_BYTES)})")
        if not self.layers:
            raise ValueError("a model without layers has no KV cache")

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    def key_bytes(self, layer: int) -> int:
        """Bytes of one token's keys in `layer`."""
        return self.layers[layer].heads * self.layers[layer].key_dim * self.item_bytes

    def value_bytes(self, layer: int) -> int:
        """Bytes of one token's values in `layer`."""
        return self.layers[layer].heads * self.layers[layer].value_dim * self.item_bytes

    @property
    def bytes_per_token(self) -> int:
        return sum(self.key_bytes(layer) + self.value_bytes(layer) for layer in range(len(self.layers)))


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which frozen model, and its layout; equal fingerprints mean interchangeable KV caches."""

    fingerprint: str
    layout: KVLayout

    def difference(self, other: "ModelSpec", own_name: str, other_name: str) -> str | None:
        """What of `other` is not this model's, with both sides' values; None if it is this model."""
        for what, own, theirs in (
            ("dtype", self.layout.dtype, other.layout.dtype),
            ("layers", len(self.layout.layers), len(other.layout.layers)),
            ("KV layout", self.layout.layers, other.layout.layers),
            ("fingerprint", self.fingerprint, other.fingerprint),
        ):
            if own != theirs:
                return f"{own_name} has {what} {own}, {other_name} has {theirs}"
        return None
