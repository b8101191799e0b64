"""What an artefact puts in front of a prompt, for the reference: as PEFT has it."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Front:
    """vectors [n, width], in the place of embeddings; or states, per layer keys and values
    [1, kv_heads, n, dim] that the cache holds from the beginning."""

    vectors: Tensor | None = None
    states: tuple[tuple[Tensor, Tensor], ...] = ()

    @classmethod
    def of(cls, folder: Path | None) -> "Front":
        stored = {} if folder is None else load_file(folder / "adapter_model.safetensors")
        if "input.embedding" in stored:
            return cls(vectors=stored["input.embedding"].float())
        layers = sum(name.endswith("prefix.key") for name in stored)
        names = [(f"layers.{i}.prefix.key", f"layers.{i}.prefix.value") for i in range(layers)]
        return cls(states=tuple((_cached(stored[k]), _cached(stored[v])) for k, v in names))

    @property
    def tokens(self) -> int:
        if self.vectors is not None:
            return len(self.vectors)
        return self.states[0][0].shape[2] if self.states else 0

    def without_last(self) -> "Front":
        if self.vectors is not None:
            return Front(vectors=self.vectors[:-1])
        return Front(states=tuple((key[:, :, :-1], value[:, :, :-1]) for key, value in self.states))


def _cached(states: Tensor) -> Tensor:
    """[n, kv_heads, dim] as transformers caches it."""
    return states.float().transpose(0, 1)[None]
