"""What tasks mean at this service now, and what is on its way to it, for /metrics."""

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prefill_service.catalogue import TaskCatalogue


class RoutingMetrics(Collector):
    """Read whenever somebody asks for /metrics."""

    def __init__(self, catalogue: TaskCatalogue) -> None:
        self._catalogue = catalogue

    def collect(self) -> Iterable[Metric]:
        revision = GaugeMetricFamily(
            "prad_task_routing_revision", "Revision of the routing in force here.", labels=("task",)
        )
        weights = GaugeMetricFamily(
            "prad_task_version_weight",
            "Of a version among those that a plain task means here.",
            labels=("task", "version", "digest"),
        )
        shadows = GaugeMetricFamily(
            "prad_task_shadow_percent",
            "Of requests for a plain task, those that also run under a version.",
            labels=("task", "version"),
        )
        for entry in self._catalogue.tasks():
            revision.add_metric((entry.name,), entry.routed.revision)
            for number, weight in entry.routed.split.items():
                if found := entry.routed.versions.get(number):
                    weights.add_metric((entry.name, str(number), found.digest), weight)
            for number, share in entry.routed.shadow.items():
                if number in entry.routed.versions:
                    shadows.add_metric((entry.name, str(number)), share)
        fetching = GaugeMetricFamily(
            "prad_adapters_fetching", "Adapters on their way here.", value=self._catalogue.fetching
        )
        return revision, weights, shadows, fetching
