"""The prefill service as a process: load, follow the registry, connect to decode, serve HTTP, drain, stop."""

import asyncio
import socket
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
import uvicorn
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapter_registry.client import AsyncRegistryClient
from adapter_registry.secret import read_secret
from kvtransfer.frames import Encoding, keep_freed_memory
from kvtransfer.sender import DecodeClient
from kvtransfer.settings import TransferSettings
from prad.adapters import Adapter, load_adapter, require_free_names
from prad.artefact import Artefact
from prad.core.errors import PradError
from prad.core.kv import BlockPool
from prad.http.server import KEEP_ALIVE_S, Server, bound
from prad.lm import LanguageModel, Tokenizer, load_served
from prad.lm.kv import Pools, blocks_in
from prefill_service.api import (
    ApiAccess,
    ApiLimits,
    ModelInfo,
    Traffic,
    bounded_protocol,
    create_app,
    report_traffic,
)
from prefill_service.batches import Batches, BatchLimits, FileLimits
from prefill_service.catalogue import KeyRing, TaskCatalogue
from prefill_service.decode_link import DecodeLink
from prefill_service.engine import PrefillEngine, Residents
from prefill_service.follower import RegistryFollower
from prefill_service.passes import PassRunner, a_core_is_left
from prefill_service.pinning import Pinned
from prefill_service.probing import Prober
from prefill_service.scheduler import PromptScheduler
from prefill_service.settings import PrefillSettings

_DRAIN_S = 30


class CannotStartError(PradError):
    """The service cannot start as it is set up; the message names what to change."""


def run(settings: PrefillSettings) -> None:
    """Serves until SIGINT or SIGTERM. Raises CannotStartError or ModelError."""
    keep_freed_memory()
    listening = bound(settings.host, settings.port, CannotStartError, "--host and --port (PRAD_PREFILL_PORT)")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model, folder = load_served(
        settings.model,
        settings.cache_dir,
        dtype=settings.dtype,
        device=settings.device,
        kernels=settings.kernels,
        weights=settings.weights,
        kept_bytes=settings.kernel_cache_mib << 20,
        packed_bytes=settings.packed_cache_mib << 20,
    )
    info = ModelInfo(model.fingerprint.digest, model.max_context, model.vocab_size, model.stop_ids(folder))
    asyncio.run(
        _serve(
            settings,
            listening,
            model,
            Tokenizer(folder, special_tokens_in_text=settings.special_tokens_in_text),
            info,
        )
    )


async def _serve(
    settings: PrefillSettings,
    listening: socket.socket,
    model: LanguageModel,
    tokenizer: Tokenizer,
    info: ModelInfo,
) -> None:
    def load(artefact: Artefact) -> Adapter:
        require_free_names(artefact.record, tokenizer)
        return load_adapter(artefact, model, allow_other_weights=settings.allow_other_weights)

    replica = f"{socket.gethostname()}-{uuid.uuid4().hex[:6]}"
    secret_file = settings.registry_secret_file
    async with (
        DecodeClient(settings.decode, _transfer(settings)) as decode,
        AsyncRegistryClient(
            settings.registry,
            cache_dir=settings.cache_dir,
            replica=replica,
            cache_bytes=settings.adapter_cache_mib << 20,
            secret="" if secret_file is None else read_secret(secret_file),
        ) as registry,
    ):
        pinned = Pinned(settings.pinned)
        residents = Residents(load, settings.adapters_mib * 2**20, model.dtype.itemsize, pinned)
        parts = Parts.build(model, residents, decode, settings)

        prober = Prober(model, load, lambda: parts.engine.live, allow_unmoved=settings.allow_unmoved)

        async def warm(artefact: Artefact) -> None:
            async with residents.pinned(artefact, last=True):
                pass

        catalogue = TaskCatalogue(settings.base_name, pinned.follow)
        keys = KeyRing(required=settings.keys_required, told=False)
        weights = None if settings.allow_other_weights else model.fingerprint.weights
        follower = RegistryFollower(
            registry,
            catalogue,
            keys,
            prober.probe,
            warm,
            weights,
            most_waiting=settings.max_waiting,
            patience_s=settings.queue_timeout_s,
        )
        metrics = CollectorRegistry()
        metrics.register(parts)
        for name, text, up in (
            ("prad_registry_up", "Whether the adapter registry is reached.", lambda: registry.away is None),
            (
                "prad_decode_up",
                "Whether the decode service is reached.",
                lambda: parts.engine.trouble is None,
            ),
        ):
            Gauge(name, text, registry=metrics).set_function(up)
        limits = ApiLimits(
            max_body_bytes=settings.max_body_mib << 20,
            body_timeout_s=settings.body_timeout_s,
            tokenising_chars=settings.tokenising_mchars * 10**6,
            unknown_fields=settings.unknown_fields,
            kept_answers_bytes=settings.kept_answers_mib << 20,
        )
        access = ApiAccess(settings.hosts, settings.origins, keys, log=settings.access_log)
        traffic = Traffic() if settings.traffic_s else None
        batches = _batches(settings, keys)
        app = create_app(
            parts.engine,
            catalogue,
            tokenizer,
            info,
            limits,
            metrics,
            access,
            traffic,
            lambda: registry.away,
            batches,
        )
        config = uvicorn.Config(
            app,
            http=bounded_protocol(settings.max_connections, settings.body_timeout_s),
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=_DRAIN_S,
        )
        async with asyncio.TaskGroup() as tasks:
            always = (parts.engine.run(), follower.run(), pinned.run(warm, residents.holds))
            background = [tasks.create_task(each) for each in always]
            if batches is not None:
                metrics.register(batches)
                background.append(tasks.create_task(batches.run(app)))
            if traffic is not None:
                background.append(tasks.create_task(report_traffic(registry, traffic, settings.traffic_s)))
            await tasks.create_task(Server(config).serve(sockets=[listening]))
            for task in background:
                task.cancel()
            prober.close()


