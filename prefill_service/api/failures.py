"""The one table from what went wrong to what the client reads: always OpenAI's error object."""

import logging
import math
from http import HTTPStatus

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from prefill_service.api.record import record_of
from prefill_service.errors import InternalError, ServingError

logger = logging.getLogger(__name__)


def add_failure_handlers(app: FastAPI) -> None:
    """Everything else ends in `Observe` as an internal error."""
    app.add_exception_handler(ServingError, _serving_error)
    app.add_exception_handler(HTTPException, _http_error)


async def _serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    if isinstance(error, InternalError):
        logger.error("request %s failed", record_of(request).id, exc_info=error)
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow")
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            message, code = f"there is no {request.url.path}", "not_found"
        case HTTPStatus.METHOD_NOT_ALLOWED:
            message = f"{request.method} is not possible on {request.url.path}: expected {allowed}"
            code = "method_not_allowed"
        case _:
            message, code = str(error.detail), "http_error"
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return JSONResponse(body, error.status_code, error.headers)
