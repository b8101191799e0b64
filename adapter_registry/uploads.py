"""Bodies of requests, all within limits: a pushed adapter's into a staged folder, known names only."""

import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.types import Message

from adapter_registry.errors import AdapterRefusedError, InvalidRequestError, UploadTooLargeError
from adapter_registry.messages import PushFrom
from adapter_registry.sources.fetching import Sources
from prad.artefact import FILES
from prad.artefact.signatures import SIGNATURES

MULTIPART_OVERHEAD = 64 << 10
"""Boundaries and headers of the parts, on top of the files' bytes."""

MAX_JSON_BYTES = 64 << 10
"""Of what is no upload: a command or a report."""

DRAINED = 4
"""A body up to so many times the limit is read to its end, so that the sender hears why it was refused."""


async def receive(request: Request, staged: Path, *, limit: int, sources: Sources | None) -> str:
    """Fills `staged` from a multipart body, or from where {"uri": ...} or {"path": ...} leads. Where the
    files were fetched; empty: they came with the request. `sources`: None where nothing is fetched.

    Raises InvalidRequestError, AdapterRefusedError, UploadTooLargeError, and what `Sources.fetch` raises.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        await _receive_parts(request, staged, limit)
        return ""
    if kind == "application/json" and sources is not None:
        return await sources.fetch(await _uri(request), staged)
    fetched = "" if sources is None else ', or {"uri": ...} or {"path": ...} as application/json'
    raise InvalidRequestError(f"push the files as multipart/form-data{fetched}")


class BoundedRoute(APIRoute):
    """FastAPI reads a JSON body of any size: so it is read here first, within bounds, and found done."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            limited = Request(request.scope, Limited(request, MAX_JSON_BYTES).receive)
            await limited.body()
            return await handle(limited)

        return bounded


async def _uri(request: Request) -> str:
    limited = Request(request.scope, Limited(request, MAX_JSON_BYTES).receive)
    try:
        asked = PushFrom.model_validate_json(await limited.body())
    except ValidationError as error:
        raise InvalidRequestError(
            f'expected {{"uri": "..."}} or {{"path": "..."}}: {error.errors()[0]["msg"]}', param="uri"
        ) from error
    if asked.uri:
        return asked.uri
    if not Path(asked.path).is_absolute():
        raise AdapterRefusedError(f"path must be absolute, got {asked.path!r}", param="path")
    return Path(asked.path).as_uri()


async def _receive_parts(request: Request, staged: Path, limit: int) -> None:
    limited = Request(request.scope, Limited(request, limit + MULTIPART_OVERHEAD).receive)
    async with limited.form(max_files=2 * len(FILES), max_fields=len(FILES)) as form:
        for field, part in form.multi_items():
            if not isinstance(part, UploadFile):
                raise InvalidRequestError(f"{field!r} is not a file", param=field)
            name = part.filename or ""
            if name not in (*FILES, SIGNATURES):
                raise AdapterRefusedError(
                    f"an adapter has no file {name!r}; its files are {', '.join(FILES)}", param=field
                )
            await run_in_threadpool(_write, part, staged / name)


def _write(part: UploadFile, target: Path) -> None:
    try:
        with target.open("xb") as file:
            shutil.copyfileobj(part.file, file)
    except FileExistsError:
        raise AdapterRefusedError(f"{target.name} was sent twice", param="files") from None


class Limited:
    """Counts the body as it arrives."""

    def __init__(self, request: Request, limit: int) -> None:
        self._receive = request.receive
        self._limit = limit
        self._read = 0

    async def receive(self) -> Message:
        """The next piece of the body. Raises UploadTooLargeError."""
        message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._read > self._limit:
            while message.get("more_body") and self._read <= DRAINED * self._limit:
                message = await self._receive()
                self._read += len(message.get("body", b""))
            raise UploadTooLargeError(
                f"the body is larger than the limit of {self._limit} bytes", param="body"
            )
        return message
