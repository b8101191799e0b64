"""An upload to /v1/files: a multipart body within bounds of bytes and time, its one file onto the disk."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message

from prefill_service.api.intake import SLOWEST_BODY, ApiLimits
from prefill_service.api.outcomes import ClientGoneError
from prefill_service.api.problems import shown
from prefill_service.batches.files import Files, StoredFile
from prefill_service.errors import (
    BodyTimeoutError,
    InvalidRequestError,
    RequestTooLargeError,
    UnsupportedMediaTypeError,
)

_OVERHEAD = 64 * 2**10
"""Boundaries and headers of the parts, and fields, on top of the file's bytes."""
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_MAX_NAME_CHARACTERS = 255


async def receive(request: Request, files: Files, limits: ApiLimits, owner: str | None) -> StoredFile:
    """The file of a multipart body, kept. Raises UnsupportedMediaTypeError, RequestTooLargeError,
    BodyTimeoutError, InvalidRequestError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise UnsupportedMediaTypeError(
            f"expected content-type multipart/form-data, got {kind or 'none'}", param="content-type"
        )
    promised = _most(request, files.limits.file_bytes)
    files.promise(promised, owner)
    try:
        return await _receive(request, files, limits, owner)
    finally:
        files.settle(promised, owner)


def _most(request: Request, file_bytes: int) -> int:
    announced = request.headers.get("content-length", "")
    if not announced.isdecimal():
        return file_bytes
    if len(announced) > 18 or int(announced) > file_bytes + _OVERHEAD:
        raise RequestTooLargeError(f"the file is larger than {file_bytes} bytes: send it in parts")
    return int(announced)


async def _receive(request: Request, files: Files, limits: ApiLimits, owner: str | None) -> StoredFile:
    body = _Bounded(request.receive, files.limits.file_bytes + _OVERHEAD, limits.body_timeout_s)
    async with Request(request.scope, body.receive).form(max_files=1, max_fields=len(_FIELDS)) as form:
        unknown = [name for name in form if name not in (*_FIELDS, "file")]
        if unknown:
            raise InvalidRequestError(f"unknown field {shown(unknown[0])}", param=unknown[0][:100])
        if (purpose := _text(form.get("purpose"))) != "batch":
            raise InvalidRequestError(
                f"'purpose': expected \"batch\", as files are for batches only, got {shown(purpose)}",
                param="purpose",
            )
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequestError(
                "field 'file' is required: the file, as a part with a name", param="file"
            )
        keep_s = _keep_s(_text(form.get("expires_after[seconds]")))
        part = files.part()
        try:
            await run_in_threadpool(_write, file, part)
            name = (file.filename or "file")[:_MAX_NAME_CHARACTERS]
            return await files.add(part, owner=owner, filename=name, purpose="batch", keep_s=keep_s)
        finally:
            part.unlink(missing_ok=True)


def _text(value: object) -> str | None:
    """Of a field, which may have come as a file."""
    return value if isinstance(value, str) else None


def _keep_s(seconds: str | None) -> float | None:
    if seconds is None:
        return None
    if not (seconds.isdecimal() and len(seconds) < 12 and int(seconds)):
        raise InvalidRequestError(
            f"'expires_after[seconds]': expected seconds, got {shown(seconds)}", param="expires_after"
        )
    return float(seconds)


def _write(file: UploadFile, target: Path) -> None:
    with target.open("xb") as out:
        shutil.copyfileobj(file.file, out)


class _Bounded:
    """Counts a body as it arrives, by `most` bytes and by the speed that every body must have."""

    def __init__(self, receive: Callable[[], Any], most: int, timeout_s: float) -> None:
        self._receive = receive
        self._most = most
        self._timeout_s = timeout_s
        self._latest = asyncio.get_running_loop().time() + timeout_s
        self._read = 0

    async def receive(self) -> Message:
        try:
            async with asyncio.timeout_at(self._latest + self._read / SLOWEST_BODY):
                message: Message = await self._receive()
        except TimeoutError:
            raise BodyTimeoutError(
                f"the body did not come within {self._timeout_s:g} s: {self._read} bytes are here"
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        self._read += len(message.get("body", b""))
        if self._read > self._most:
            raise RequestTooLargeError(
                f"the file is larger than {self._most - _OVERHEAD} bytes: send it in parts"
            )
        return message
