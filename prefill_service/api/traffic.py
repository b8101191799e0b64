"""What was answered here of late, on its way to the registry, whose console shows it.

Requests are noted where they end (`api.outcomes`, `api.shadow`); this takes the notes every few seconds. A
report that does not arrive is lost: it is there to be looked at, and /metrics has it all.
"""

import asyncio
import logging
import time
from dataclasses import asdict, dataclass, field

from adapter_registry.client import AsyncRegistryClient
from adapter_registry.errors import RegistryError
from adapter_registry.messages import MOST_SERIES, ShadowTraffic, VersionTraffic
from prefill_service.api.outcomes import Tallies
from prefill_service.api.shadow import ShadowTallies

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Traffic:
    """On the event loop."""

    versions: Tallies = field(default_factory=dict)
    shadows: ShadowTallies = field(default_factory=dict)

    def take(self) -> tuple[list[VersionTraffic], list[ShadowTraffic]]:
        """What was noted since it was last asked for."""
        versions = [
            VersionTraffic(task=task, version=version, **asdict(tally))
            for (task, version), tally in self.versions.items()
        ]
        shadows = [
            ShadowTraffic(task=task, version=version, shadow=shadow, **asdict(tally))
            for (task, version, shadow), tally in self.shadows.items()
        ]
        self.versions.clear()
        self.shadows.clear()
        return versions, shadows


async def report_traffic(client: AsyncRegistryClient, traffic: Traffic, every_s: float) -> None:
    """Goes on until cancelled."""
    said = False
    while True:
        await asyncio.sleep(_until_next(time.time(), every_s))
        versions, shadows = traffic.take()
        try:
            for first in range(0, max(len(versions), len(shadows)), MOST_SERIES):
                some = slice(first, first + MOST_SERIES)
                await client.traffic(versions[some], shadows[some])
            said = False
        except RegistryError as error:  # away, or older than this
            if not said:
                logger.info("the registry's console does not hear what is answered here: %s", error)
            said = True
        except Exception:  # whatever it was: nothing is served by it
            logger.exception("telling the registry what is answered here failed")


def _until_next(now: float, every_s: float) -> float:
    """Half-way between two multiples: reports fall into the middle of the registry's slots, also by a clock
    that is a little off, and not now into this one, now into that."""
    return every_s - (now + every_s / 2) % every_s
