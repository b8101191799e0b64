"""Which prefill replicas follow this registry, and which routing is in force at each.

A replica that follows asks for the next change, and says after which revision: that one is in force there.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from adapter_registry.messages import Replica, ReplicaState

GRACE_SECONDS = 30.0
"""A replica may be between two polls, loading a version, for so long without being missed."""

MAX_REMEMBERED = 1024


@dataclass(slots=True)
class _Seen:
    """`follows`: it has asked for changes, not only reported a probe; `revision`: in force there;
    `announced`: the latest that it was told; `fetching`: adapters on their way to it; `troubles`: what it
    cannot have, and why."""

    at: float = 0.0
    waiting: int = 0
    follows: bool = False
    revision: int = 0
    announced: int = 0
    fetching: int = 0
    troubles: tuple[str, ...] = ()
    gone: bool = False


class Replicas:
    """In memory only, on the server's event loop. `clock` is in seconds since the epoch."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._moved = asyncio.Condition()
        self._closed = False

    @asynccontextmanager
    async def following(
        self, name: str, revision: int, troubles: tuple[str, ...] = (), fetching: int = 0
    ) -> AsyncIterator[None]:
        """Held while the replica `name`, where `revision` is in force, waits for changes.

        An empty name is nobody (an operator). One that hangs up instead of waiting is gone.
        """
        if not name:
            yield
            return
        seen = self._touch(name)
        seen.follows, seen.revision = True, revision
        seen.troubles, seen.fetching = troubles, fetching
        seen.waiting += 1
        await self._tell()
        try:
            yield
        except asyncio.CancelledError:
            seen.gone = seen.waiting == 1
            raise
        finally:
            seen.waiting -= 1
            seen.at = self._clock()

    def tell(self, name: str, revision: int) -> None:
        """The replica `name` is told of a revision."""
        if name in self._seen:
            self._seen[name].announced = revision

    def heard(self, name: str) -> None:
        """The replica `name` reported a probe."""
        if name:
            self._touch(name)

    def knows(self, name: str) -> bool:
        """Whether the replica `name` is connected."""
        seen = self._seen.get(name)
        return seen is not None and seen.follows and self._connected(seen)

    def in_force(self) -> dict[str, int]:
        """The revision in force at each connected replica that follows."""
        return {name: seen.revision for name, seen in sorted(self._seen.items()) if self.knows(name)}

    def troubled(self, prefix: str) -> dict[str, str]:
        """The connected replicas with a trouble that begins so, and how that goes on."""
        return {
            name: trouble.removeprefix(prefix)
            for name in self.in_force()
            for trouble in self._seen[name].troubles
            if trouble.startswith(prefix)
        }

    def pending(self, revision: int, *, fetched: bool = False) -> list[str]:
        """The connected replicas where an earlier revision is in force; `fetched`: or adapters miss."""
        return [
            name
            for name, known in self.in_force().items()
            if known < revision or (fetched and self._seen[name].fetching)
        ]

    async def wait(self, revision: int, seconds: float, *, fetched: bool = False) -> None:
        """Until `revision` is in force at all connected replicas, at most `seconds`."""

        def there() -> bool:
            return self._closed or not self.pending(revision, fetched=fetched)

        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._moved:
                await self._moved.wait_for(there)

    async def close(self) -> None:
        """Nobody is waited for any more."""
        self._closed = True
        await self._tell()

    def list(self, latest: int) -> tuple[Replica, ...]:
        """`latest`: the registry's revision."""
        return tuple(
            Replica(
                name=name,
                connected=self._connected(seen),
                state=self._state(seen, latest),
                troubles=seen.troubles,
                revision=seen.revision if seen.follows else None,
                fetching=seen.fetching,
                last_seen=datetime.fromtimestamp(seen.at, UTC).isoformat(timespec="milliseconds"),
            )
            for name, seen in sorted(self._seen.items())
        )

    def _state(self, seen: _Seen, latest: int) -> ReplicaState:
        if not self._connected(seen):
            return ReplicaState.AWAY
        if seen.troubles:
            return ReplicaState.FAILED
        if seen.follows and seen.revision >= latest:
            return ReplicaState.LOADING if seen.fetching else ReplicaState.READY
        return ReplicaState.LOADING if seen.announced >= latest else ReplicaState.ANNOUNCED

    def _connected(self, seen: _Seen) -> bool:
        return seen.waiting > 0 or (not seen.gone and self._clock() - seen.at < GRACE_SECONDS)

    async def _tell(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    def _touch(self, name: str) -> _Seen:
        seen = self._seen.pop(name, None) or _Seen()
        seen.at, seen.gone = self._clock(), False
        self._seen[name] = seen  # at the end: the first in the dictionary is the longest unheard
        if len(self._seen) > MAX_REMEMBERED:
            idle = (name for name, seen in self._seen.items() if not self._connected(seen))
            del self._seen[next(idle, next(iter(self._seen)))]
        return seen
