"""One packed prompt pass of many tasks: adapters on prompt rows, the plain model everywhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from prad.adapters import AdaptedSpan, Adapter, PromptAdaptation
from prad.lm import Draw, LanguageModel, PackedBatch, SampleKey, sample
from prad.lm.kv import LayerDone
from prefill_service.generation import PromptRequest


@dataclass(frozen=True, slots=True, eq=False)
class PassItem:
    """A prompt of the pass, with its adapter in memory (None: the plain model). Compared by identity."""

    request: PromptRequest
    adapter: Adapter | None

    @property
    def ids(self) -> tuple[int, ...]:
        return self.request.prompt_ids + self.request.continuation_ids


def run_prompt_pass(
    model: LanguageModel, items: Sequence[PassItem], layer_done: LayerDone | None = None
) -> list[list[Draw]]:
    """Runs all items in one forward; returns each one's first tokens, one per choice.

    `layer_done` gets every layer's keys and values [T, kv_heads, dim], items packed in order.
    """
    sequences = [item.ids for item in items]
    starts = accumulate((len(s) for s in sequences[:-1]), initial=0)
    spans = [
        AdaptedSpan(item.adapter, start, len(item.request.prompt_ids))
        for item, start in zip(items, starts, strict=True)
        if item.adapter is not None
    ]
    batch = PackedBatch.of_sequences(sequences, device=model.device, layer_done=layer_done)
    with torch.inference_mode():
        logits = model.forward(batch, PromptAdaptation(spans, model.device) if spans else None)
        return _first_tokens(logits, [item.request for item in items])


def _first_tokens(logits: Tensor, requests: Sequence[PromptRequest]) -> list[list[Draw]]:
    """logits [prompts, vocab]: every choice of a prompt draws from the same row, under its own key."""
    rows = [row for row, r in enumerate(requests) for _ in range(r.choices)]
    params = [requests[row].sampling for row in rows]
    keys = [SampleKey(r.sampling.seed, r.prompt_index, c, 0) for r in requests for c in range(r.choices)]
    draws = iter(sample(logits[rows], params, keys))
    return [[next(draws) for _ in range(r.choices)] for r in requests]
