"""Between our types and the hand-off's: the one place where prad.lm meets kvtransfer on the prefill side."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvtransfer.int8 import quantise
from kvtransfer.layout import Encoding
from kvtransfer.messages import Open, StateSite
from prad.core.layout import ModelSpec
from prad.lm import Site
from prefill_service.generation import PromptRequest


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
        sampling=request.sampling,
        choices=request.choices,
        prompt_index=request.prompt_index,
        output_offset=request.output_offset,
        deadline_unix_ms=deadline_unix_ms,
        state=tuple(StateSite(str(site), width) for site, width in state_widths.items()),
        tokens_per_event=request.tokens_per_event,
    )


def planes(key: Tensor, value: Tensor, encoding: Encoding) -> list[memoryview]:
    """A layer's keys and values [T, kv_heads, dim] as the wire has them: contiguous, on the CPU."""
    if encoding is Encoding.INT8:
        return [raw(part) for states in (key, value) for part in quantise(states)]
    return [raw(states) for states in (key, value)]


def raw(tensor: Tensor) -> memoryview:
    """Its bytes, contiguous, on the CPU."""
    data: Any = tensor.cpu().contiguous().view(torch.uint8).numpy()
    return memoryview(data).cast("B")
