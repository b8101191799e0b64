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

from adapter_registry.artefacts import copy_local
from adapter_registry.errors import (
    AdapterRefusedError,
    ForbiddenError,
    InvalidRequestError,
    UploadTooLargeError,
)
from adapter_registry.messages import PushPath
from prad.artefact import FILES
from prad.artefact.signatures import SIGNATURES

MULTIPART_OVERHEAD = 64 << 10
"""Boundaries and headers of the parts, on top of the files' bytes."""

MAX_JSON_BYTES = 64 << 10
"""Of what is no upload: a command or a report."""

DRAINED = 4
"""A body up to so many times the limit is read to its end, so that the sender hears why it was refused."""


async def receive(request: Request, staged: Path, *, limit: int, local_paths: bool) -> None:
    """Fills `staged` from a multipart body or from {"path": ...}.

    Raises InvalidRequestError, AdapterRefusedError, ForbiddenError, UploadTooLargeError.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        await _receive_parts(request, staged, limit)
    elif kind == "application/json":
        if not local_paths:
            raise ForbiddenError(
                "this registry takes uploads only, no paths (allow_local_paths is off)", param="path"
            )
        path = await _path(request)
        await run_in_threadpool(copy_local, path, staged, limit)
    else:
        raise InvalidRequestError(
            'push the files as multipart/form-data, or {"path": ...} as application/json'
        )


class BoundedRoute(APIRoute):
    """FastAPI reads a JSON body of any size: so it is read here first, within bounds, and found done."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            limited = Request(request.scope, Limited(request, MAX_JSON_BYTES).receive)
            await limited.body()
            return await handle(limited)

        return bounded


async def _path(request: Request) -> Path:
    limited = Request(request.scope, Limited(request, MAX_JSON_BYTES).receive)
    try:
        return Path(PushPath.model_validate_json(await limited.body()).path)
    except ValidationError as error:
        raise InvalidRequestError(
            f'expected {{"path": "..."}}: {error.errors()[0]["msg"]}', param="path"
        ) from error


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
