"""From what went wrong to what the client reads: always OpenAI's error object, and never a word too much.

A client that goes away is nobody to be told: its request ends at once, streaming or not.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefill_service.api.fields import shown
from prefill_service.api.observe import Metrics, RequestRecord, begin_record, record_of
from prefill_service.errors import InternalError, InvalidRequestError, ServingError

logger = logging.getLogger(__name__)

CLIENT_GONE = 499
"""The status that logs and metrics show for a client that went away, as nginx has it."""
NO_ROUTE = "(none)"
SHOWN_PROBLEMS = 3
TOLD_CHARACTERS = 1000
"""Of every text in an error: what a client sent may be quoted there."""
NAMED_CHARACTERS = 200
"""Of a field's name among them."""


class JsonResponse(JSONResponse):
    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class ClientGoneError(Exception):
    """The connection closed before the answer was complete; nobody is left to be told."""


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncGenerator[None, None]:
    """Cancels the block when the client disconnects, and turns that into ClientGoneError.

    The block runs in the caller's own task (as under `asyncio.timeout`), so generators that it advances are
    closed there too. The body must have been read. Servers also report a disconnect after a complete
    response: the last byte has to be sent outside.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGoneError from None
        raise
    finally:
        watcher.cancel()


class Observe:
    """The outermost layer of the app: every request gets its record and is counted, no exception gets out.

    Plain ASGI: streamed chunks pass through untouched.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = begin_record(scope)
        status: int | None = None

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except ClientGoneError:
            record.status = CLIENT_GONE
        except Exception as error:
            told = as_told(error, record)
            record.status = told.status
            if status is not None:
                raise
            await error_response(told)(scope, receive, noting_send)
        finally:
            route = getattr(scope.get("route"), "path", NO_ROUTE)
            self._metrics.observe(record, route, status or CLIENT_GONE)


def as_told(error: Exception, record: RequestRecord) -> ServingError:
    """What the client is told; what is ours to mend goes to the log, under the request's id."""
    if not isinstance(error, ServingError) or isinstance(error, InternalError):
        logger.error("request %s failed", record.id, exc_info=error)
    if isinstance(error, ServingError):
        return error
    return InternalError(f"internal error; the log has it under {record.id}")


def error_body(error: ServingError) -> dict[str, dict[str, str | None]]:
    return {"error": {name: text and _cut(text) for name, text in error.body()["error"].items()}}


def error_response(error: ServingError) -> Response:
    headers = {"connection": "close"} if error.closes else {}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    return JsonResponse(error_body(error), error.status, headers)


def add_failure_handlers(app: FastAPI) -> None:
    """Everything else ends in `Observe` as an internal error."""
    app.add_exception_handler(ServingError, _serving_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)


async def _serving_error(request: Request, error: Exception) -> Response:
    return error_response(as_told(error, record_of(request)))


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    in_the_body = [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]
    return error_response(invalid_request(in_the_body))


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
    body = error_body(InvalidRequestError(message, code=code))
    return JsonResponse(body, error.status_code, error.headers)


def invalid_request(problems: Sequence[Mapping[str, Any]]) -> InvalidRequestError:
    """pydantic's errors as one: messages name the field, the fault and what was expected."""
    return InvalidRequestError(
        "; ".join(_cut(_describe(p)) for p in problems[:SHOWN_PROBLEMS]), param=_field(problems[0])
    )


def _describe(problem: Mapping[str, Any]) -> str:
    field, message = _field(problem), problem["msg"]
    subject = "the body" if field is None else f"'{_cut(field, NAMED_CHARACTERS)}'"
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown field {subject}"
        case "missing":
            return f"field {subject} is required"
        case "refused":
            return str(message)
        case "value_error":
            return str(message).removeprefix("Value error, ")
        case "expected":
            return f"{subject}: {message}"
        case "model_type" | "model_attributes_type":
            return f"{subject}: expected an object, got {shown(problem['input'])}"
    return f"{subject}: {message[0].lower()}{message[1:]}, got {shown(problem['input'])}"


def _field(problem: Mapping[str, Any]) -> str | None:
    parts = [str(part) for part in problem["loc"]]
    if problem["type"] == "refused":
        parts.append(str(problem["ctx"]["field"]))
    return ".".join(parts) or None


def _cut(text: str, most: int = TOLD_CHARACTERS) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
