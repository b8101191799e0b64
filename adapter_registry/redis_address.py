"""Where the Redis of a registry is: one server, whatever sentinels say is the master, or a node of a cluster.

    redis://host:6379/0, rediss://... (TLS), unix:///path       redis-py's own URLs
    redis+sentinel://host:26379,host:26379/service/0            rediss+sentinel:// with TLS, also to them
    redis+cluster://host:6379,host:6379                         rediss+cluster:// with TLS

User, password and options (?ssl_ca_certs=...) are redis-py's in all of them; sentinel_username and
sentinel_password are shown to the sentinels. redis-py has no URLs for the last two kinds: the first of them
is as Redis-Sentinel-Url made it, and Prefect and others take it, the second as `limits` does.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

from adapter_registry.redis_cluster import async_slot_pool, slot_pool

_CONNECT_S = 2.0
_ANSWER_S = 5.0
_SENTINEL_PORT, _REDIS_PORT = 26379, 6379
_KINDS = ("sentinel", "cluster")
_OF_SENTINELS = "sentinel_"


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """`url`: as above. It is never shown: `str` leaves user and password out. What cannot be read raises
    ValueError wherever it is used."""

    url: str

    def __str__(self) -> str:
        if self.kind:
            nodes = ",".join(_shown(*node) for node in self._nodes())
            of = f"{'/'.join(self._path())} by the sentinels" if self.kind == "sentinel" else "cluster"
            return f"{of} {nodes}"
        at = self._options()
        return str(
            at.get("path") or f"{at.get('host', 'localhost')}:{at.get('port', 6379)}/{at.get('db', 0)}"
        )

    @property
    def kind(self) -> str | None:
        """sentinel or cluster; None: one server."""
        scheme = self.url.partition("://")[0].lower()
        kind = scheme.partition("+")[2]
        return kind if kind in _KINDS and scheme.partition("+")[0] in ("redis", "rediss") else None

    def client(self) -> Redis:
        """Of whoever is the master, at every new connection."""
        if self.kind is None:
            return Redis.from_url(self.url, decode_responses=True, **_timeouts())
        options = self._connections()
        if self.kind == "cluster":
            return Redis.from_pool(slot_pool(self._nodes(), options))
        sentinels = Sentinel(self._nodes(), sentinel_kwargs=self._to_sentinels())  # type: ignore[no-untyped-call]
        client: Redis = sentinels.master_for(self._path()[0], **options)  # type: ignore[no-untyped-call]
        return client

    @asynccontextmanager
    async def async_client(self) -> AsyncIterator[AsyncRedis]:
        async with AsyncExitStack() as opened:
            if self.kind is None:
                client = AsyncRedis.from_url(self.url, decode_responses=True, **_timeouts())
            elif self.kind == "cluster":
                client = AsyncRedis.from_pool(async_slot_pool(self._nodes(), self._connections()))
            else:
                known = self._to_sentinels()
                sentinels = AsyncSentinel(self._nodes(), sentinel_kwargs=known)  # type: ignore[no-untyped-call]
                for each in sentinels.sentinels:
                    opened.push_async_callback(each.aclose)
                client = sentinels.master_for(self._path()[0], **self._connections())
            opened.push_async_callback(client.aclose)
            yield client

    def check(self) -> None:
        """Raises ValueError if the URL cannot be read."""
        if self.kind:
            self._path()
        self._options()

    def _connections(self) -> dict[str, Any]:
        """How to connect to a Redis whose place is found out."""
        options = {
            name: value
            for name, value in self._options().items()
            if name not in ("host", "port", "connection_class") and not name.startswith(_OF_SENTINELS)
        }
        return {"ssl": self._tls, **options, "decode_responses": True, **_timeouts()}

    def _to_sentinels(self) -> dict[str, Any]:
        found = self._options()
        tls = {name: value for name, value in found.items() if name.startswith("ssl_")}
        named = {
            name.removeprefix(_OF_SENTINELS): value
            for name, value in found.items()
            if name.startswith(_OF_SENTINELS)
        }
        return {**({"ssl": True, **tls} if self._tls else {}), **named, **_timeouts()}

    @property
    def _tls(self) -> bool:
        return self.url.lower().startswith("rediss")

    def _options(self) -> dict[str, Any]:
        """Of redis-py, from a URL that it knows: with the first of several nodes, and the database alone."""
        if self.kind is None:
            return _parsed(self.url)
        scheme, _, rest = self.url.partition("://")
        before, question, query = rest.partition("?")
        user, at, _ = before.partition("/")[0].rpartition("@")
        database = self._path()[1] if self.kind == "sentinel" else ""
        host, port = self._nodes()[0]
        url = f"{scheme.partition('+')[0]}://{user}{at}{_shown(host, port)}/{database}{question}{query}"
        return _parsed(url)

    def _nodes(self) -> list[tuple[str, int]]:
        hosts = self.url.partition("://")[2].partition("?")[0].partition("/")[0].rpartition("@")[2]
        usual = _SENTINEL_PORT if self.kind == "sentinel" else _REDIS_PORT
        found = [urlsplit(f"//{each}") for each in hosts.split(",")]
        if not all(each.hostname for each in found):
            raise ValueError(f"{hosts!r} is no list of hosts, each with its port")
        return [(each.hostname or "", each.port or usual) for each in found]

    def _path(self) -> tuple[str, str]:
        """Service and database of sentinels; of a cluster, which has one database alone, nothing."""
        path = self.url.partition("://")[2].partition("?")[0].partition("/")[2]
        service, _, database = path.partition("/")
        if self.kind == "cluster" and path not in ("", "0"):
            raise ValueError(f"a cluster has database 0 alone, not {path!r}")
        if self.kind == "sentinel" and not (service and (database or "0").isdecimal()):
            raise ValueError("sentinels are asked for a service by its name, and perhaps a database's number")
        return unquote(service), database or "0"


def _parsed(url: str) -> dict[str, Any]:
    return dict(parse_url(url))  # type: ignore[no-untyped-call]


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _timeouts() -> dict[str, Any]:
    """A command is never sent again: whoever asked for a change must hear that it may have been made."""
    return {
        "socket_connect_timeout": _CONNECT_S,
        "socket_timeout": _ANSWER_S,
        "retry": Retry(NoBackoff(), 0),
    }
