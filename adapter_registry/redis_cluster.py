"""The node of a Redis Cluster that keeps the registry.

All keys of a registry are in one slot of the cluster, by their tag {prad}: so they are on one node, where
MULTI and WATCH are what they are on a Redis alone. Which node that is gets asked for at every new connection,
as redis-py asks sentinels for a master; these pools are redis-py's, with the cluster in the sentinels' place.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from redis import Redis
from redis.asyncio.connection import SSLConnection as AsyncSSLConnection
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncPool
from redis.asyncio.sentinel import SentinelManagedConnection as AsyncManaged
from redis.connection import SSLConnection
from redis.exceptions import ConnectionError as NotConnectedError
from redis.exceptions import MovedError, TimeoutError
from redis.sentinel import SentinelConnectionPool, SentinelManagedConnection

TAG = "{prad}"
"""What all keys begin with: the cluster hashes that part alone."""

_GONE = "the cluster has given the registry's keys to another node"

Node = tuple[str, int]


def slot_pool(nodes: Sequence[Node], options: Mapping[str, Any]) -> SentinelConnectionPool:
    """Connections to the node that has our slot. `nodes`: some of the cluster; `options`: of connections."""
    kind = _SSLConnection if options["ssl"] else _Connection
    more = {"connection_class": kind, **_without_ssl(options)}
    return SentinelConnectionPool(TAG, _Slot(nodes, options), **more)  # type: ignore[no-untyped-call]


def async_slot_pool(nodes: Sequence[Node], options: Mapping[str, Any]) -> AsyncPool:
    kind = _AsyncSSLConnection if options["ssl"] else _AsyncConnection
    more = {"connection_class": kind, **_without_ssl(options)}
    return AsyncPool(TAG, _AsyncSlot(nodes, options), **more)  # type: ignore[no-untyped-call]


def _without_ssl(options: Mapping[str, Any]) -> dict[str, Any]:
    """The class of the connections says it."""
    return {name: value for name, value in options.items() if name != "ssl"}


class _Slot:
    """Who has the slot of a key. It has the method of redis-py's `Sentinel` that its pools call."""

    def __init__(self, nodes: Sequence[Node], options: Mapping[str, Any]) -> None:
        self._nodes = nodes
        self._options = options

    def discover_master(self, key: str) -> Node:
        """Raises what the last node raised, if none answers."""
        failed: Exception | None = None
        for host, port in self._nodes:
            with Redis(host=host, port=port, **self._options) as client:
                try:
                    client.exists(key)
                    return host, port
                except MovedError as moved:  # without a host: on the same one
                    return moved.host or host, moved.port
                except (NotConnectedError, TimeoutError) as error:
                    failed = error
        raise failed or NotConnectedError("the cluster has no nodes")


class _AsyncSlot:
    def __init__(self, nodes: Sequence[Node], options: Mapping[str, Any]) -> None:
        self._slot = _Slot(nodes, options)

    async def discover_master(self, key: str) -> Node:
        return await asyncio.to_thread(self._slot.discover_master, key)


class _Connection(SentinelManagedConnection):
    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotConnectedError if the slot went elsewhere: the next connection finds it."""
        try:
            return super().read_response(*args, **kwargs)
        except MovedError as moved:
            self.disconnect()  # type: ignore[no-untyped-call]
            raise NotConnectedError(_GONE) from moved


class _SSLConnection(_Connection, SSLConnection):
    pass


class _AsyncConnection(AsyncManaged):
    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """As above."""
        try:
            return await super().read_response(*args, **kwargs)
        except MovedError as moved:
            await self.disconnect()
            raise NotConnectedError(_GONE) from moved


class _AsyncSSLConnection(_AsyncConnection, AsyncSSLConnection):
    pass
