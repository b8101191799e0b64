"""Beam search as prefill sees it: the prompt's last row says what its hypotheses begin with, and decode
searches on alone.

Nothing is told before a search is over, so one that decode loses is begun anew, from its prompt. Stop texts
are cut from what is found; they end no hypothesis.
"""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

from prad.core.sampling import Token, TokenEvent
from prad.core.search import BeamSearch, Candidate, Limits
from prefill_service.errors import DecodeUnavailableError
from prefill_service.prompt import Prompt

logger = logging.getLogger(__name__)


def deliver_candidates(prompt: Prompt, candidates: Token, cached: int) -> bool:
    """As `pass_loop.deliver_first`, for a search that begins with the `top` of `candidates`: hands an event
    without a token to the HTTP side, and all answers if the search is over already."""
    request, sampling = prompt.request, prompt.request.sampling
    assert request.beams is not None
    search = BeamSearch(Limits(sampling.max_tokens, sampling.stop_ids), request.beams)
    goes_on = bool(search.advance([[Candidate(*pair) for pair in candidates.top]]))
    name = request.request_id, prompt.attempt
    prompt.outputs.put_nowait(TokenEvent(*name, 0, 0, cached_tokens=prompt.cached_ids(cached)))
    if goes_on:
        prompt.awaited = set(prompt.running)
    else:
        for event in search.events(*name, request.choices, at_once=1):
            prompt.outputs.put_nowait(event)
    return goes_on


async def searched(
    attempt: Callable[[int], AsyncGenerator[TokenEvent, None]], decode_is_back: Callable[[], Awaitable[bool]]
) -> AsyncGenerator[TokenEvent, None]:
    """The answers' tokens. `attempt` begins the search, as the attempt of that number or a later one. When
    decode has lost it and is back in time it begins anew, once."""
    number, again = 1, True
    begun: TokenEvent | None = None
    while True:
        try:
            async with aclosing(attempt(number)) as events:
                async for event in events:
                    if not event.tokens:
                        begun = event
                        continue
                    cached, begun = begun.cached_tokens if begun else 0, None
                    yield replace(event, cached_tokens=cached)
            return
        except DecodeUnavailableError:
            if begun is None or not again or not await decode_is_back():
                raise
            logger.info("the beam search of %s begins anew: decode has lost it", begun.request_id)
            number, begun, again = begun.attempt + 1, None, False
