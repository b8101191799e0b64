"""What Prometheus sees of the HTTP face. Labels are routes, statuses, known tasks: never a client's text."""

import time

from prometheus_client import CollectorRegistry, Counter, Histogram

from prefill_service.api.record import RequestRecord

BASE_TASK = ""
"""The task label of the plain model, and of requests that ended before their task was known."""

_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_DURATION = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


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
