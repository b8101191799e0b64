"""Live traffic is summed up by task and version in slots, bounded, and forgotten after an hour."""

import pytest

from adapter_registry.client import AsyncRegistryClient
from adapter_registry.messages import TIMES, ShadowTraffic, TrafficReport, VersionTraffic
from adapter_registry.settings import RegistrySettings
from adapter_registry.traffic import FOLDED, KEPT_SLOTS, MOST_IN_A_SLOT, SLOT_S, LiveTraffic, quantile

NONE = (0,) * (len(TIMES) + 1)


def times(**seconds):
    """times(_0_2=3): three that took up to 0.2 s."""
    found = list(NONE)
    for name, count in seconds.items():
        found[TIMES.index(float(name[1:].replace("_", ".")))] = count
    return tuple(found)


def answered(version, requests=1, task="a", **more):
    known = {"failed": 0, "tokens": 0, "first_token": NONE, "duration": NONE} | more
    return VersionTraffic(task=task, version=version, requests=requests, **known)


def report(*versions, shadows=()):
    return TrafficReport(versions=versions, shadows=shadows)


@pytest.fixture
def clock():
    return [60 * 17_000.0]


@pytest.fixture
def traffic(clock):
    return LiveTraffic(lambda: clock[0])


def test_reports_of_a_slot_are_one_sum(traffic, clock):
    traffic.add(report(answered(1, 2, tokens=10), answered(2, 5)))
    traffic.add(report(answered(1, 3, failed=1, first_token=times(_0_2=3))))
    assert traffic.versions("a", 60) == {}, "the slot is not over"
    clock[0] += SLOT_S
    found = traffic.versions("a", 60)
    assert (found[1].requests, found[1].failed, found[1].tokens, found[2].requests) == (5, 1, 10, 5)
    assert traffic.whole(60).requests == 10
    assert traffic.versions("b", 60) == {}


def test_time_passes(traffic, clock):
    for _ in range(KEPT_SLOTS + FOLDED):
        traffic.add(report(answered(1)))
        clock[0] += SLOT_S
    assert traffic.versions("a", 3600)[1].requests == KEPT_SLOTS
    assert traffic.versions("a", 60)[1].requests == 6
    clock[0] += 3600
    assert traffic.versions("a", 3600) == {}


def test_old_slots_are_minutes_that_tell_the_same(traffic, clock):
    both = {"task": "a", "version": 1, "shadow": 2, "tokens": 10, "equal_tokens": 5, "dropped": 2}
    shadow = ShadowTraffic(compared=4, equal=3, live_first=times(_0_2=1), shadow_first=NONE, **both)
    for _ in range(KEPT_SLOTS):
        traffic.add(report(answered(1, first_token=times(_0_2=1)), shadows=(shadow,)))
        clock[0] += SLOT_S
    slots = list(traffic.slots(3600))
    ends = [slot.at for slot in slots]
    assert len(slots) < KEPT_SLOTS / 2
    assert ends == sorted(set(ends))
    assert [at % 60 for at in ends if at < clock[0] - 1000] == [0] * sum(at < clock[0] - 1000 for at in ends)
    assert ends[-90:] == [clock[0] - SLOT_S * back for back in reversed(range(90))], "a quarter is fine"
    assert traffic.versions("a", 3600)[1].first_token == list(times(_0_2=KEPT_SLOTS))
    assert traffic.whole(3600).requests == KEPT_SLOTS
    found = traffic.shadows("a", 3600)[1, 2]
    assert (found.dropped, found.live_first) == (2 * KEPT_SLOTS, list(times(_0_2=KEPT_SLOTS)))


def test_a_clock_that_goes_back_ends_nothing(traffic, clock):
    traffic.add(report(answered(1)))
    clock[0] -= 5 * SLOT_S
    traffic.add(report(answered(1)))
    clock[0] += 6 * SLOT_S
    assert traffic.versions("a", 600)[1].requests == 2


def test_no_replica_can_fill_the_memory(traffic, clock):
    for number in range(MOST_IN_A_SLOT + 20):
        traffic.add(report(answered(1, task=f"t{number}")))
    clock[0] += SLOT_S
    (slot,) = traffic.slots(60)
    assert (len(slot.versions), slot.whole.requests) == (MOST_IN_A_SLOT, MOST_IN_A_SLOT + 20)


@pytest.mark.parametrize("console", [True, False])
async def test_reports_are_kept_where_somebody_looks_alone(tmp_path, serving, monkeypatch, console):
    kept = []
    monkeypatch.setattr(LiveTraffic, "add", lambda _, report: kept.append(report))
    settings = RegistrySettings(port=0, data_dir=tmp_path / "registry", console=console, log_level="error")
    with serving(settings) as registry:
        client = AsyncRegistryClient(registry.url, cache_dir=tmp_path, replica="p")
        await client.traffic([answered(1)])
        await client.close()
    assert kept == [report(answered(1))] * console


def test_agreement_is_of_what_was_compared(traffic, clock):
    both = {"task": "a", "version": 1, "shadow": 2, "tokens": 10, "equal_tokens": 5, "dropped": 2}
    both |= {"live_first": NONE, "shadow_first": NONE}
    traffic.add(report(shadows=(ShadowTraffic(compared=0, equal=0, **both),)))
    clock[0] += SLOT_S
    assert traffic.shadows("a", 60)[1, 2].agreement is None
    traffic.add(report(shadows=(ShadowTraffic(compared=4, equal=3, **both),)))
    clock[0] += SLOT_S
    found = traffic.shadows("a", 60)[1, 2]
    assert (found.agreement, found.dropped) == (75.0, 4)


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ({}, 0.5, None),
        ({"_0_2": 4}, 0.5, 0.175),
        ({"_0_2": 4}, 1.0, 0.2),
        ({"_0_005": 2, "_1_0": 2}, 0.5, 0.005),
        ({"_0_005": 1, "_1_0": 1}, 0.75, 0.875),
    ],
)
def test_quantiles_lie_within_their_bounds(counts, share, expected):
    found = quantile(times(**counts), share)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_what_took_longer_than_the_last_bound_ends_there():
    assert quantile((*NONE[:-1], 3), 0.5) == TIMES[-1]