def _batches(settings: PrefillSettings, keys: KeyRing) -> Batches | None:
    """Raises CannotStartError."""
    if settings.files_dir is None:
        return None
    files = FileLimits(
        file_bytes=settings.file_mib << 20,
        all_bytes=settings.files_mib << 20,
        most=settings.max_files,
        keep_s=settings.files_days * 86_400,
    )
    limits = BatchLimits(
        settings.batch_lines, settings.batch_at_once, settings.max_batches, settings.max_body_mib << 20
    )
    folder = settings.files_dir.expanduser()
    try:
        return Batches(folder, files, limits, keys)
    except OSError as error:
        raise CannotStartError(
            f"{folder} cannot be used as --files-dir: {error}; let this user write there, or choose another"
        ) from error


def _transfer(settings: PrefillSettings) -> TransferSettings:
    return TransferSettings(
        shared_bytes=settings.kv_shared_mib << 20,
        silence_s=settings.decode_silence_s,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Parts(Collector):
    """The real parts of an engine, and how they show themselves at /metrics. Tests put one together from
    others."""

    scheduler: PromptScheduler
    passes: PassRunner
    residents: Residents
    engine: PrefillEngine

    @classmethod
    def build(
        cls, model: LanguageModel, residents: Residents, client: DecodeClient, settings: PrefillSettings
    ) -> Self:
        size = settings.block_size
        working, kept = (
            blocks_in(model.layout, size, mib) for mib in (settings.chunked_kv_mib, settings.prefix_cache_mib)
        )
        scheduler = PromptScheduler(
            BlockPool(working + kept, size, keep=kept),
            pass_tokens=settings.pass_tokens,
            chunk_tokens=settings.chunk_tokens,
            pass_prompts=settings.pass_prompts,
            max_waiting=settings.max_waiting,
        )
        overlap = a_core_is_left(model) if settings.kv_overlap == "auto" else settings.kv_overlap == "yes"
        passes = PassRunner(
            model,
            Pools(model.layout, working + kept, size, str(model.device), model.kernels),
            Encoding[settings.kv_wire.upper()],
            overlap=overlap,
            nice=settings.nice,
        )
        name = f"prefill {socket.gethostname()}:{settings.port}" if settings.port else None
        link = DecodeLink(client, model.spec, name=name)
        return cls(scheduler, passes, residents, PrefillEngine(scheduler, passes, link, residents, settings))

    def collect(self) -> Iterable[Metric]:
        """Read whenever somebody asks for /metrics."""
        lookups, blocks = self.scheduler.lookups, self.scheduler.blocks
        for name, text, value in (
            ("waiting_prompts", "Prompts in the queue, or waiting for their adapter.", self.engine.waiting),
            ("live_prompts", "Prompts between arrival and last token.", self.engine.live),
            ("resident_adapters", "Adapters in memory.", len(self.residents)),
            ("resident_adapter_bytes", "Memory that they take.", self.residents.nbytes),
            ("cached_tokens", "Tokens that the prefix cache holds now.", blocks.cached * blocks.block_size),
            ("prompt_blocks_in_use", "Blocks of prompts under way.", blocks.in_use),
        ):
            yield GaugeMetricFamily(f"prad_prefill_{name}", text, value=value)
        for name, text, value in (
            ("prompts", "Prompts looked up in the prefix cache.", lookups.prompts),
            ("hits", "Prompts that began with cached blocks.", lookups.hits),
            ("looked_up_tokens", "Tokens of the prompts looked up.", lookups.tokens),
            ("hit_tokens", "Tokens of these that were not computed again.", lookups.hit_tokens),
        ):
            yield CounterMetricFamily(f"prad_prefill_prefix_{name}", text, value=value)
