"""Answers that decode has lost in mid-stream, and that go on once it is back: every token is drawn by a
number of its own, so what comes again is the same.

A single answer goes on behind what its client has, which is computed again with the prompt, as decode's steps
did. Of several, each behind its own, all begin anew: what their client has is drawn again, and not told.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import NamedTuple

from prad.core.sampling import TokenEvent
from prefill_service.decode_link import DecodeLink
from prefill_service.errors import DecodeUnavailableError, ServingError
from prefill_service.prompt import PromptRequest

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.1

Said = Sequence[Sequence[int]]
"""Of each choice, the ids that its client has."""


class Attempt(NamedTuple):
    """number: of the first hand-off. running: the choices that are wanted; None: all. again: whether another
    one follows if decode loses it."""

    number: int = 1
    running: Collection[int] | None = None
    again: bool = False


async def decode_is_back(link: DecodeLink, until: float, clock: Callable[[], float]) -> bool:
    """Whether there is a decode service again, as soon as there is, or then."""
    while True:
        await asyncio.sleep(_LOOK_AGAIN_S)  # also at first: the link may have yet to hear of it
        if link.trouble is None or clock() >= until:
            return link.trouble is None


async def survives(
    error: ServingError, request: PromptRequest, said: Said, is_back: Callable[[], Awaitable[bool]]
) -> bool:
    """Whether an answer that ends so can go on. One that nobody has a token of is asked for again instead.
    Several prompts have one answer: somebody may have a token of the others."""
    begun = any(said) or request.prompts > 1
    return isinstance(error, DecodeUnavailableError) and begun and await is_back()


def behind(request: PromptRequest, said: Said) -> tuple[PromptRequest, Said]:
    """The request for the rest of an answer, and what of it comes again."""
    logger.info("the answer to %s goes on: decode has lost it", request.request_id)
    if not any(said):  # its first prompt pass is yet to tell its scores
        return request, said
    if request.choices > 1:
        return replace(request, scoring=None), said
    (ids,) = said
    given, told = (*request.continuation_ids, *ids), request.output_offset + len(ids)
    return replace(request, continuation_ids=given, output_offset=told, scoring=None), [()]


async def unsaid(
    events: AsyncGenerator[TokenEvent, None], said: Said, running: Collection[int], lost: ServingError
) -> AsyncGenerator[TokenEvent, None]:
    """What of the events of an answer that comes again its client does not have, of the choices that it waits
    for. Raises `lost` where it comes otherwise."""
    heads = [deque(ids) for ids in said]
    async with aclosing(events):
        async for event in events:
            if event.choice not in running:
                continue
            if not (head := heads[event.choice]):
                yield replace(event, cached_tokens=0)
            elif [token.id for token in event.tokens] != [head.popleft()]:
                raise lost
