"""Which model this is, exactly: both services compute it from the files and the hand-off compares it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prad.core.kv import KVLayout, ModelSpec
from prad.lm.errors import ModelNotFoundError

_IRRELEVANT = frozenset(
    {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "id2label", "label2id"}
)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Architecture (as an adapter must match it), SHA-256 of the weights, SHA-256 of every other setting that
    the forward depends on, and the KV layout computed in."""

    architecture: str
    weights: str
    config: str
    layout: KVLayout

    @property
    def digest(self) -> str:
        """SHA-256 over all parts; equal digests mean interchangeable KV caches."""
        layers = [(la.heads, la.key_dim, la.value_dim) for la in self.layout.layers]
        text = f"{self.architecture}\n{self.weights}\n{self.config}\n{self.layout.dtype}\n{layers}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def spec(self) -> ModelSpec:
        """As the hand-off names the model."""
        return ModelSpec(self.digest, self.layout)


def config_digest(config: Any) -> str:
    """SHA-256 over a transformers configuration, without what does not change the forward."""
    settings = {k: v for k, v in config.to_dict().items() if k not in _IRRELEVANT and not k.startswith("_")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(folder: Path) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, in the order of names.

    How the tensors are spread over files does not matter. Raises ModelNotFoundError if there are none, or a
    file is cut off.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelNotFoundError(f"{folder} holds no .safetensors file (pickled weights are never loaded)")
    where: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                where.update(dict.fromkeys(opened.keys(), file))
        except (OSError, SafetensorError) as error:  # a link to nothing is none either
            raise ModelNotFoundError(f"{file} is not a whole safetensors file: {error}") from error
    digest = hashlib.sha256()
    for name in sorted(where):
        with safe_open(where[name], framework="pt") as opened:
            tensor = opened.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
