"""Server-sent events: an admitted request's deltas as OpenAI's chunks, and the response that carries them."""

import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefill_service.api.disconnect import CLIENT_GONE, ClientGoneError, while_connected
from prefill_service.api.generate import Delta
from prefill_service.api.record import RequestRecord
from prefill_service.api.shapes import Json, Shape
from prefill_service.errors import InternalError, ServingError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"

_dumps = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make a new encoder per token


class ChunkWriter:
    """Writes chunks; what they share is serialised once.

    `usage_field`: with include_usage every chunk has the field, null in all but the last.
    """

    def __init__(self, shared: Json, report: Json, *, usage_field: bool) -> None:
        self._shared = shared
        self._head = f'data: {_dumps(shared)[:-1]},"choices":['
        self._tail = '],"usage":null' if usage_field else "]"
        self._report = f',"prad":{_dumps(report)}'

    def chunk(self, choice: Json, *, first: bool) -> bytes:
        """The stream's first chunk also says which adapter answers."""
        return f"{self._head}{_dumps(choice)}{self._tail}{self._report if first else ''}}}\n\n".encode()

    def usage(self, usage: Mapping[str, object]) -> bytes:
        return _event({**self._shared, "choices": [], "usage": usage})


async def chunks(
    deltas: AsyncGenerator[Delta, None],
    shape: Shape,
    writer: ChunkWriter,
    record: RequestRecord,
    *,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """All events but [DONE]."""
    opened: set[int] = set()
    async with aclosing(deltas):
        async for delta in deltas:
            event = b""
            first = not opened
            if delta.index not in opened:
                opened.add(delta.index)
                if opening := shape.opening(delta.index):
                    event, first = writer.chunk(opening, first=first), False
            yield event + writer.chunk(shape.chunk(delta), first=first)
    if include_usage:
        yield writer.usage(record.usage())


class EventStream(Response):
    """Sends `events` as they come.

    What fails before the first event is an ordinary error response; later it is the last event. The client's
    leaving closes `events`.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], record: RequestRecord, headers: Mapping[str, str]
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with while_connected(receive), aclosing(self._events):
                async for event in self._events:
                    if not started:
                        started = True
                        await self._start(send)
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except ClientGoneError:
            if not started:
                raise
            self._record.status = CLIENT_GONE
            return
        except Exception as error:
            if not started:
                raise
            await send({"type": "http.response.body", "body": self._failed(error), "more_body": True})
        if not started:
            await self._start(send)
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    def _failed(self, error: Exception) -> bytes:
        if not isinstance(error, ServingError) or isinstance(error, InternalError):
            logger.error("request %s failed in mid-stream", self._record.id, exc_info=error)
        if not isinstance(error, ServingError):
            error = InternalError(f"internal error; the log has it under {self._record.id}")
        self._record.status = error.status
        return _event(error.body())


def _event(data: Mapping[str, object]) -> bytes:
    return f"data: {_dumps(data)}\n\n".encode()
