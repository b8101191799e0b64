"""What is noted of one HTTP request, and what its client is told when it fails.

Notes are a line in the log if it fails, or of every request by choice, without a word of its prompt; and
numbers for the metrics, whose labels are routes, statuses, known tasks: never a client's text. What went
wrong becomes OpenAI's error object, and never a word too much. A client that goes away is nobody to be told:
its request ends at once, streaming or not.
"""

import asyncio
import logging
import math
import re
import time
import uuid
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry, Counter, Histogram, Summary
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter_registry.messages import TIMES, no_times
from prad.http.hosts import unknown_path
from prad.http.logs import logged
from prefill_service.api.problems import cut
from prefill_service.errors import InternalError, InvalidRequestError, ServingError

logger = logging.getLogger(__name__)

BASE_TASK = ""
"""The task label of the plain model, and of requests that ended before their task was known."""

_KEY = "prad.request_record"
ROUTE = "prad.route"
"""In a scope: its route's name in the metrics, where that is not the path's."""
_CLIENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")
PASSED_OVER = "x-prad-ignored-fields"
_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_DURATION = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
CLIENT_GONE = 499
"""The status that logs and metrics show for a client that went away, as nginx has it."""
NO_ROUTE = "(none)"


@dataclass(slots=True)
class RequestRecord:
    """`id` is the client's x-request-id if it sent a harmless one; the engine's ids are drawn elsewhere.

    `task`, `version`, `digest`, `routing`: what it resolved to, and by which revision of the task's routing.
    `key`: the name of the key that was shown.
    `status`: how a stream really ended, where that differs from the status that was sent when it began;
    `failure`: what the client was told; `passed_over`: fields of its body that are not known; `stopped_by`:
    the stop text that ended the choice that ended last.
    """

    id: str
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    task: str | None = None
    version: int | None = None
    digest: str = ""
    routing: int | None = None
    key: str | None = None
    status: int | None = None
    failure: ServingError | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    passed_over: set[str] = field(default_factory=set)
    stopped_by: str | None = None

    def resolved(self, task: str, version: int, digest: str, routing: int | None) -> None:
        self.task, self.version, self.digest, self.routing = task, version, digest, routing

    def count_token(self, cached_tokens: int = 0) -> None:
        self.cached_tokens += cached_tokens
        if self.first_token is None:
            self.first_token = time.monotonic()
        self.completion_tokens += 1

    def line(self, scope: Scope, status: int) -> str:
        """For the log, in which a client's text can neither begin a line nor be long."""
        named = f"request {self.id} {logged(scope['method'])} {logged(scope['path'])}"
        by = (
            f" version={self.version} digest={self.digest[:12]} routing={self.routing}"
            if self.version
            else ""
        )
        key = f" key={self.key}" if self.key else ""
        return f"{named}{key} task={self.task or '-'}{by} status={self.status or status}"

    def usage(self) -> dict[str, object]:
        """OpenAI's usage object: each prompt counts once, all its choices' tokens count."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def begin_record(scope: Scope) -> RequestRecord:
    """A record in the connection's scope, where `record_of` finds it."""
    sent = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), "")
    record = RequestRecord(sent if _CLIENT_ID.fullmatch(sent) else f"req-{uuid.uuid4().hex}")
    scope[_KEY] = record
    return record


def record_of(request: HTTPConnection) -> RequestRecord:
    record: RequestRecord = request.scope[_KEY]
    return record


@dataclass(slots=True)
class Tally:
    """What a version answered since somebody took it: see `VersionTraffic`."""

    requests: int = 0
    failed: int = 0
    tokens: int = 0
    first_token: list[int] = field(default_factory=no_times)
    duration: list[int] = field(default_factory=no_times)

    def note(self, record: RequestRecord, status: int) -> None:
        self.requests += 1
        self.failed += status >= 400 and status != CLIENT_GONE
        self.tokens += record.completion_tokens
        self.duration[bisect_left(TIMES, time.monotonic() - record.started)] += 1
        if record.first_token is not None:
            self.first_token[bisect_left(TIMES, record.first_token - record.started)] += 1


Tallies = dict[tuple[str, int], Tally]
"""By task and version; the plain model is version 0 of `BASE_TASK`."""


