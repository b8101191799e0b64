"""What prefill replicas say that they answer, of late: for people who look, not for counting.

A replica that follows this registry reports every few seconds what it answered since the report before, by
version. Here that is summed up in slots of some seconds, which are minutes once they are old, and kept for an
hour; each registry knows what its own replicas say, and nothing of it survives a restart. Whoever wants more
has the replicas' /metrics.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TypeVar

from fastapi import APIRouter, status

from adapter_registry.messages import (
    TIMES,
    ShadowTraffic,
    TrafficReport,
    VersionTraffic,
    no_times,
)
from adapter_registry.uploads import BoundedRoute

K = TypeVar("K", int, tuple[int, int])
V = TypeVar("V", "Answered", "Shadowed")

SLOT_S = 10
KEPT_SLOTS = 360
"""An hour."""
FINE_SLOTS = 92
"""A quarter of an hour, with what the finer chart reads beyond that: older ones are folded."""
FOLDED = 6
"""Slots of a minute that become one: nobody tells old ones apart, and they would be most of the memory."""
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


def _add(times: list[int], more: Iterable[int]) -> None:
    times[:] = [one + other for one, other in zip(times, more, strict=True)]


@dataclass(slots=True)
class Answered:
    """What was answered in a while: see `VersionTraffic`."""

    requests: int = 0
    failed: int = 0
    tokens: int = 0
    first_token: list[int] = field(default_factory=no_times)
    duration: list[int] = field(default_factory=no_times)

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
    live_first: list[int] = field(default_factory=no_times)
    shadow_first: list[int] = field(default_factory=no_times)

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

    def fold(self, more: "Slot") -> None:
        """Adds what another slot tells."""
        self.whole.add(more.whole)
        for task, versions in more.versions.items():
            for version, answered in versions.items():
                if known := self._of(self.versions, task, version, Answered):
                    known.add(answered)
        for task, pairs in more.shadows.items():
            for pair, shadowed in pairs.items():
                if both := self._of(self.shadows, task, pair, Shadowed):
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
        self._slots: deque[Slot] = deque()
        self._folded: deque[Slot] = deque(maxlen=-(-(KEPT_SLOTS - FINE_SLOTS) // FOLDED))

    def add(self, report: TrafficReport) -> None:
        number = self._now()
        if not self._slots or self._slots[-1].number < number:
            self._slots.append(Slot(number))
            while (minute := _last_of_minute(self._slots[0].number)) < number - FINE_SLOTS:
                self._fold(minute, self._slots.popleft())
        self._slots[-1].add(report)

    def _fold(self, minute: int, slot: Slot) -> None:
        if not self._folded or self._folded[-1].number < minute:
            self._folded.append(Slot(minute))
        self._folded[-1].fold(slot)

    def slots(self, seconds: float) -> Iterator[Slot]:
        """Those that are over, of the last `seconds`; one in which nothing came is not among them. Where they
        are minutes, the first one is whole."""
        now, kept = self._now(), chain(self._folded, self._slots)
        return (slot for slot in kept if now - seconds / SLOT_S <= slot.number < now)

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


def _last_of_minute(number: int) -> int:
    return number // FOLDED * FOLDED + FOLDED - 1


def traffic_router(traffic: LiveTraffic | None) -> APIRouter:
    """What replicas report; None: nobody looks. Nobody may pass for one: it would be believed."""
    router = APIRouter(route_class=BoundedRoute)

    @router.post("/traffic", status_code=status.HTTP_204_NO_CONTENT)
    async def heard(body: TrafficReport) -> None:
        """What a replica answered since its report before; the console shows it."""
        if traffic is not None:
            traffic.add(body)

    return router
