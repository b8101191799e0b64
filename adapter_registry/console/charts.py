"""Live traffic as lines over time, for the charts: JSON that the page's script draws."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from adapter_registry.traffic import SLOT_S, Answered, LiveTraffic, Shadowed, Slot, quantile

Minutes = Literal[15, 60]
_STEP_S: Mapping[int, int] = {15: SLOT_S, 60: 60}
MOST_LINES = 8
"""In one chart: those with the most requests."""

FAILED = -1
"""The colour of what failed; others are those of versions."""

Line = dict[str, Any]


def of_all(traffic: LiveTraffic, minutes: Minutes) -> dict[str, Any]:
    """All tasks together."""
    times, slots = _binned(traffic, minutes)
    step = _STEP_S[minutes]
    sums = [_sum(slot.whole for slot in some) for some in slots]
    return {
        "times": times,
        "requests": [
            _line("answered", ((s.requests - s.failed) / step for s in sums), 1),
            _line("failed", (s.failed / step for s in sums), FAILED),
        ],
        "tokens": [_line("output tokens", (s.tokens / step for s in sums), 1)],
        "latency": [
            _line("median", (quantile(s.first_token, 0.5) for s in sums), 2),
            _line("95 %", (quantile(s.first_token, 0.95) for s in sums), 2, dashed=True),
        ],
    }


def of_task(traffic: LiveTraffic, task: str, minutes: Minutes) -> dict[str, Any]:
    """By version, and by version and shadow."""
    times, slots = _binned(traffic, minutes)
    step = _STEP_S[minutes]
    known = traffic.versions(task, 60 * minutes)
    shown = sorted(sorted(known, key=lambda v: -known[v].requests)[:MOST_LINES])
    sums = {
        version: [_sum(slot.versions.get(task, {}).get(version) for slot in some) for some in slots]
        for version in shown
    }
    pairs = sorted(traffic.shadows(task, 60 * minutes))[:MOST_LINES]
    return {
        "times": times,
        "requests": [_line(f"@{v}", (s.requests / step for s in sums[v]), v) for v in shown],
        "tokens": [_line(f"@{v}", (s.tokens / step for s in sums[v]), v) for v in shown],
        "latency": [
            line
            for v in shown
            for line in (
                _line(f"@{v} median", (quantile(s.first_token, 0.5) for s in sums[v]), v),
                _line(f"@{v} 95 %", (quantile(s.first_token, 0.95) for s in sums[v]), v, dashed=True),
            )
        ],
        "agreement": [
            _line(f"@{pair[1]} with @{pair[0]}", (_agreement(task, pair, some) for some in slots), pair[1])
            for pair in pairs
        ],
    }


def _binned(traffic: LiveTraffic, minutes: Minutes) -> tuple[list[int], list[list[Slot]]]:
    """Ends of equal steps of time, and the slots in each."""
    step = _STEP_S[minutes]
    last = int(traffic.now()) // SLOT_S * SLOT_S // step * step
    times = [last - step * back for back in reversed(range(60 * minutes // step))]
    slots: list[list[Slot]] = [[] for _ in times]
    for slot in traffic.slots(60 * minutes + step):
        place = -(-(slot.at - times[0]) // step)
        if 0 <= place < len(slots):
            slots[place].append(slot)
    return times, slots


def _sum(some: Iterable[Answered | None]) -> Answered:
    found = Answered()
    for each in some:
        if each is not None:
            found.add(each)
    return found


def _agreement(task: str, pair: tuple[int, int], slots: Iterable[Slot]) -> float | None:
    found = Shadowed()
    for slot in slots:
        if each := slot.shadows.get(task, {}).get(pair):
            found.add(each)
    return found.agreement


def _line(label: str, values: Iterable[float | None], colour: int, *, dashed: bool = False) -> Line:
    rounded = [None if value is None else round(value, 4) for value in values]
    return {
        "label": label,
        "values": rounded,
        "colour": colour if colour == FAILED else colour % 8,
        "dashed": dashed,
    }
