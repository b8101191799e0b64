"""One packed prompt pass of many tasks: adapters on prompt rows, the plain model everywhere else."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from prad.adapters import PromptAdaptation, split_task_tokens
from prad.core.kv import Chunk
from prad.core.sampling import SampleKey, Token
from prad.lm import LanguageModel, SiteVectors, sample
from prad.lm.kv import LayerDone, Pools, chunked_batch
from prefill_service.generation import PromptRequest
from prefill_service.prompt import Prompt

FirstTokens = dict[Prompt, list[Token] | None]
"""Of every prompt whose last token was computed: its first tokens, one per choice. None if its logits are not
finite: a broken adapter spoils its own request only."""

StateDone = Callable[[Prompt, SiteVectors], None]
"""Gets the request state of every prompt whose adapter makes some."""


def run_prompt_pass(
    model: LanguageModel,
    pools: Pools,
    chunks: Sequence[Chunk[Prompt]],
    layer_done: LayerDone | None = None,
    state_done: StateDone | None = None,
) -> FirstTokens:
    """Runs all chunks in one forward.

    `layer_done` gets every layer's keys and values [T, kv_heads, dim], chunks packed in order.
    """
    prompts = [chunk.prompt for chunk in chunks]
    assert all(len(c) == c.prompt.tokens for c in chunks if c.prompt.whole), "a whole prompt was cut"
    lengths = [len(chunk) for chunk in chunks]
    adapted = [chunk.prompt.adapted_in(chunk) for chunk in chunks]
    ids, task_rows = split_task_tokens(
        [None if prompt.adapter is None else prompt.adapter.task_embeddings for prompt in prompts],
        [chunk.prompt.ids[chunk.start : chunk.end] for chunk in chunks],
        model.device,
    )
    adaptation = PromptAdaptation.of_prompts(
        [prompt.adapter if rows else None for prompt, rows in zip(prompts, adapted, strict=True)],
        lengths,
        adapted,
        model.device,
        model.kernels,
        [chunk.start for chunk in chunks],
        task_rows,
    )
    ended = [chunk.prompt.ends_with(chunk) for chunk in chunks]
    batch = chunked_batch(
        chunks,
        ids,
        pools,
        logit_rows=[end - 1 for end, last in zip(accumulate(lengths), ended, strict=True) if last],
        layer_done=layer_done,
    )
    with torch.inference_mode():
        logits = model.forward(batch, adaptation)
        if adaptation is not None and state_done is not None:
            by_start = dict(zip(accumulate(lengths[:-1], initial=0), prompts, strict=True))
            for start, state in adaptation.states().items():
                state_done(by_start[start], state)
        sound = torch.isfinite(logits).all(dim=-1).tolist()
        done = [prompt for prompt, last in zip(prompts, ended, strict=True) if last]
        return {
            prompt: _first_tokens(model, row, prompt.request) if ok else None
            for row, prompt, ok in zip(logits, done, sound, strict=True)
        }


def _first_tokens(model: LanguageModel, row: Tensor, request: PromptRequest) -> list[Token]:
    """row [vocab]: every choice draws from it, under its own key."""
    keys = [
        SampleKey(request.sampling.seed, request.prompt_index, choice, request.output_offset)
        for choice in range(request.choices)
    ]
    return sample(row.expand(len(keys), -1), [request.sampling] * len(keys), keys, model.argmax)
