"""The Redis that keeps a registry: reached, said to be away in one kind of error, asked whether it lasts.

Two keys are enough to know it again: its schema and its id, which is drawn when a registry begins there.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis import Redis
from redis.asyncio.sentinel import MasterNotFoundError as AsyncMasterNotFoundError
from redis.client import Pipeline
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    RedisError,
    ResponseError,
    TimeoutError,
    WatchError,
)
from redis.exceptions import ConnectionError as NotConnectedError
from redis.sentinel import MasterNotFoundError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from adapter_registry.errors import CannotStartError, StoreUnavailableError
from adapter_registry.redis_address import RedisAddress
from adapter_registry.redis_cluster import TAG
from adapter_registry.sqlite_schema import require_known

SCHEMA = 3

REGISTRY = f"{TAG}:registry"
"""Hash: `schema`, `id`, `revision`. Every change changes it, so it is what a transaction watches."""

_WAITED = f"{TAG}:waited"
_REPLICATED_MS = 2_000

_LONGEST = 200  # characters of an error that are told
_START_S = 10.0
"""How long a start waits for a Redis that starts as well."""


@contextmanager
def answering(address: RedisAddress) -> Iterator[None]:
    """Raises StoreUnavailableError in place of what redis-py raises."""
    try:
        yield
    except RedisError as error:
        if isinstance(error, WatchError) and _is_overtaken(error):
            raise  # for whoever watches
        raise StoreUnavailableError(
            f"the registry's Redis at {address} cannot be used: {_said(error)}. What is served goes on being "
            "served; a change asked for now may have been made: look, then repeat"
        ) from error


def require_overtaken(error: WatchError) -> None:
    """Raises the error unless somebody else was faster: the connection was lost, and the watch with it.
    Whether the change was made is not known, so it must not be made again unasked."""
    if not _is_overtaken(error):
        raise error


def _is_overtaken(error: WatchError) -> bool:
    return not isinstance(error.__context__, NotConnectedError | TimeoutError)


def start(address: str) -> tuple[Redis, RedisAddress, str]:
    """A client of the Redis at the URL, and the registry's id there; a new one begins in an empty database.

    Raises CannotStartError if it does not answer in some seconds, refuses us, or has a newer schema.
    """
    try:
        where = RedisAddress(address)
        where.check()
        client = where.client()
        named = str(where)
    except ValueError as error:
        raise CannotStartError(
            f"redis_url cannot be read: {error}; expected one such as redis://127.0.0.1:6379/0, "
            "rediss://user:password@host:6379/0 (TLS), unix:///path/to/socket, "
            "redis+sentinel://host:26379,host:26379/service/0 or redis+cluster://host:6379,host:6379"
        ) from None
    try:
        for attempt in Retrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_delay(_START_S),
            wait=wait_fixed(0.3),
            reraise=True,
        ):
            with attempt:
                return client, where, _identity(client)
    except RedisError as error:
        client.close()
        raise CannotStartError(
            f"the Redis at {named} cannot be used: {_said(error)}. Start it, or mend redis_url "
            "(PRAD_REGISTRY_REDIS_URL); without one the registry keeps its data in data_dir"
        ) from error
    except CannotStartError:
        client.close()
        raise
    raise AssertionError("tenacity raises the last error")


def replicated(client: Redis, address: RedisAddress, replicas: int) -> None:
    """Returns once that many replicas of Redis have everything that was written so far.

    Raises StoreUnavailableError if they don't within some seconds.
    """
    if not replicas:
        return
    with client.pipeline(transaction=False) as pipe:
        pipe.set(_WAITED, "")  # Redis waits for what its own connection wrote, and for all before that
        pipe.wait(replicas, _REPLICATED_MS)
        _, have = pipe.execute()
    if have < replicas:
        raise StoreUnavailableError(
            f"the change asked for was made at the registry's Redis ({address}), but only {have} of its "
            f"replicas have it, not {replicas} (redis_replicas): it is lost if that one fails now. Look, "
            "then repeat"
        )


def warnings(client: Redis, address: RedisAddress, replicas: int) -> tuple[str, ...]:
    """Why Redis may lose what it acknowledged. `replicas`: as in `replicated`."""
    said = _of_failovers(address, replicas)
    try:
        found = client.config_get("append*") | client.config_get("maxmemory-policy")
    except ResponseError as error:
        if isinstance(error, AuthenticationError):
            raise
        return (
            *said,
            f"whether Redis keeps what it acknowledges is not known, CONFIG GET is refused ({error}): make "
            "sure that it runs with appendonly yes and appendfsync always",
        )
    if found.get("appendonly") != "yes":
        said.append(
            "Redis does not keep its data when it ends (appendonly no): versions and routing WILL BE LOST; "
            "start it with --appendonly yes --appendfsync always"
        )
    elif found.get("appendfsync") != "always":
        said.append(
            f"Redis may lose its last changes when it ends (appendfsync {found.get('appendfsync')}): start "
            "it with --appendfsync always"
        )
    if str(found.get("maxmemory-policy", "")).startswith("allkeys"):
        said.append(
            f"Redis drops data when its memory is full (maxmemory-policy {found['maxmemory-policy']}): set "
            "noeviction"
        )
    return tuple(said)


def _of_failovers(address: RedisAddress, replicas: int) -> list[str]:
    if address.kind is None or replicas:
        return []
    return [
        "a failover of Redis may lose the changes acknowledged last, which its replicas need not have: set "
        "redis_replicas (PRAD_REGISTRY_REDIS_REPLICAS) to 1"
    ]


def revision(reader: "Redis | Pipeline", identity: str) -> int:
    """The revision. Raises StoreUnavailableError if this is not the registry that it was at the start."""
    return check(reader.hmget(REGISTRY, "schema", "id", "revision"), identity)


def check(found: list[Any], identity: str) -> int:
    """The same, of schema, id and revision as they were read."""
    schema, known, number = found
    if known != identity:
        raise StoreUnavailableError(
            "Redis no longer has the registry's data: it was emptied, or started again without them. What is "
            "served goes on being served; restore its files, or restart the registry to begin an empty one"
        )
    if int(schema) > SCHEMA:
        raise StoreUnavailableError(
            f"the registry's data in Redis were migrated to schema {schema} by a newer PrAd server; run that "
            "one here too"
        )
    if int(schema) < SCHEMA:
        raise StoreUnavailableError(
            f"the registry's data in Redis have schema {schema}, as an older PrAd server wrote them: they "
            "were restored meanwhile. Restart the registry, which migrates them"
        )
    return int(number)


def watch(pipe: Pipeline) -> None:
    """What follows is refused (WatchError) if the registry changes before it is executed."""
    pipe.watch(REGISTRY)  # type: ignore[no-untyped-call]


def _identity(client: Redis) -> str:
    while True:
        with client.pipeline() as pipe:
            try:
                watch(pipe)
                schema, known = pipe.hmget(REGISTRY, "schema", "id")
                if known is not None:
                    require_known("data in Redis", int(schema or 0), SCHEMA)
                    return str(known)
                known = uuid.uuid4().hex
                pipe.multi()
                pipe.hset(REGISTRY, mapping={"schema": SCHEMA, "id": known, "revision": 0})
                pipe.execute()
                return known
            except WatchError:
                continue


def _said(error: RedisError) -> str:
    """What is wrong, in a sentence: Redis goes on for a screen about some of it."""
    if isinstance(error, AuthenticationError):
        return "it refuses the user or password in redis_url, or asks for one (redis://user:password@host)"
    if isinstance(
        error, MasterNotFoundError | AsyncMasterNotFoundError
    ):  # it goes on with all of each sentinel's settings
        return str(error).partition(" : ")[0]
    said = str(error).rstrip(".") or type(error).__name__
    return said if len(said) < _LONGEST else said.split(". ")[0]


def _may_pass(error: BaseException) -> bool:
    """Whether Redis may only be starting."""
    passing = isinstance(error, NotConnectedError | TimeoutError | ClusterDownError)
    return passing and not isinstance(error, AuthenticationError)
