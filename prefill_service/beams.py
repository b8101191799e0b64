"""Beam search: each step asks how every live hypothesis goes on.

A hypothesis is the prompt with a continuation, so a step is a prompt pass, which computes what the prefix
cache does not have of it and draws a single token. Decode has no part in it. Stop texts are cut from what is
found; they end no hypothesis.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from prad.core.sampling import SamplingParams, Token, TokenEvent
from prad.core.search import BeamSearch, Candidate, Limits
from prefill_service.errors import InternalError
from prefill_service.prompt import PromptRequest

Generate = Callable[[PromptRequest], AsyncGenerator[TokenEvent, None]]
"""As `Engine.generate`."""


async def beam_search(generate: Generate, request: PromptRequest) -> AsyncGenerator[TokenEvent, None]:
    """The `choices` best of `request.beams` hypotheses; their tokens all come at the end."""
    assert request.beams is not None
    limits = Limits(request.sampling.max_tokens, request.sampling.stop_ids)
    search = BeamSearch(limits, request.beams)
    alternatives = BeamSearch.candidates(request.beams, limits.stop_ids)
    step = replace(request, beams=None, choices=1)
    rows: list[tuple[int, ...]] = [()]
    cached = 0
    while rows:
        asked = [
            replace(
                step,
                request_id=f"{request.request_id}-{len(row)}-{i}",
                continuation_ids=row,
                output_offset=len(row),
                sampling=SamplingParams(len(row) + 1, logprobs=alternatives),
            )
            for i, row in enumerate(rows)
        ]
        outs = await _all(generate, asked)
        if rows == [()]:
            cached = outs[0].cached_tokens
        children = search.advance([[Candidate(*pair) for pair in out.tokens[0].top] for out in outs])
        rows = [(*rows[child.parent], child.token) for child in children]
    for choice, tokens in enumerate(search.hypotheses[: request.choices]):
        for index, token in enumerate(tokens):
            reason = request.sampling.finish_reason(token, index + 1)
            told = cached if (choice, index) == (0, 0) else 0
            yield TokenEvent(
                request.request_id, 1, choice, index, (Token(token),), reason, cached_tokens=told
            )


async def _all(generate: Generate, requests: list[PromptRequest]) -> list[TokenEvent]:
    """The only token of each; together, so that they share a pass."""
    tasks = [asyncio.create_task(_only_token(generate, request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _only_token(generate: Generate, request: PromptRequest) -> TokenEvent:
    async with aclosing(generate(request)) as tokens:
        async for out in tokens:
            return out
    raise InternalError("the engine ended before the output did")
