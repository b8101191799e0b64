"""From a connection's bytes to the JSON of a request, everything bounded: connections, bytes, time, depth.

FastAPI reads a whole body of any size for as long as it takes, and parses it with `json`: so the route reads
it here first, and FastAPI finds it done.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from prefill_service.api.failures import ClientGoneError
from prefill_service.api.protocols import ApiLimits
from prefill_service.errors import (
    BodyTimeoutError,
    InvalidRequestError,
    RequestTooLargeError,
    TooManyConnectionsError,
    UnsupportedMediaTypeError,
)

SLOWEST_BODY = 64 * 2**10
"""Bytes a second: what comes at least as fast may take longer than `body_timeout_s`."""

MAX_BRACKETS = 100_000
"""Lists and objects of a body; millions of them, most of them empty, stop all streams for seconds."""
ALWAYS_SERVED = ("/health", "/ready", "/metrics")
"""A crowd of clients must not make operators' machines believe that the service is dead."""

_CROWDED = "prad.crowded"


def bounded_protocol(connections: int, head_timeout_s: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with bounds: requests on more `connections` than that are marked for `TurnAway`, and
    a connection whose first head is not there in time is closed. (uvicorn's own limit answers in its own
    words, operators' machines too, and waits for a head for ever.)"""

    class BoundedProtocol(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > connections:
                self.app = _marked(self.app)
            self.loop.call_later(head_timeout_s, self._require_head)

        def _require_head(self) -> None:
            request: object = self.cycle  # None until a head is there, whatever its annotation says
            if request is None and not self.transport.is_closing():
                self.transport.close()

    return BoundedProtocol


def _marked(app: Any) -> Any:
    async def marked(scope: Any, receive: Any, send: Any) -> None:
        scope[_CROWDED] = True
        await app(scope, receive, send)

    return marked


class TurnAway:
    """Middleware that refuses what came on a connection too many."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get(_CROWDED) and scope["path"] not in ALWAYS_SERVED:
            raise TooManyConnectionsError("too many connections are open already")
        await self._app(scope, receive, send)


def json_route(limits: ApiLimits) -> type[APIRoute]:
    """FastAPI's route, but for how the body is read. Its endpoints also raise UnsupportedMediaTypeError,
    RequestTooLargeError, BodyTimeoutError and InvalidRequestError."""

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def read_then_handle(request: Request) -> Response:
                _require_json(request)
                body = await _read(request, limits)
                return await handle(_JsonRequest(request.scope, request.receive, body, _parsed(body)))

            return read_then_handle

    return JsonRoute


class _JsonRequest(Request):
    """A request whose body has been read."""

    def __init__(self, scope: Scope, receive: Receive, body: bytes, data: Any) -> None:
        super().__init__(scope, receive)
        self._read = body
        self._data = data

    async def body(self) -> bytes:
        return self._read

    async def json(self) -> Any:
        return self._data


def _require_json(request: Request) -> None:
    sent = request.headers.get("content-type", "")
    kind, _, subtype = sent.partition(";")[0].strip().lower().partition("/")
    if kind != "application" or not (subtype == "json" or subtype.endswith("+json")):
        raise UnsupportedMediaTypeError(
            f"expected content-type application/json, got {sent or 'none'}", param="content-type"
        )


async def _read(request: Request, limits: ApiLimits) -> bytes:
    too_large = RequestTooLargeError(f"the body is larger than {limits.max_body_bytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > limits.max_body_bytes):
        raise too_large
    body = bytearray()
    latest = asyncio.get_running_loop().time() + limits.body_timeout_s
    try:
        async with asyncio.timeout_at(latest) as bound:
            async for part in request.stream():
                body += part
                if len(body) > limits.max_body_bytes:
                    raise too_large
                bound.reschedule(latest + len(body) / SLOWEST_BODY)
    except ClientDisconnect as error:
        raise ClientGoneError from error
    except TimeoutError as error:
        raise BodyTimeoutError(
            f"the body did not come within {limits.body_timeout_s:g} s: {len(body)} bytes are here"
        ) from error
    return bytes(body)


def _parsed(body: bytes) -> Any:
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise InvalidRequestError(f"the body holds too many of [ and {{: expected up to {MAX_BRACKETS}")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
