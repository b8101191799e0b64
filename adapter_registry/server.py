"""The registry as a running server: data folder locked, socket bound, routes served, drained, closed."""

import asyncio
import logging
import socket
from contextlib import ExitStack

import uvicorn

from adapter_registry.access import Secrets
from adapter_registry.app import create_app
from adapter_registry.changes import ChangeFeed
from adapter_registry.errors import CannotStartError, StoreUnavailableError
from adapter_registry.keys import OPERATORS, Role, StoredKey
from adapter_registry.metrics import Metrics
from adapter_registry.opening import open_data
from adapter_registry.redis_changes import RedisChanges
from adapter_registry.redis_store import RedisStore
from adapter_registry.registry import Registry
from adapter_registry.replicas import Replicas
from adapter_registry.retention import make_room
from adapter_registry.secret import ensure_secret
from adapter_registry.settings import RegistrySettings
from adapter_registry.signers import Signers
from prad.http.server import KEEP_ALIVE_S, Server, bound


def run(settings: RegistrySettings) -> None:
    """Serves until SIGINT or SIGTERM. Raises CannotStartError."""
    RegistryServer(settings).run()


_AGAIN_S = 1.0


class RegistryServer:
    """Opens data folder and port at once, so that whoever starts it knows `url`, or the reason why not.

    `run` blocks (from any thread; signals are caught in the main thread only) and closes everything at its
    end; `stop` ends it from elsewhere. Raises CannotStartError.
    """

    def __init__(self, settings: RegistrySettings) -> None:
        self._settings = settings
        with ExitStack() as opened:
            self._data = open_data(settings)
            opened.callback(self._data.close)
            flags = "--host and --port (PRAD_REGISTRY_PORT)"
            self._socket = bound(settings.host, settings.port, CannotStartError, flags, backlog=1024)
            opened.callback(self._socket.close)
            try:
                self._server = self._prepared(settings)
            except StoreUnavailableError as error:
                raise CannotStartError(f"{error.message}; start again once it can") from error
            opened.pop_all()  # `run` closes them

    def _prepared(self, settings: RegistrySettings) -> "_DrainingServer":
        store, files = self._data.store, self._data.files
        secrets = _secrets(settings, store.keys())
        signers = Signers(settings.signing_keys)
        missing = files.sweep(store.digests)
        make_room(store, files, settings.bounds.retired_bytes)
        feed = ChangeFeed(store.revision(), settings.max_waiters, settings.max_waiters_per_client)
        registry = Registry(store, files, feed, Replicas(), Metrics(), settings.bounds, signers)
        changes = RedisChanges(store, feed) if isinstance(store, RedisStore) else None
        self._warnings = [
            *store.warnings(),
            *self._data.overlooked(settings),
            *_missing(missing, files.place),
        ]
        config = uvicorn.Config(
            create_app(registry, settings, secrets),
            http="h11",  # which bounds heads; httptools keeps whatever comes
            log_config=None,  # as all other lines of the log
            log_level=settings.log_level,
            access_log=settings.access_log,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=settings.shutdown_seconds,
        )
        return _DrainingServer(config, registry, changes)

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        # uvicorn is silent about a socket that it was given; this is the logger that it configures.
        logger = logging.getLogger("uvicorn.error")
        logger.info("Adapter registry on %s, data in %s", self.url, self._data.place)
        for warning in self._warnings:
            logger.warning("%s", warning)
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        finally:
            self._data.close()
            self._socket.close()

    def stop(self) -> None:
        self._server.should_exit = True


class _DrainingServer(Server):
    """Before uvicorn waits for open requests to end, those that wait for changes are sent home.

    While it serves, files that no version needs are removed, and what other registries change is heard, where
    there may be some (`changes`).
    """

    def __init__(self, config: uvicorn.Config, registry: Registry, changes: RedisChanges | None) -> None:
        super().__init__(config)
        self._registry = registry
        self._changes = changes

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(self._registry.tidy())]
            if self._changes is not None:
                beside.append(tasks.create_task(self._changes.follow()))
            await super().serve(sockets)
            while left := [task for task in beside if not task.done()]:
                for task in left:  # again where that got lost, as amid a time-out of a library's own
                    task.cancel()
                await asyncio.wait(left, timeout=_AGAIN_S)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._registry.close()
        await super().shutdown(sockets)


def _secrets(settings: RegistrySettings, keys: tuple[StoredKey, ...]) -> Secrets:
    """Raises CannotStartError if others than this machine could do everything, or its replicas nothing."""
    closed = not settings.on_loopback and not settings.unprotected
    operators = [key for key in keys if key.role in OPERATORS]
    replicas, admin = (
        None if file is None else ensure_secret(file)
        for file in (settings.replica_secret_file, settings.admin_token_file)
    )
    if replicas is None and (closed or operators):
        why = (
            f"a registry on {settings.host} is reached by others than this machine, and"
            if closed
            else "this registry has operators' tokens: it asks everyone for one, and"
        )
        raise CannotStartError(
            f"{why} must know its replicas: set replica_secret_file (PRAD_REGISTRY_REPLICA_SECRET_FILE) "
            "here, and registry_secret_file (PRAD_PREFILL_REGISTRY_SECRET_FILE) at each of them, to the same "
            "file"
        )
    if closed and admin is None and not any(k.role is Role.ADMIN and k.revoked_at is None for k in operators):
        raise CannotStartError(
            f"a registry on {settings.host} is reached by others than this machine, and must know who may "
            "change it: set admin_token_file (PRAD_REGISTRY_ADMIN_TOKEN_FILE), a file that is written at the "
            "first start; or say --unprotected where nobody else reaches it"
        )
    return Secrets(replicas, admin, closed, keys)


def _missing(count: int, place: str) -> list[str]:
    if not count:
        return []
    return [
        f"the files of {count} adapters are not in {place}: push them again, or bring them along ("
        "prad registry export FILE with the settings before, import FILE into an empty one with these); "
        "registries on one Redis must share one data_dir, or one bucket"
    ]
