"""Waiting for the next revision: how a running prefill learns of a change at once, without polling.

Lives on the server's event loop; whoever changes something calls `publish` afterwards.
"""

import asyncio

from adapter_registry.errors import TooManyWaitersError


class ChangeFeed:
    def __init__(self, revision: int, max_waiters: int) -> None:
        self._revision = revision
        self._max_waiters = max_waiters
        self._closed = False
        self._changed = asyncio.Condition()
        self.waiters = 0

    async def publish(self, revision: int) -> None:
        async with self._changed:
            self._revision = max(self._revision, revision)
            self._changed.notify_all()

    async def wait(self, after: int, seconds: float) -> bool:
        """Whether the revision is another than `after`, now or within `seconds`; False early on `close`.

        Another, not a later one: a client that knows a later revision followed a registry whose data are
        gone, and must not wait for it to catch up. Raises TooManyWaitersError.
        """
        if self._revision != after:
            return True
        if self.waiters >= self._max_waiters:
            raise TooManyWaitersError(f"{self.waiters} requests already wait for changes; try again later")
        self.waiters += 1
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self._closed or self._revision != after)
        except TimeoutError:
            return False
        finally:
            self.waiters -= 1
        return self._revision != after

    async def close(self) -> None:
        """Sends everyone home; nobody waits any more."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
