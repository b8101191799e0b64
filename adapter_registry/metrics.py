"""What the registry tells Prometheus. One registry of metrics per server: nothing global."""

from collections import Counter as Count

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from adapter_registry.messages import RoutingState
from adapter_registry.versions import Event, State


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._pushes = Counter(
            "prad_registry_pushes", "Adapters pushed.", ["outcome"], registry=self._registry
        )
        self._events = Counter(
            "prad_registry_events",
            "Probes, promotions, splits, rollbacks, retirements.",
            ["event"],
            registry=self._registry,
        )
        self._errors = Counter(
            "prad_registry_errors", "Requests refused or failed.", ["code"], registry=self._registry
        )
        self._versions = Gauge(
            "prad_registry_versions", "Adapter versions.", ["state"], registry=self._registry
        )
        self._tasks = Gauge("prad_registry_tasks", "Tasks.", registry=self._registry)
        self._revision = Gauge("prad_registry_revision", "Revision.", registry=self._registry)
        self._waiters = Gauge(
            "prad_registry_waiters", "Requests waiting for changes.", registry=self._registry
        )
        self._replicas = Gauge(
            "prad_registry_replicas", "Prefill replicas connected.", registry=self._registry
        )
        self._store_up = Gauge(
            "prad_registry_store_up", "Whether the database answers.", registry=self._registry
        )
        self._store_warnings = Gauge(
            "prad_registry_store_warnings",
            "Reasons why what is acknowledged might not last; the log and /ready name them.",
            registry=self._registry,
        )

    def pushed(self, *, created: bool) -> None:
        self._pushes.labels("created" if created else "known").inc()

    def event(self, event: Event) -> None:
        self._events.labels(event).inc()

    def error(self, code: str) -> None:
        self._errors.labels(code).inc()

    def stored(self, state: RoutingState | None, warnings: int) -> None:
        """What the store holds now; None: it does not answer, and what it held last is told on."""
        self._store_up.set(state is not None)
        if state is None:
            return
        self._store_warnings.set(warnings)
        count = Count(version.state for task in state.tasks for version in task.versions)
        for name in State:
            self._versions.labels(name).set(count[name])
        self._tasks.set(len(state.tasks))
        self._revision.set(state.revision)

    def page(self, waiters: int, replicas: int) -> bytes:
        """The text that Prometheus scrapes."""
        self._waiters.set(waiters)
        self._replicas.set(replicas)
        return generate_latest(self._registry)
