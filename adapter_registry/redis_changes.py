"""What other registries on the same Redis change, heard through its stream of changes.

The last revision heard is the place in the stream from which the next read goes on: nothing is missed while
Redis, or this registry, is away.
"""

import asyncio
import logging
from typing import Any

from adapter_registry.changes import ChangeFeed
from adapter_registry.errors import StoreUnavailableError
from adapter_registry.redis_server import REGISTRY, answering, check
from adapter_registry.redis_store import RedisStore
from adapter_registry.redis_stream import CHANGES

logger = logging.getLogger(__name__)

_WAIT_MS = 2_000  # in one read; a Redis that hangs is given up soon after
_RETRY_S = 0.3


class RedisChanges:
    """On the server's event loop."""

    def __init__(self, store: RedisStore, feed: ChangeFeed) -> None:
        self._store = store
        self._feed = feed

    async def follow(self) -> None:
        """Goes on until cancelled; a Redis that is away is tried again, and said once."""
        away = False
        async with self._store.address.async_client() as redis:
            while True:
                try:
                    if away:
                        await self._return()
                    away = False
                    with answering(self._store.address):
                        place: dict[Any, Any] = {CHANGES: f"{self._feed.revision}-0"}
                        if await redis.xread(place, count=1, block=_WAIT_MS):
                            head = await redis.hmget(REGISTRY, "schema", "id", "revision")
                            await self._feed.publish(check(head, self._store.identity))
                except StoreUnavailableError as error:
                    if not away:
                        logger.error("%s", error)
                    away = True
                    await asyncio.sleep(_RETRY_S)
                except Exception:  # whatever it was: what this registry itself changes is heard without
                    logger.exception("following the changes of other registries failed")
                    away = True
                    await asyncio.sleep(_RETRY_S)

    async def _return(self) -> None:
        """Redis answers again; it may have been started with other settings, or older data."""
        revision = await asyncio.to_thread(self._store.revision)
        logger.warning("the registry's Redis answers again, at revision %d", revision)
        for warning in await asyncio.to_thread(self._store.warnings):
            logger.warning("%s", warning)
        if revision < self._feed.revision:
            logger.error(
                "Redis has lost the changes from revision %d to %d", revision + 1, self._feed.revision
            )
            await self._feed.restart(revision)
        else:
            await self._feed.publish(revision)
