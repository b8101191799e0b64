"""The split in one page, for tests: one batch, the prompt pass with an adaptation, every later token without,
but for the request state that the prompt pass left behind; and a beam search without even a cache."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from prad.adapters import Adapter, PromptAdaptation
from prad.core.kv import KVLayout
from prad.core.sampling import SampleKey, SamplingParams
from prad.core.search import Beams, BeamSearch, Candidate, Limits
from prad.lm.attention import decode_attention
from prad.lm.kv import PackedBatch, torch_dtype
from prad.lm.model import LanguageModel
from prad.lm.sampling import likeliest, sample
from prad.lm.sites import Adaptation, RowScaling, SiteVectors


class PromptPassAdaptation(Adaptation, Protocol):
    """What adapters do to a prompt pass, and leave behind for the tokens that follow."""

    def states(self) -> Mapping[int, SiteVectors]:
        """After the pass: the request state that it made, by the first row of the prompt it belongs to."""
        ...


class _PaddedKV:
    """A KV target for decode steps: per layer [B, longest, kv_heads, dim], filled by the prompt pass."""

    def __init__(self, layout: KVLayout, lengths: Sequence[int], longest: int, device: torch.device) -> None:
        size = (len(lengths), longest)
        self._keys, self._values = (
            [
                torch.zeros(*size, la.heads, dim, dtype=torch_dtype(layout), device=device)
                for la, dim in ((la, getattr(la, name)) for la in layout.layers)
            ]
            for name in ("key_dim", "value_dim")
        )
        self._prompts = lengths
        self.lengths = torch.tensor(lengths, device=device)

    def fill(self, layer: int, key: Tensor, value: Tensor) -> None:
        """The prompt pass's `layer_done`: packed [T, kv_heads, dim] goes to each sequence's row."""
        for row, (k, v) in enumerate(
            zip(key.split(self._prompts), value.split(self._prompts), strict=True)  # type: ignore[no-untyped-call]
        ):
            self._keys[layer][row, : len(k)] = k
            self._values[layer][row, : len(v)] = v

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        keys, values = self._keys[layer], self._values[layer]
        rows = torch.arange(len(keys), device=keys.device)
        keys[rows, self.lengths], values[rows, self.lengths] = key, value
        return decode_attention(query, keys, values, self.lengths + 1, scale, window)


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    adapt: Callable[[Sequence[int]], PromptPassAdaptation | None] | None = None,
) -> list[list[int]]:
    """Output ids of every prompt, the stop id left out.

    `adapt` makes the prompt pass's adaptation from the prompt lengths; None is the plain model.
    """
    lengths = [len(p) for p in prompts]
    kv = _PaddedKV(model.layout, lengths, max(lengths) + params.max_tokens, model.device)
    batch = PackedBatch.of_sequences(prompts, device=model.device, layer_done=kv.fill)
    every = torch.arange(len(prompts), device=model.device)
    outputs: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    with torch.inference_mode():
        adaptation = adapt(lengths) if adapt is not None else None
        logits = model.forward(batch, adaptation)
        states = adaptation.states() if adaptation is not None else {}
        scaling = RowScaling.of([states.get(start) for start in accumulate(lengths[:-1], initial=0)])
        for step in range(params.max_tokens):
            keys = [SampleKey(params.seed, i, 0, step) for i in range(len(prompts))]
            tokens = [d.id for d in sample(logits, [params] * len(prompts), keys)]
            for row in list(running):
                reason = params.finish_reason(tokens[row], step + 1)
                if reason != "stop":
                    outputs[row].append(tokens[row])
                if reason is not None:
                    running.discard(row)
            if not running:
                break
            ids = torch.tensor(tokens, device=model.device)
            logits = model.forward(PackedBatch(ids, kv.lengths, kv, every), scaling)
            kv.lengths = kv.lengths + 1
    return outputs


LogitsOf = Callable[[Sequence[Sequence[int]]], Tensor]
"""Of sequences, each of which is computed from its first token on: those behind its last one, [B, vocab]."""


def recomputing(model: LanguageModel, adapted: int = 0, adapter: Adapter | None = None) -> LogitsOf:
    """The first `adapted` tokens of each sequence are the adapter's."""

    def logits_of(sequences: Sequence[Sequence[int]]) -> Tensor:
        count, lengths = len(sequences), [len(ids) for ids in sequences]
        adaptation = PromptAdaptation.of_prompts([adapter] * count, lengths, [adapted] * count, model.device)
        with torch.inference_mode():
            return model.forward(PackedBatch.of_sequences(sequences, device=model.device), adaptation)

    return logits_of


def search(logits_of: LogitsOf, prompt: Sequence[int], limits: Limits, beams: Beams) -> BeamSearch:
    """A beam search without any cache."""
    found, rows = BeamSearch(limits, beams), [tuple[int, ...]()]
    while rows:
        logprobs = torch.log_softmax(logits_of([[*prompt, *row] for row in rows]), dim=-1)
        shown = likeliest(logprobs, beams.candidates(limits.stop_ids))
        children = found.advance([[Candidate(*pair) for pair in row] for row in shown])
        rows = [(*rows[child.parent], child.token) for child in children]
    return found
