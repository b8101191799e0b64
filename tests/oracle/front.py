"""For the reference: what an artefact puts in front of a prompt, as PEFT has it, and its task tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Front:
    """vectors [n, width], in the place of embeddings; or states, per layer keys and values
    [1, kv_heads, n, dim] that the cache holds from the beginning. named: what task tokens are [width]."""

    vectors: Tensor | None = None
    states: tuple[tuple[Tensor, Tensor], ...] = ()
    named: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path | None) -> "Front":
        if folder is None:
            return cls()
        stored = load_file(folder / "adapter_model.safetensors")
        names = json.loads((folder / "prad.json").read_text(encoding="utf-8")).get("task_tokens", ())
        named = dict(zip(names, stored.get("input.task_tokens", ()), strict=True))
        if "input.embedding" in stored:
            return cls(vectors=stored["input.embedding"].float(), named=named)
        layers = sum(name.endswith("prefix.key") for name in stored)
        pairs = [(f"layers.{i}.prefix.key", f"layers.{i}.prefix.value") for i in range(layers)]
        states = tuple((_cached(stored[k]), _cached(stored[v])) for k, v in pairs)
        return cls(states=states, named=named)

    @property
    def tokens(self) -> int:
        if self.vectors is not None:
            return len(self.vectors)
        return self.states[0][0].shape[2] if self.states else 0

    def without_last(self) -> "Front":
        if self.vectors is not None:
            return replace(self, vectors=self.vectors[:-1])
        return replace(self, states=tuple((key[:, :, :-1], value[:, :, :-1]) for key, value in self.states))

    def embedded(self, prompt: Sequence[int | str], embedding: torch.nn.Module) -> Tensor:
        """[len(prompt), width] of ids and task tokens."""
        every: Tensor = embedding(torch.tensor([0 if isinstance(i, str) else i for i in prompt]))
        for row, token in enumerate(prompt):
            if isinstance(token, str):
                every[row] = self.named[token]
        return every


def _cached(states: Tensor) -> Tensor:
    """[n, kv_heads, dim] as transformers caches it."""
    return states.float().transpose(0, 1)[None]
