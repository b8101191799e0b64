"""What a decode service says about itself to Prometheus."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from decode_service.errors import BindError
from decode_service.protocol import EngineStatus

_STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """One registry per service, so that several may live in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._tokens = Counter("prad_decode_tokens", "Tokens computed.", registry=self.registry)
        self._seconds = Histogram(
            "prad_decode_step_seconds",
            "Time of one decode step.",
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        )

    def watch(self, status: Callable[[], EngineStatus]) -> None:
        """Gauges read the engine when they are scraped."""
        for name, text, read in (
            ("prad_decode_blocks", "KV blocks.", lambda: status().total_blocks),
            ("prad_decode_free_blocks", "KV blocks that are free.", lambda: status().free_blocks),
            ("prad_decode_running_sequences", "Running sequences.", lambda: status().running_sequences),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def step(self, seconds: float, tokens: int) -> None:
        self._seconds.observe(seconds)
        self._tokens.inc(tokens)


@contextmanager
def served(registry: CollectorRegistry, host: str, port: int) -> Iterator[None]:
    """GET /metrics on its own port, inside the `with`. Raises BindError."""
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise BindError(f"metrics cannot be served on {host}:{port}: {error.strerror}") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
