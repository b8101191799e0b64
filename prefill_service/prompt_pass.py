"""One packed prompt pass of many tasks: adapters on prompt rows, the plain model everywhere else."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prad.adapters import Adapter, PromptAdaptation
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
) -> list[list[Draw] | None]:
    """Runs all items in one forward; returns each one's first tokens, one per choice.

    None for an item whose logits are not finite: a broken adapter spoils its own request only.
    `layer_done` gets every layer's keys and values [T, kv_heads, dim], items packed in order.
    """
    sequences = [item.ids for item in items]
    adaptation = PromptAdaptation.of_prompts(
        [item.adapter for item in items],
        [len(s) for s in sequences],
        [len(item.request.prompt_ids) for item in items],
        model.device,
    )
    batch = PackedBatch.of_sequences(sequences, device=model.device, layer_done=layer_done)
    with torch.inference_mode():
        logits = model.forward(batch, adaptation)
        sound = torch.isfinite(logits).all(dim=-1).tolist()
        return [
            _first_tokens(model, row, item.request) if ok else None
            for row, item, ok in zip(logits, items, sound, strict=True)
        ]


def _first_tokens(model: LanguageModel, row: Tensor, request: PromptRequest) -> list[Draw]:
    """row [vocab]: every choice draws from it, under its own key."""
    keys = [
        SampleKey(request.sampling.seed, request.prompt_index, choice, request.output_offset)
        for choice in range(request.choices)
    ]
    return sample(row.expand(len(keys), -1), [request.sampling] * len(keys), keys, model.argmax)
