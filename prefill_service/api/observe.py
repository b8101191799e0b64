"""What is noted about one HTTP request while it runs: its id for the log, its numbers for the metrics.

Labels of metrics are routes, statuses, known tasks: never a client's text.
"""

import re
import time
import uuid
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.requests import HTTPConnection
from starlette.types import Scope

BASE_TASK = ""
"""The task label of the plain model, and of requests that ended before their task was known."""

_KEY = "prad.request_record"
_CLIENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")
_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_DURATION = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(slots=True)
class RequestRecord:
    """`id` is the client's x-request-id if it sent a harmless one; the engine's ids are drawn elsewhere.

    `status`: how a stream really ended, where that differs from the status that was sent when it began.
    """

    id: str
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    task: str | None = None
    status: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def count_token(self, cached_tokens: int = 0) -> None:
        self.cached_tokens += cached_tokens
        if self.first_token is None:
            self.first_token = time.monotonic()
        self.completion_tokens += 1

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


class Metrics:
    """Counters and histograms in `registry`, which the rest of the service may share."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._requests = Counter(
            "prad_http_requests", "HTTP requests by outcome.", ("route", "status", "task"), registry=registry
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
            "prad_prompt_tokens", "Prompt tokens of admitted requests.", ("task",), registry=registry
        )
        self._completion_tokens = Counter(
            "prad_completion_tokens", "Output tokens.", ("task",), registry=registry
        )

    def observe(self, record: RequestRecord, route: str, status: int) -> None:
        """One finished request."""
        task = record.task or BASE_TASK
        self._requests.labels(route, str(record.status or status), task).inc()
        self._duration.labels(route).observe(time.monotonic() - record.started)
        if record.first_token is not None:
            self._first_token.labels(route).observe(record.first_token - record.started)
        if record.prompt_tokens:
            self._prompt_tokens.labels(task).inc(record.prompt_tokens)
            self._completion_tokens.labels(task).inc(record.completion_tokens)
