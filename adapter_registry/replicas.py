"""Which prefill replicas follow this registry: those whose long poll waits, or ended a moment ago."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from adapter_registry.api import Replica

GRACE_SECONDS = 30.0
"""A replica may be between two polls, loading a version, for so long without being missed."""

MAX_REMEMBERED = 1024


@dataclass(slots=True)
class _Seen:
    waiting: int
    at: float


class Replicas:
    """In memory only. `clock` is in seconds since the epoch."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    @contextmanager
    def following(self, name: str) -> Iterator[None]:
        """Held while the replica `name` waits for changes; an empty name is nobody (an operator)."""
        if not name:
            yield
            return
        seen = self._touch(name)
        seen.waiting += 1
        try:
            yield
        finally:
            seen.waiting -= 1
            seen.at = self._clock()

    def heard(self, name: str) -> None:
        """The replica `name` reported a probe."""
        if name:
            self._touch(name)

    def list(self) -> tuple[Replica, ...]:
        now = self._clock()
        return tuple(
            Replica(
                name=name,
                connected=seen.waiting > 0 or now - seen.at < GRACE_SECONDS,
                last_seen=datetime.fromtimestamp(seen.at, UTC).isoformat(timespec="milliseconds"),
            )
            for name, seen in sorted(self._seen.items())
        )

    def _touch(self, name: str) -> _Seen:
        seen = self._seen.pop(name, None) or _Seen(0, 0.0)
        seen.at = self._clock()
        self._seen[name] = seen  # at the end: the first in the dictionary is the longest unheard
        if len(self._seen) > MAX_REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return seen
