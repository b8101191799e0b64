"""A decode service's life: startup, serving, shutdown with drain; its health."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server

from decode_service.engine import Metrics, PagedEngine
from decode_service.runner import ModelRunner, load
from decode_service.scheduler import Scheduler
from decode_service.service import DecodeService, ReadableMessages, Sessions
from decode_service.settings import DecodeSettings
from kvtransfer.frames import keep_freed_memory
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.rpc import add_decode
from kvtransfer.settings import TransferSettings
from prad.core.errors import PradError
from prad.core.host_names import is_allowed, is_loopback
from prad.core.kv import BlockPool
from prad.core.sampling import Drafter
from prad.lm import Grammars, LanguageModel, Tokenizer, resolve_model
from prad.lm.kv import Pools, blocks_in

logger = logging.getLogger(__name__)

_SERVICE = pb.DESCRIPTOR.services_by_name["Decode"].full_name
_FLUSH_S = 10.0  # a client's process may not get a core at once
_GRACE_S = 5.0  # for clients to receive their last frames and go
_DRAIN_LOOK_S = 0.05


class DecodeServiceError(PradError):
    """Base of what keeps a decode service from running; what one request can meet is kvtransfer's tree."""


class BindError(DecodeServiceError):
    """The address cannot be listened on."""


class UnprotectedError(DecodeServiceError):
    """Others than this machine would reach it, and nobody said that this is wanted."""


class CacheTooSmallError(DecodeServiceError):
    """The KV cache of the settings does not hold a single block."""


class EngineFailedError(DecodeServiceError):
    """The engine met a fault that it cannot go on after: the process has to be started again."""


