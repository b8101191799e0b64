"""The playground's way to a replica's API: a page asks its own origin only, so the answer comes through here.

The address is an operator's setting, never what a page or a replica says. An API key, where the API asks for
one, is who asks' own, goes along with each question, and is kept nowhere.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from http import HTTPStatus
from typing import Annotated, Any

import httpx
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from adapter_registry.disconnects import unless_gone
from adapter_registry.settings import RegistrySettings
from adapter_registry.uploads import BoundedRoute
from prad.http.asking import direct

AT_ONCE = 8
"""Answers under way, of all who ask."""
MOST_BYTES = 4 << 20
"""Of one answer."""
LONGEST_S = 120.0
_REFUSAL_BYTES = 64 << 10
_TOLD = ("x-prad-task", "x-prad-version", "x-prad-digest", "x-prad-routing", "x-request-id")
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)


class Question(BaseModel):
    """What the page asks."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: Annotated[str, Field(min_length=1, max_length=200)]
    """A task, a version, an alias, or the plain model."""
    prompt: Annotated[str, Field(min_length=1, max_length=20_000)]
    """As in the API."""
    max_tokens: Annotated[int, Field(ge=1, le=1024)] | None = None
    """At most; None: the task's own."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """None: the task's own."""
    key: Annotated[str, Field(max_length=200, pattern=r"^[\x21-\x7e]*$")] = ""
    """An API key."""

    @property
    def body(self) -> dict[str, Any]:
        wanted = self.model_dump(exclude={"key"}, exclude_none=True)
        return {**wanted, "stream": True, "stream_options": {"include_usage": True}}


def asking(settings: RegistrySettings) -> APIRouter:
    router = APIRouter(route_class=BoundedRoute)
    places = asyncio.Semaphore(AT_ONCE)

    @router.post("/playground/ask")
    async def ask(request: Request, question: Question) -> Response:
        """The API's own answer, streamed; or its refusal, as it is."""
        if settings.api_url is None:
            return _refused(
                HTTPStatus.NOT_FOUND,
                "this registry knows no API to ask: set PRAD_REGISTRY_API_URL (--api-url), say to "
                "http://127.0.0.1:8000",
            )
        if places.locked():
            return _refused(HTTPStatus.TOO_MANY_REQUESTS, f"{AT_ONCE} answers are under way already")
        async with AsyncExitStack() as opened:
            await opened.enter_async_context(places)
            try:
                heard = await unless_gone(request, _heard(opened, settings.api_url, question))
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                return _refused(
                    HTTPStatus.BAD_GATEWAY, f"no answer from the API at {settings.api_url}: {error}"
                )
            if heard is None:
                return Response(status_code=HTTPStatus.NO_CONTENT)  # which nobody hears
            answer, refusal = heard
            told = {name: answer.headers[name] for name in _TOLD if name in answer.headers}
            if not answer.is_success:
                return Response(refusal, answer.status_code, told, media_type="application/json")
            return _Relay(_pieces(answer), told, opened.pop_all().aclose)

    return router


class _Relay(StreamingResponse):
    """`close` is called at its end, also where the client went away before the first byte."""

    def __init__(
        self, pieces: AsyncIterator[bytes], headers: dict[str, str], close: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(
            pieces, headers={**headers, "cache-control": "no-store"}, media_type="text/event-stream"
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


async def _heard(opened: AsyncExitStack, url: str, question: Question) -> tuple[httpx.Response, bytes]:
    """The answer as soon as it begins; of a refusal, what it says as well."""
    answer = await _asked(opened, url, question)
    return answer, b"" if answer.is_success else await _beginning(answer)


async def _asked(opened: AsyncExitStack, url: str, question: Question) -> httpx.Response:
    shown = {"authorization": f"Bearer {question.key}"} if question.key else {}
    shown["accept-encoding"] = "identity"  # its bytes are passed on as they come
    client = httpx.AsyncClient(
        base_url=url.rstrip("/").removesuffix("/v1"),
        timeout=_TIMEOUT,
        headers=shown,
        **direct(url),
    )
    await opened.enter_async_context(client)
    return await opened.enter_async_context(client.stream("POST", "/v1/completions", json=question.body))


async def _pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    """What comes, until it is too much or takes too long: the API's own last event is missing then."""
    sent, until = 0, time.monotonic() + LONGEST_S
    with suppress(httpx.HTTPError):
        async for piece in answer.aiter_raw():
            sent += len(piece)
            if sent > MOST_BYTES or time.monotonic() > until:
                return
            yield piece


async def _beginning(answer: httpx.Response) -> bytes:
    said = b""
    async for piece in answer.aiter_raw():
        said += piece
        if len(said) >= _REFUSAL_BYTES:
            break
    return said[:_REFUSAL_BYTES]


def _refused(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status)
