"""To the chat and back: what the packages beside this share."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from prefill_service.api.admission import Admitted
from prefill_service.api.problems import invalid_request
from prefill_service.api.requests import ChatRequest
from prefill_service.api.responses import EventStream
from prefill_service.errors import InvalidRequestError

Json = dict[str, Any]
Origin = tuple[str | int, ...]
"""Where in what the client sent a message of the chat comes from."""

OTHER_ANSWERS = frozenset(
    {
        "messages",
        "n",
        "best_of",
        "use_beam_search",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "echo",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "stream_options",
        "functions",
        "function_call",
    }
)
"""Fields of a chat whose answers these protocols have no place for. All others may be sent by their names."""


@dataclass(frozen=True, slots=True)
class Chat:
    """The chat as the app has it. `admit`: tokenised, nothing is charged; `answer`: of OpenAI's chat."""

    admit: Callable[[Request, ChatRequest], Awaitable[Admitted]]
    answer: Callable[[Request, ChatRequest], Awaitable[Response]]


def passed(extra: Json | None, taken: Collection[str], noted: set[str] | None) -> Json:
    """Of fields that the protocol does not have those that may mean one of a chat: none of `taken`. Others
    are noted; None: they are refused, by InvalidRequestError."""
    extra = extra or {}
    unknown = [name for name in extra if name in taken]
    if unknown and noted is None:
        raise InvalidRequestError(f"unknown field '{unknown[0]}'", param=unknown[0])
    if noted is not None:
        noted.update(unknown)
    return {name: value for name, value in extra.items() if name not in taken}


def chat_request(
    messages: Iterable[tuple[Origin, Json]], fields: Json, names: Mapping[str, str], noted: set[str] | None
) -> ChatRequest:
    """`names`: what fields of the chat are called in the protocol, where that differs; `noted`: see `passed`.
    Raises InvalidRequestError, in which a message has the place that it was sent in."""
    origins, turns = [], []
    for origin, message in messages:
        origins.append(origin)
        turns.append(message)
    try:
        return ChatRequest.model_validate({**fields, "messages": turns}, context=noted)
    except ValidationError as error:
        raise invalid_request(
            [_renamed(p, origins, names) for p in error.errors(include_url=False)]
        ) from None


def _renamed(problem: Mapping[str, Any], origins: list[Origin], names: Mapping[str, str]) -> Json:
    place = tuple(problem["loc"])
    if place[:1] == ("messages",) and len(place) > 1:
        place = (*origins[place[1]], *place[2:])
    elif place:
        place = (names.get(place[0], place[0]), *place[1:])
    return {**problem, "loc": place}


def said(response: Response) -> Json:
    """The chat's answer, in one piece."""
    answer: Json = orjson.loads(response.body)
    return answer


async def chunks_of(stream: EventStream) -> AsyncGenerator[Json, None]:
    """The chat's chunks. Closing it ends the request."""
    async with aclosing(stream.events) as events:
        async for event in events:
            for part in event.split(b"\n\n"):
                if part:
                    yield orjson.loads(part.removeprefix(b"data: "))


def shown_headers(response: Response) -> dict[str, str]:
    """Which adapter answers."""
    return {name: value for name, value in response.headers.items() if name.startswith("x-prad-")}


def named_event(name: str, data: Json) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"
