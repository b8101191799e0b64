"""What happened to all tasks: the audit log, and the same as it happens, for programs that follow it
(server-sent events, as the HTML standard has them: each has its revision as its id, so that whoever comes
back with Last-Event-ID misses nothing that is still known)."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse

from adapter_registry.errors import StoreUnavailableError, TooManyWaitersError
from adapter_registry.messages import AuditLog, LoggedLine
from adapter_registry.parameters import Latest
from adapter_registry.registry import Registry

_QUIET_S = 15.0
"""Proxies and clients give up on a connection over which nothing comes."""
_MOST = 10_000  # changes that are told late

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


def router(registry: Registry) -> APIRouter:
    """For who may read."""
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

        From now on, or from a revision on. Ends when the registry does; come back with the last id.
        """
        last = after if known is None else known
        start = (await registry.state()).revision if last is None else last
        address = "" if request.client is None else request.client.host
        told = _told(registry, start, address, wait)
        return StreamingResponse(told, media_type="text/event-stream", headers={"cache-control": "no-store"})

    return router


async def _told(registry: Registry, after: int, address: str, seconds: float | None) -> AsyncIterator[str]:
    clock = asyncio.get_running_loop().time
    until = None if seconds is None else clock() + seconds
    yield ": what is changed from now on\n\n"
    while not registry.feed.closed:
        revision = registry.feed.revision
        try:
            lines = await registry.log(min(revision - after, _MOST)) if revision > after else ()
        except StoreUnavailableError:
            lines, revision = (), after  # it is told when the store is back
        for line in lines:
            if line.revision > after:
                yield _event(line)
        after = max([revision, *(line.revision for line in lines)])
        left = _QUIET_S if until is None else min(_QUIET_S, until - clock())
        if left <= 0:
            return
        try:
            changed = await registry.feed.wait(after, left, address=address, known=False)
        except TooManyWaitersError as error:
            yield f"event: error\ndata: {error.message}\n\n"
            return
        if not changed and not registry.feed.closed:
            yield ": nothing new\n\n"


def _event(line: LoggedLine) -> str:
    return f"id: {line.revision}\nevent: {line.event}\ndata: {line.model_dump_json()}\n\n"
