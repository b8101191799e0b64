"""What happened to all tasks: the audit log, and the same as it happens, for programs that follow it
(server-sent events, as the HTML standard has them: each has its revision as its id, so that whoever comes
back with Last-Event-ID misses nothing that is still known)."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from adapter_registry.access import Guard
from adapter_registry.errors import ForbiddenError, StoreUnavailableError, UnauthorizedError
from adapter_registry.keys import Role
from adapter_registry.messages import AuditLog, LoggedLine
from adapter_registry.parameters import Latest
from adapter_registry.registry import Registry

_QUIET_S = 15.0
"""Proxies and clients give up on a connection over which nothing comes."""
_AWAY_S = 1.0
"""Between two looks whether the store is back."""
_PAGE = 200
"""Lines that a stream holds at once: somebody may be slow to read them."""

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Changes as they are made",
        "content": {
            "text/event-stream": {
                "example": 'id: 41\nevent: promote\ndata: {"task":"support","revision":41, ...}\n\n'
            }
        },
    }
}

After = Annotated[
    int | None,
    Query(ge=0, lt=2**63, description="The revision that is known; what came later is told first"),
]
Known = Annotated[
    int | None,
    Header(alias="last-event-id", ge=0, lt=2**63, description="The same, as browsers and clients send it"),
]
Until = Annotated[float | None, Query(ge=0, description="Seconds to go on; if absent, until you hang up")]


class _Following(StreamingResponse):
    """Has a place among those who wait for as long as it lasts, also while it catches up or nobody reads it.
    Where there is none it is refused, before anything is sent."""

    def __init__(self, told: AsyncIterator[str], place: AbstractContextManager[None]) -> None:
        super().__init__(told, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await super().__call__(scope, receive, send)


def router(registry: Registry, guard: Guard) -> APIRouter:
    """For who may read; `guard` is asked again as long as a stream lasts."""
    router = APIRouter()

    @router.get("/events")
    async def events(latest: Latest = 100) -> AuditLog:
        """What happened to all tasks, who did it and when: the `latest` changes, the last one last."""
        return AuditLog(events=await registry.log(latest))

    @router.get("/events/stream", response_class=StreamingResponse, responses=_STREAM)
    async def stream(
        request: Request, after: After = None, known: Known = None, wait: Until = None
    ) -> StreamingResponse:
        """The same as it happens, as server-sent events: curl -N, or EventSource.

        From now on, or from a revision on. Ends when the registry does, or your token is revoked; come back
        with the last id.
        """
        last = after if known is None else known
        start = registry.feed.revision if last is None else last
        address = "" if request.client is None else request.client.host
        told = _told(registry, start, wait, partial(guard.require, request, Role.READ))
        return _Following(told, registry.feed.place(address, known=False))

    return router


async def _told(
    registry: Registry, after: int, seconds: float | None, require: Callable[[], Awaitable[None]]
) -> AsyncIterator[str]:
    """`require`: that whoever listens still may, known at the revision up to which is told."""
    clock = asyncio.get_running_loop().time
    until = None if seconds is None else clock() + seconds
    yield ": what is changed from now on\n\n"
    while not registry.feed.closed:
        revision, patience = registry.feed.revision, _QUIET_S
        try:
            await require()
        except (UnauthorizedError, ForbiddenError):
            return
        try:
            known = after == revision
            lines, reached = ((), revision) if known else await registry.log_since(after, revision, _PAGE)
        except StoreUnavailableError:
            yield ": the store is away\n\n"
            patience = _AWAY_S  # what it holds is told when it is back
        else:
            for line in lines:
                yield _event(line)
            del lines
            after = reached
            if after != revision:
                continue
        left = patience if until is None else min(patience, until - clock())
        if left <= 0:
            return
        changed = await registry.feed.changed(revision, left)
        if not changed and after == revision and not registry.feed.closed:
            yield ": nothing new\n\n"


def _event(line: LoggedLine) -> str:
    return f"id: {line.revision}\nevent: {line.event}\ndata: {line.model_dump_json()}\n\n"
