"""Errors as HTTP: one table from the tree in `errors.py` to statuses, one shape of body for everything; a
line in the log for each."""

import logging
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from adapter_registry import errors
from adapter_registry.errors import ErrorBody, ErrorReply
from adapter_registry.metrics import Metrics
from prad.http.described import refusals, with_schemas
from prad.http.hosts import unknown_path
from prad.http.logs import logged

logger = logging.getLogger(__name__)

TOLD_CHARACTERS = 1000
"""Of every text in an error: what was sent may be quoted there."""

STATUS: Mapping[type[errors.RegistryError], int] = MappingProxyType(
    {
        errors.InvalidRequestError: 400,
        errors.UnauthorizedError: 401,
        errors.ForbiddenError: 403,
        errors.NotFoundError: 404,
        errors.ConflictError: 409,
        errors.RoutingChangedError: 412,
        errors.UploadTooLargeError: 413,
        errors.MissingExtraError: 501,
        errors.SourceUnavailableError: 502,
        errors.StoreUnavailableError: 503,
        errors.TooManyWaitersError: 503,
        errors.StorageFullError: 507,
        errors.StoredFilesDamagedError: 500,
        errors.RegistryError: 500,
    }
)


def described(reasons: Mapping[int | str, str]) -> dict[int | str, dict[str, Any]]:
    """For the documentation of a route: why it answers with each of these statuses."""
    return refusals(reasons, ErrorReply)


def describe(app: FastAPI) -> dict[str, Any]:
    """What FastAPI says of it, with the schema of errors."""
    return with_schemas(app, [ErrorReply], "serialization")


def status_of(error: errors.RegistryError) -> int:
    """The status of the nearest ancestor in the table."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def reply_to(error: errors.RegistryError, asked: str) -> JSONResponse:
    """The answer for it, also where no handler of the app comes by: in middleware. `asked`: for the log."""
    return _reply(asked, status_of(error), error.message, error.code, error.param)


def noted(asked: str, status: int, code: str, message: str) -> None:
    """A failure's line in the log."""
    logger.warning("%s failed: status=%d code=%s: %s", logged(asked), status, code, logged(message))


def _reply(asked: str, status: int, message: str, code: str, param: str | None = None) -> JSONResponse:
    noted(asked, status, code, message)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    named = None if param is None else _cut(param)
    body = ErrorReply(error=ErrorBody(message=_cut(message), type=kind, param=named, code=code))
    headers = {"www-authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None
    return JSONResponse(body.model_dump(), status, headers)


def _cut(text: str) -> str:
    return text if len(text) <= TOLD_CHARACTERS else f"{text[:TOLD_CHARACTERS]}…"


def install(app: FastAPI, metrics: Metrics, places: Collection[str]) -> None:
    """Every failure of `app` is answered in the one shape. `places`: paths that may have been meant."""

    def reply(
        request: Request, status: int, message: str, code: str, param: str | None = None
    ) -> JSONResponse:
        metrics.error(code)
        return _reply(_asked(request), status, message, code, param)

    async def ours(request: Request, error: errors.RegistryError) -> JSONResponse:
        metrics.error(error.code)
        return reply_to(error, _asked(request))

    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = error.errors()
        message = "; ".join(f"{_place(p['loc'])}: {p['msg']}" for p in problems)
        return reply(request, 400, message, errors.InvalidRequestError.code, _place(problems[0]["loc"]))

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        """What the router itself refuses: unknown paths and methods."""
        message, code = str(error.detail), HTTPStatus(error.status_code).name.lower()
        if error.status_code == HTTPStatus.NOT_FOUND:
            message = unknown_path(request.url.path, places)
        elif allowed := (error.headers or {}).get("Allow"):
            message = f"{request.method} is not possible on {request.url.path}: expected {allowed}"
        return reply(request, error.status_code, message, code)

    async def unexpected(
        request: Request, _: Exception
    ) -> JSONResponse:  # the server logs the traceback itself
        return reply(request, 500, "the registry failed; its log says why", "internal_error")

    app.exception_handler(errors.RegistryError)(ours)
    app.exception_handler(RequestValidationError)(invalid)
    app.exception_handler(HTTPException)(http)
    app.exception_handler(Exception)(unexpected)


def _asked(request: Request) -> str:
    return f"{request.method} {request.url.path}"


def _place(location: Sequence[int | str]) -> str:
    """ "body.force" from ("body", "force"); a broken JSON body has only its offset."""
    return ".".join(str(part) for part in location)
