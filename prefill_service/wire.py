"""Between our types and the hand-off's: the one place where prad.lm meets kvtransfer on the prefill side."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kvtransfer.int8 import quantise
from kvtransfer.layout import Encoding, LayerSpec, ModelSpec
from kvtransfer.messages import Open, Sampling, StateSite, Token, TokenEvent
from prad.lm import Draw, Fingerprint, SamplingParams, Site
from prefill_service.generation import PromptRequest, TokenOut


def model_spec(fingerprint: Fingerprint) -> ModelSpec:
    layers = tuple(LayerSpec(la.heads, la.key_dim, la.value_dim) for la in fingerprint.layout.layers)
    return ModelSpec(fingerprint.digest, str(fingerprint.layout.dtype).removeprefix("torch."), layers)


def open_message(
    request: PromptRequest,
    client_id: str,
    model: ModelSpec,
    attempt: int,
    deadline_unix_ms: int,
    state_widths: Mapping[Site, int],
) -> Open:
    cached = request.virtual_tokens + len(request.prompt_ids) + len(request.continuation_ids)
    return Open(
        request_id=request.request_id,
        client_id=client_id,
        attempt=attempt,
        model=model,
        kv_len=cached,
        prompt_len=len(request.prompt_ids),
        next_position=cached,
        sampling=_sampling(request.sampling),
        choices=request.choices,
        prompt_index=request.prompt_index,
        output_offset=request.output_offset,
        deadline_unix_ms=deadline_unix_ms,
        state=tuple(StateSite(str(site), width) for site, width in state_widths.items()),
        tokens_per_event=request.tokens_per_event,
    )


def token(draw: Draw) -> Token:
    return Token(draw.token, draw.logprob, draw.top)


def tokens_out(event: TokenEvent) -> Iterator[TokenOut]:
    """An event's tokens. A finish reason is the last one's, but that of an early end is no token's."""
    last = None if event.is_early_end else event.index + len(event.tokens) - 1
    for index, token in enumerate(event.tokens, event.index):
        reason = event.finish_reason if index == last else None
        yield TokenOut(event.choice, index, Draw(token.id, token.logprob, token.top), reason)


def planes(key: Tensor, value: Tensor, encoding: Encoding) -> list[memoryview]:
    """A layer's keys and values [T, kv_heads, dim] as the wire has them: contiguous, on the CPU."""
    if encoding is Encoding.INT8:
        return [raw(part) for states in (key, value) for part in quantise(states)]
    return [raw(states) for states in (key, value)]


def raw(tensor: Tensor) -> memoryview:
    """Its bytes, contiguous, on the CPU."""
    data: Any = tensor.cpu().contiguous().view(torch.uint8).numpy()
    return memoryview(data).cast("B")


def _sampling(params: SamplingParams) -> Sampling:
    return Sampling(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        min_tokens=params.min_tokens,
        stop_ids=params.stop_ids,
        logprobs=params.logprobs,
    )
