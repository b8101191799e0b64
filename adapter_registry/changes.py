"""Waiting for the next revision: how a running prefill learns of a change at once, without polling.

Lives on the server's event loop; whoever changes something calls `publish` afterwards.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from adapter_registry.errors import TooManyWaitersError


class ChangeFeed:
    """`max_waiters`: requests that wait at once; `max_per_address`: of them from one address."""

    def __init__(self, revision: int, max_waiters: int, max_per_address: int) -> None:
        self.revision = revision
        self._max_waiters = max_waiters
        self._max_per_address = max_per_address
        self._closed = False
        self._changed = asyncio.Condition()
        self._waiters: Counter[str] = Counter()

    @property
    def waiters(self) -> int:
        return self._waiters.total()

    @property
    def closed(self) -> bool:
        return self._closed

    async def publish(self, revision: int) -> None:
        async with self._changed:
            self.revision = max(self.revision, revision)
            self._changed.notify_all()

    async def restart(self, revision: int) -> None:
        """The data went back to an earlier revision: it counts from there."""
        async with self._changed:
            self.revision = revision
            self._changed.notify_all()

    async def wait(self, after: int, seconds: float, *, address: str, known: bool) -> bool:
        """Whether the revision is another than `after`, now or within `seconds`; False early on `close`.

        Another, not a later one: a client that knows a later revision followed a registry whose data are
        gone, and must not wait for it to catch up. Raises what `place` raises.
        """
        if self.revision != after:
            return True
        with self.place(address, known=known):
            return await self.changed(after, seconds)

    @contextmanager
    def place(self, address: str, *, known: bool) -> Iterator[None]:
        """One of the places there are for those who wait. One that is `known` as a replica gets its own,
        however many others wait. Raises TooManyWaitersError."""
        self._require_place(address, known)
        self._waiters[address] += 1
        try:
            yield
        finally:
            self._waiters[address] -= 1
            self._waiters += Counter()  # forgets those with none

    async def changed(self, after: int, seconds: float) -> bool:
        """As `wait`, for who has a place."""
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self._closed or self.revision != after)
        except TimeoutError:
            return False
        return self.revision != after

    def _require_place(self, address: str, known: bool) -> None:
        if self._waiters[address] >= self._max_per_address:
            raise TooManyWaitersError(
                f"{self._waiters[address]} requests from {address} already wait for changes, as many as one "
                "client may have (max_waiters_per_client)"
            )
        if not known and self.waiters >= self._max_waiters:
            raise TooManyWaitersError(f"{self.waiters} requests already wait for changes; try again later")

    async def close(self) -> None:
        """Sends everyone home; nobody waits any more."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
