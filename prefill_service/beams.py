"""Beam search over an engine: each step asks it how every live hypothesis goes on.

A hypothesis is the prompt with a continuation of the plain model's, so a step is a prompt pass that finds the
prompt's blocks in the prefix cache, and draws a single token. Decode has no part in it.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from prad.lm import BeamSearch, Candidate, Draw, Limits, SamplingParams
from prefill_service.errors import InternalError
from prefill_service.generation import Engine, PromptRequest, TokenOut


async def beam_search(engine: Engine, request: PromptRequest, width: int) -> AsyncGenerator[TokenOut, None]:
    """As `Engine.generate`: the `choices` best of `width` hypotheses, whose tokens all come at the end."""
    limits = Limits(request.sampling.max_tokens, request.sampling.stop_ids)
    search = BeamSearch(limits, width)
    alternatives = BeamSearch.candidates(width, limits.stop_ids)
    step = replace(request, choices=1, sampling=SamplingParams(1, logprobs=alternatives))
    rows: list[tuple[int, ...]] = [()]
    cached = 0
    while rows:
        asked = [
            replace(step, request_id=f"{request.request_id}-{len(row)}-{i}", continuation_ids=row)
            for i, row in enumerate(rows)
        ]
        outs = await _all(engine, asked)
        if rows == [()]:
            cached = outs[0].cached_tokens
        children = search.advance([[Candidate(*pair) for pair in out.draw.top] for out in outs])
        rows = [(*rows[child.parent], child.token) for child in children]
    for choice, tokens in enumerate(search.hypotheses[: request.choices]):
        for index, token in enumerate(tokens):
            reason = request.sampling.finish_reason(token, index + 1)
            yield TokenOut(choice, index, Draw(token), reason, cached if (choice, index) == (0, 0) else 0)


async def _all(engine: Engine, requests: list[PromptRequest]) -> list[TokenOut]:
    """The only token of each; together, so that they share a pass."""
    tasks = [asyncio.create_task(_only_token(engine, request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _only_token(engine: Engine, request: PromptRequest) -> TokenOut:
    async with aclosing(engine.generate(request)) as tokens:
        async for out in tokens:
            return out
    raise InternalError("the engine ended before the output did")
