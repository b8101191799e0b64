"""What prefill replicas say that they answer, of late: for people who look, not for counting.

A replica that follows this registry reports every few seconds what it answered since the report before, by
version. Here that is summed up in slots of some seconds, and kept for an hour; each registry knows what its
own replicas say, and nothing of it survives a restart. Whoever wants more has the replicas' /metrics.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

from fastapi import APIRouter

from adapter_registry.messages import (
    TIMES,
    Heard,
    ShadowTraffic,
    TrafficReport,
    VersionTraffic,
)
from adapter_registry.registry import Registry
from adapter_registry.uploads import BoundedRoute

K = TypeVar("K", int, tuple[int, int])
V = TypeVar("V", "Answered", "Shadowed")

SLOT_S = 10
KEPT_SLOTS = 360
"""An hour."""
MOST_IN_A_SLOT = 1000
"""Versions, and pairs of a version and its shadow, of which a slot tells; the first ones that come."""


def quantile(times: Iterable[int], share: float) -> float | None:
    """The seconds within which that share of `Times` lies; None of none. Between two bounds it is taken to
    be spread evenly, and beyond the last to end there."""
    counts = tuple(times)
    rank = share * sum(counts)
    if not rank:
        return None
    below = 0.0
    for count, (low, high) in zip(counts, pairwise((0.0, *TIMES)), strict=False):
        if count and below + count >= rank:
            return low + (high - low) * (rank - below) / count
        below += count
    return TIMES[-1]


def _none() -> list[int]:
    return [0] * (len(TIMES) + 1)


def _add(times: list[int], more: Iterable[int]) -> None:
    times[:] = [one + other for one, other in zip(times, more, strict=True)]


@dataclass(slots=True)
class Answered:
    """What was answered in a while: see `VersionTraffic`."""

    requests: int = 0
    failed: int = 0
    tokens: int = 0
    first_token: list[int] = field(default_factory=_none)
    duration: list[int] = field(default_factory=_none)

    def add(self, more: "VersionTraffic | Answered") -> None:
        self.requests += more.requests
        self.failed += more.failed
        self.tokens += more.tokens
        _add(self.first_token, more.first_token)
        _add(self.duration, more.duration)


@dataclass(slots=True)
class Shadowed:
    """What became of a shadow in a while: see `ShadowTraffic`."""

    compared: int = 0
    equal: int = 0
    tokens: int = 0
    equal_tokens: int = 0
    dropped: int = 0
    live_first: list[int] = field(default_factory=_none)
    shadow_first: list[int] = field(default_factory=_none)

    def add(self, more: "ShadowTraffic | Shadowed") -> None:
        self.compared += more.compared
        self.equal += more.equal
        self.tokens += more.tokens
        self.equal_tokens += more.equal_tokens
        self.dropped += more.dropped
        _add(self.live_first, more.live_first)
        _add(self.shadow_first, more.shadow_first)

    @property
    def agreement(self) -> float | None:
        """Answers alike, in percent."""
        return 100 * self.equal / self.compared if self.compared else None


@dataclass(slots=True)
class Slot:
    """Some seconds. `number`: counted from the epoch; of each task what its versions, and pairs of a version
    and its shadow, did; `whole`: all of them together."""

    number: int
    versions: dict[str, dict[int, Answered]] = field(default_factory=dict)
    shadows: dict[str, dict[tuple[int, int], Shadowed]] = field(default_factory=dict)
    whole: Answered = field(default_factory=Answered)
    series: int = 0

    @property
    def at(self) -> int:
        """Seconds since the epoch, of its end."""
        return (self.number + 1) * SLOT_S

    def add(self, report: TrafficReport) -> None:
        for answered in report.versions:
            self.whole.add(answered)
            if version := self._of(self.versions, answered.task, answered.version, Answered):
                version.add(answered)
        for shadowed in report.shadows:
            pair = (shadowed.version, shadowed.shadow)
            if both := self._of(self.shadows, shadowed.task, pair, Shadowed):
                both.add(shadowed)

    def _of(self, tasks: dict[str, dict[K, V]], task: str, key: K, new: Callable[[], V]) -> V | None:
        """None if there is no room for one more."""
        known = tasks.get(task, {}).get(key)
        if known is None and self.series < MOST_IN_A_SLOT:
            self.series += 1
            known = tasks.setdefault(task, {})[key] = new()
        return known


class LiveTraffic:
    """In memory only, on the server's event loop. `clock` is in seconds since the epoch."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._slots: deque[Slot] = deque(maxlen=KEPT_SLOTS)

    def add(self, report: TrafficReport) -> None:
        number = self._now()
        if not self._slots or self._slots[-1].number < number:
            self._slots.append(Slot(number))
        self._slots[-1].add(report)

    def slots(self, seconds: float) -> Iterator[Slot]:
        """Those that are over, of the last `seconds`; one in which nothing came is not among them."""
        now = self._now()
        return (slot for slot in self._slots if now - seconds / SLOT_S <= slot.number < now)

    def versions(self, task: str, seconds: float) -> dict[int, Answered]:
        """What each version of the task did in the last `seconds`."""
        found: dict[int, Answered] = {}
        for slot in self.slots(seconds):
            for version, answered in slot.versions.get(task, {}).items():
                found.setdefault(version, Answered()).add(answered)
        return found

    def shadows(self, task: str, seconds: float) -> dict[tuple[int, int], Shadowed]:
        """The same of (version, shadow)."""
        found: dict[tuple[int, int], Shadowed] = {}
        for slot in self.slots(seconds):
            for pair, shadowed in slot.shadows.get(task, {}).items():
                found.setdefault(pair, Shadowed()).add(shadowed)
        return found

    def whole(self, seconds: float) -> Answered:
        """What all did together."""
        found = Answered()
        for slot in self.slots(seconds):
            found.add(slot.whole)
        return found

    def now(self) -> float:
        return self._clock()

    def _now(self) -> int:
        return int(self._clock()) // SLOT_S


def traffic_router(traffic: LiveTraffic, registry: Registry) -> APIRouter:
    """What replicas report. Nobody may pass for one: it would be believed."""
    router = APIRouter(route_class=BoundedRoute)

    @router.post("/traffic")
    async def heard(body: TrafficReport) -> Heard:
        """What a replica answered since its report before; the console shows it."""
        traffic.add(body)
        return Heard(revision=registry.feed.revision)

    return router
