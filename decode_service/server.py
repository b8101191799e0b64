"""A decode service's life: startup, serving, shutdown with drain."""

import asyncio
import logging
import signal
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from decode_service.engine import PagedEngine
from decode_service.errors import BindError, CacheTooSmallError
from decode_service.metrics import Metrics, served
from decode_service.pool_writer import PoolWriter
from decode_service.scheduler import Scheduler
from decode_service.service import DecodeService
from decode_service.sessions import Sessions
from decode_service.settings import DecodeSettings
from kvtransfer import TransferSettings
from kvtransfer.memory import keep_freed_memory
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.proto.handoff_pb2_grpc import add_DecodeServicer_to_server
from prad.core.blocks import BlockPool
from prad.lm import LanguageModel, UnsupportedModelError, require_device, resolve_model
from prad.lm.kernels import load_kernels
from prad.lm.paged import Pools, blocks_in

logger = logging.getLogger(__name__)

_SERVICE = pb.DESCRIPTOR.services_by_name["Decode"].full_name
_FLUSH_S = 10.0  # a client's process may not get a core at once
_GRACE_S = 5.0  # for clients to take their last frames and go
_DRAIN_LOOK_S = 0.05


def run(settings: DecodeSettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the process at once.

    Raises BindError, CacheTooSmallError, or prad.lm's ModelError before anything is served.
    """
    keep_freed_memory()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    asyncio.run(_run(settings))


async def _run(settings: DecodeSettings) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    async with serving(settings):
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


@asynccontextmanager
async def serving(
    settings: DecodeSettings, model: LanguageModel | None = None
) -> AsyncIterator["DecodeServer"]:
    """A service that runs inside the `with`, in this process; leaving it drains. Raises as `run`.

    `model`: one that is loaded already, instead of the settings'.
    """
    server = grpc.aio.server(options=TransferSettings().server_options())
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


def load(settings: DecodeSettings) -> LanguageModel:
    """The settings' model. Raises prad.lm's ModelError."""
    require_device(settings.device)  # before a model is fetched or converted
    folder = resolve_model(settings.model, settings.cache_dir)
    model = LanguageModel.load(folder, dtype=getattr(torch, settings.dtype), device=settings.device)
    kernels = load_kernels(settings.kernels, settings.cache_dir, settings.device)
    if kernels is not None:
        model.accelerate(kernels, settings.weights)
    elif settings.weights != "full":
        raise UnsupportedModelError(f"{settings.weights} weights need the kernels, and these are not in use")
    return model


class DecodeServer:
    """The parts, put together; `engine` and `port` are what tests look at."""

    def __init__(
        self, settings: DecodeSettings, model: LanguageModel, server: grpc.aio.Server, port: int
    ) -> None:
        self.port = port
        self._settings = settings
        self._server = server
        num_blocks = blocks_in(model.layout, settings.block_size, settings.kv_cache_mib)
        if num_blocks < 1:
            raise CacheTooSmallError(
                f"{settings.kv_cache_mib} MiB hold no block of {settings.block_size} tokens of "
                f"{model.layout.bytes_per_token} bytes"
            )
        instance = uuid.uuid4().hex
        scheduler = Scheduler(
            BlockPool(num_blocks, settings.block_size),
            settings.max_sequences,
            settings.retry_after_s,
            settings.request_state_mib << 20,
        )
        pools = Pools(model.layout, num_blocks, settings.block_size, settings.device, model.kernels)
        self._metrics = Metrics()
        self._metrics_server = ExitStack()
        self._sessions = Sessions(
            instance, settings.outbox_frames, settings.detach_s, lambda c: self.engine.cancel_client(c)
        )
        self.engine = PagedEngine(
            model, pools, scheduler, self._sessions.deliver_from_thread, self._metrics.step
        )
        self._metrics.watch(self.engine.status)
        self._service = DecodeService(
            self.engine, PoolWriter(pools), self._sessions, model.spec, instance, settings
        )
        self._health = health.aio.HealthServicer()

    async def start(self) -> None:
        add_DecodeServicer_to_server(self._service, self._server)  # type: ignore[no-untyped-call]
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
        await self._say(health_pb2.HealthCheckResponse.SERVING)
        logger.info("decode listens on %s:%d", self._settings.host, self.port)

    async def stop(self) -> None:
        """Admits nothing more, lets what is in finish for up to drain_s, ends the rest with an error."""
        self._service.drain(self._settings.retry_after_s)
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await _until(lambda: self.engine.status().sequences == 0, self._settings.drain_s)
        self.engine.end_all("decode is shutting down")
        await asyncio.to_thread(self.engine.stop)
        await asyncio.sleep(0)  # the engine's last events are in the loop's queue
        self._sessions.close()
        self._service.stop()
        await _until(lambda: self._sessions.flushed, _FLUSH_S)
        await self._server.stop(_GRACE_S)
        self._metrics_server.close()

    async def _say(self, status: int) -> None:
        for name in ("", _SERVICE):
            await self._health.set(name, status)


def _bind(server: grpc.aio.Server, address: str) -> int:
    try:
        return int(server.add_insecure_port(address))
    except RuntimeError as error:
        raise BindError(f"{address} cannot be listened on: is it taken?") from error


async def _until(done: Callable[[], bool], most_s: float) -> None:
    """Looks now and then, only ever at shutdown."""
    try:
        async with asyncio.timeout(most_s):
            while not done():  # noqa: ASYNC110
                await asyncio.sleep(_DRAIN_LOOK_S)
    except TimeoutError:
        return