class Metrics:
    """Counters and histograms in `registry`, which the rest of the service may share. `tallies`: the same of
    late, for the registry's console, with times of each version, which would be too many series here."""

    def __init__(self, registry: CollectorRegistry, tallies: Tallies | None = None) -> None:
        self.registry = registry
        self._tallies = tallies
        self._requests = Counter(
            "prad_http_requests",
            "HTTP requests by outcome.",
            ("route", "status", "task", "version"),
            registry=registry,
        )
        self._duration = Histogram(
            "prad_http_request_duration_seconds",
            "From a request's head to the end of its answer.",
            ("route",),
            buckets=_DURATION,
            registry=registry,
        )
        self._first_token = Histogram(
            "prad_time_to_first_token_seconds",
            "From a request's head to its first output token.",
            ("route",),
            buckets=_FIRST_TOKEN,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "prad_prompt_tokens",
            "Prompt tokens of admitted requests.",
            ("task", "version"),
            registry=registry,
        )
        self._completion_tokens = Counter(
            "prad_completion_tokens", "Output tokens.", ("task", "version"), registry=registry
        )
        by_task = partial(Summary, labelnames=("task",), registry=registry)
        self._task_first = by_task("prad_task_first_token_seconds", "Until the first output token.")
        self._task_interval = by_task(
            "prad_task_token_interval_seconds", "Of each output token behind a request's first, on average."
        )

    def observe(self, record: RequestRecord, route: str, status: int) -> None:
        """One finished request."""
        task = (record.task or BASE_TASK, str(record.version or ""))
        status = record.status or status
        self._requests.labels(route, str(status), *task).inc()
        if self._tallies is not None and (record.task or record.prompt_tokens):
            name = (record.task or BASE_TASK, record.version or 0)
            self._tallies.setdefault(name, Tally()).note(record, status)
        self._duration.labels(route).observe(time.monotonic() - record.started)
        if record.first_token is not None:
            self._first_token.labels(route).observe(record.first_token - record.started)
            self._task_first.labels(task[0]).observe(record.first_token - record.started)
            if record.completion_tokens > 1:
                took = time.monotonic() - record.first_token
                self._task_interval.labels(task[0]).observe(took / (record.completion_tokens - 1))
        if record.prompt_tokens:
            self._prompt_tokens.labels(*task).inc(record.prompt_tokens)
            self._completion_tokens.labels(*task).inc(record.completion_tokens)


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


Face = Callable[[Scope, Send], tuple[Scope, Send]]
"""Of another protocol, on its paths: how it words a refusal."""


class Observe:
    """The outermost layer of the app but for CORS, which answers browsers' preflights by itself and adds its
    headers to refusals, too: every request gets its record and is counted, no exception gets out.

    Plain ASGI: streamed chunks pass through untouched. `log`: also requests that do not fail.
    `faces`: by path, of all below it, too.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, log: bool, faces: Mapping[str, Face]) -> None:
        self._app = app
        self._metrics = metrics
        self._log = log
        self._faces = faces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        for path, face in self._faces.items():
            if scope["path"] == path or scope["path"].startswith(f"{path}/"):
                scope, send = face(scope, send)
        record = begin_record(scope)
        status: int | None = None

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
                if record.passed_over:
                    MutableHeaders(scope=message)[PASSED_OVER] = _listed(record.passed_over)
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except ClientGoneError:
            record.status = CLIENT_GONE
        except Exception as error:
            told = client_error(error, record)
            record.status = told.status
            if status is not None:
                raise
            await error_response(told)(scope, receive, noting_send)
        finally:
            route = str(scope.get(ROUTE) or getattr(scope.get("route"), "path", NO_ROUTE))
            self._metrics.observe(record, route, status or CLIENT_GONE)
            if self._log or record.failure:
                self._write(record, record.line(scope, status or CLIENT_GONE))

    def _write(self, record: RequestRecord, line: str) -> None:
        if failure := record.failure:
            reason = "wrong value, not logged" if failure.quotes else logged(failure.message)
            logger.warning("%s code=%s param=%s: %s", line, failure.code, logged(failure.param), reason)
        else:
            seconds = time.monotonic() - record.started
            tokens = (record.prompt_tokens, record.cached_tokens, record.completion_tokens)
            logger.info("%s seconds=%.3f prompt=%d cached=%d completion=%d", line, seconds, *tokens)


def client_error(error: Exception, record: RequestRecord) -> ServingError:
    """What the client is told; what is ours to mend goes to the log, under the request's id."""
    if not isinstance(error, ServingError) or isinstance(error, InternalError):
        logger.error("request %s failed", record.id, exc_info=error)
    told = error if isinstance(error, ServingError) else None
    record.failure = told or InternalError(f"internal error; the log has it under {record.id}")
    return record.failure


def error_body(error: ServingError) -> dict[str, dict[str, str | None]]:
    return {"error": {name: text and cut(text) for name, text in error.body()["error"].items()}}


def error_response(error: ServingError) -> Response:
    headers = {"connection": "close"} if error.closes else {}
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    return JsonResponse(error_body(error), error.status, headers)


def add_failure_handlers(app: FastAPI, places: Collection[str]) -> None:
    """Everything else ends in `Observe` as an internal error. `places`: paths that may have been meant."""
    app.add_exception_handler(ServingError, _serving_error)
    app.add_exception_handler(HTTPException, partial(_http_error, places=places))


async def _serving_error(request: Request, error: Exception) -> Response:
    return error_response(client_error(error, record_of(request)))


async def _http_error(request: Request, error: Exception, places: Collection[str]) -> Response:
    """What the router itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow")
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            message, code = unknown_path(request.url.path, places), "not_found"
        case HTTPStatus.METHOD_NOT_ALLOWED:
            message = f"{request.method} is not possible on {request.url.path}: expected {allowed}"
            code = "method_not_allowed"
        case _:
            message, code = str(error.detail), "http_error"
    failure = record_of(request).failure = InvalidRequestError(message, code=code)
    return JsonResponse(error_body(failure), error.status_code, error.headers)


def _listed(names: set[str]) -> str:
    """For a header: what is no name is not written, nor are many."""
    found = [name if _CLIENT_ID.fullmatch(name) else "(no name)" for name in sorted(names)[:20]]
    return ", ".join(found if len(names) <= 20 else [*found, f"and {len(names) - 20} more"])