def run(settings: DecodeSettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the process at once.

    Raises UnprotectedError, BindError, CacheTooSmallError, or prad.lm's ModelError before anything is served;
    EngineFailedError when the engine failed, so that the process ends and a supervisor starts it again.
    """
    keep_freed_memory()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    asyncio.run(_run(settings))


async def _run(settings: DecodeSettings) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    async with serving(settings) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        waits = [asyncio.create_task(event.wait()) for event in (stop, server.failed)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        for wait in waits:
            wait.cancel()
    if server.failure is not None:
        raise EngineFailedError(server.failure)


@asynccontextmanager
async def serving(
    settings: DecodeSettings, model: LanguageModel | None = None
) -> AsyncIterator["DecodeServer"]:
    """A service that runs inside the `with`, in this process; leaving it drains. Raises UnprotectedError,
    BindError, CacheTooSmallError and ModelError as `run`; a failed engine shows in `DecodeServer.failed`.

    `model`: one that is loaded already, instead of the settings'.
    """
    if not settings.unprotected and not is_loopback(settings.host):
        raise UnprotectedError(
            f"a decode service on {settings.host} is reached by others than this machine, and asks nobody "
            "for a key: let it listen on 127.0.0.1, or say --unprotected (PRAD_DECODE_UNPROTECTED=true) "
            "where only its prefill services reach it"
        )
    server = grpc.aio.server(interceptors=[ReadableMessages()], options=TransferSettings().server_options())
    try:
        port = _bind(server, f"{settings.host}:{settings.port}")  # a taken port fails before the model loads
        if model is None:
            model = await asyncio.to_thread(load, settings)
        service = DecodeServer(settings, model, server, port)
        await service.start()
    except BaseException:
        await server.stop(None)
        raise
    try:
        yield service
    finally:
        await service.stop()


class DecodeServer:
    """The parts, put together; `engine` and `port` are what tests look at. When the engine cannot go on,
    `failed` is set and `failure` says why."""

    def __init__(
        self, settings: DecodeSettings, model: LanguageModel, server: grpc.aio.Server, port: int
    ) -> None:
        self.port = port
        self.failed = asyncio.Event()
        self.failure: str | None = None
        self._settings = settings
        self._server = server
        self._loop = asyncio.get_running_loop()
        num_blocks = blocks_in(model.layout, settings.block_size, settings.kv_cache_mib)
        if num_blocks < 1:
            one = settings.block_size * model.layout.bytes_per_token
            raise CacheTooSmallError(
                f"{settings.kv_cache_mib} MiB hold no block of {settings.block_size} tokens of "
                f"{model.layout.bytes_per_token} bytes: give --kv-cache-mib (PRAD_DECODE_KV_CACHE_MIB) "
                f"{-(-one >> 20)} or more"
            )
        scheduler = Scheduler(
            BlockPool(num_blocks, settings.block_size),
            settings.max_sequences,
            settings.retry_after_s,
            settings.request_state_mib << 20,
        )
        pools = Pools(model.layout, num_blocks, settings.block_size, settings.device, model.kernels)
        self._grammars = Grammars(
            lambda: Tokenizer(resolve_model(settings.model, settings.cache_dir)), model.vocab_size
        )
        self._metrics = Metrics()
        self._metrics_server = ExitStack()
        self._sessions = Sessions(
            settings.outbox_frames, settings.detach_s, lambda c: self.engine.cancel_session(c)
        )
        self.engine = PagedEngine(
            ModelRunner(model, pools, self._grammars),
            scheduler,
            self._sessions.deliver_from_thread,
            self._metrics.step,
            self._fail_from_thread,
            Drafter(settings.speculate, model.vocab_size),
        )
        self._metrics.watch(self.engine.status)
        self._service = DecodeService(
            self.engine,
            self._sessions,
            model.spec,
            idle_s=settings.hand_off_idle_s,
            shared_memory=settings.shared_memory,
        )
        self._health = health.aio.HealthServicer()
        self._failing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        add_decode(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            [_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )
        if self._settings.metrics_port is not None:
            self._metrics_server.enter_context(
                served(self._metrics.registry, self._settings.host, self._settings.metrics_port)
            )
        self.engine.start()
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        logger.info("decode listens on %s:%d", self._settings.host, self.port)

    async def stop(self) -> None:
        """Admits nothing more, lets what is in finish for up to drain_s; the rest ends with its stream."""
        self._service.drain(self._settings.retry_after_s)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self.failure is None:
            await _until(
                lambda: self.failed.is_set() or self.engine.status().sequences == 0, self._settings.drain_s
            )
            self.engine.cancel_all("decode is shutting down")
        await asyncio.to_thread(self.engine.stop)
        await asyncio.sleep(0)  # the engine's last events are in the loop's queue
        self._sessions.close()
        self._service.stop()
        await _until(lambda: self._sessions.flushed, _FLUSH_S)
        await self._server.stop(_GRACE_S)
        self._metrics_server.close()
        self._grammars.close()

    def _fail_from_thread(self, message: str) -> None:
        self._loop.call_soon_threadsafe(self._fail, message)

    def _fail(self, message: str) -> None:
        self.failure = message
        self._service.drain(self._settings.retry_after_s)
        self._failing = self._loop.create_task(self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING))
        self.failed.set()

    async def _set_health(self, status: int) -> None:
        for name in ("", _SERVICE):
            await self._health.set(name, status)


@contextmanager
def served(registry: CollectorRegistry, host: str, port: int) -> Iterator[None]:
    """GET /metrics on its own port, inside the `with`; on loopback by no name that a web page can have.
    Raises BindError."""
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise BindError(
            f"metrics cannot be served on {host}:{port} ({error.strerror}); choose another --metrics-port"
        ) from error
    if is_loopback(host):
        server.set_app(_by_own_names(make_wsgi_app(registry)))
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _by_own_names(page: WSGIApplication) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if is_allowed(environ.get("HTTP_HOST", "localhost").lower(), ()):
            return page(environ, start)
        start("403 Forbidden", [("content-type", "text/plain; charset=utf-8")])
        return [b"this machine is not called so: ask for 127.0.0.1 or localhost\n"]

    return answer


def _bind(server: grpc.aio.Server, address: str) -> int:
    try:
        return int(server.add_insecure_port(address))
    except RuntimeError as error:
        raise BindError(
            f"cannot listen on {address}; choose another --port or --host, or stop what uses it"
        ) from error


async def _until(done: Callable[[], bool], most_s: float) -> None:
    """Looks now and then, only ever at shutdown."""
    try:
        async with asyncio.timeout(most_s):
            while not done():  # noqa: ASYNC110
                await asyncio.sleep(_DRAIN_LOOK_S)
    except TimeoutError:
        return
