"""What the engine shows at /metrics, read when asked."""

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
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
