"""What the engine shows at /metrics, read when asked."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prefill_service.engine import PrefillEngine
from prefill_service.residents import Residents


class EngineMetrics(Collector):
    def __init__(self, engine: PrefillEngine, residents: Residents) -> None:
        self._engine = engine
        self._residents = residents

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(
            "prad_prefill_waiting_prompts", "Prompts in the queue.", value=self._engine.waiting
        )
        yield GaugeMetricFamily(
            "prad_prefill_live_prompts",
            "Prompts between arrival and last token.",
            value=self._engine.live,
        )
        yield GaugeMetricFamily(
            "prad_prefill_resident_adapters", "Adapters in memory.", value=len(self._residents)
        )
        yield GaugeMetricFamily(
            "prad_prefill_resident_adapter_bytes", "Memory that they take.", value=self._residents.nbytes
        )
        yield from self._prefix_cache()

    def _prefix_cache(self) -> Iterable[Metric]:
        lookups, blocks = self._engine.lookups, self._engine.blocks
        for name, text, value in (
            ("prompts", "Prompts looked up in the prefix cache.", lookups.prompts),
            ("hits", "Prompts that began with cached blocks.", lookups.hits),
            ("looked_up_tokens", "Tokens of the prompts looked up.", lookups.tokens),
            ("hit_tokens", "Tokens of these that were not computed again.", lookups.hit_tokens),
        ):
            yield CounterMetricFamily(f"prad_prefill_prefix_{name}", text, value=value)
        cached = blocks.cached * blocks.block_size
        yield GaugeMetricFamily(
            "prad_prefill_cached_tokens", "Tokens that the prefix cache holds now.", value=cached
        )
        yield GaugeMetricFamily(
            "prad_prefill_prompt_blocks_in_use", "Blocks of prompts under way.", value=blocks.in_use
        )
