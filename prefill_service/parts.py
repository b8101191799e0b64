"""Which parts a prefill engine is made of, and how it shows itself at /metrics."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvtransfer import DecodeClient, Encoding
from prad.core.blocks import BlockPool
from prad.lm import LanguageModel
from prad.lm.paged import Pools, blocks_in
from prefill_service.decode_link import DecodeLink
from prefill_service.engine import PrefillEngine
from prefill_service.passes import PassRunner, a_core_is_left
from prefill_service.residents import Residents
from prefill_service.scheduler import PromptScheduler
from prefill_service.settings import PrefillSettings


@dataclass(frozen=True, slots=True, eq=False)
class Parts(Collector):
    """The real ones; tests put an engine together from others."""

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
        link = DecodeLink(client, model.spec)
        return cls(scheduler, passes, residents, PrefillEngine(scheduler, passes, link, residents, settings))

    def collect(self) -> Iterable[Metric]:
        """Read whenever somebody asks for /metrics."""
        lookups, blocks = self.scheduler.lookups, self.scheduler.blocks
        for name, text, value in (
            ("waiting_prompts", "Prompts in the queue.", self.engine.waiting),
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
