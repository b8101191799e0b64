"""What requests are resolved against, and how it follows the registry, also while that is away."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from adapter_registry.client_calls import UNTOLD
from adapter_registry.errors import RegistryUnreachableError
from adapter_registry.keys import NewKey, StoredKey, hashed, issued, revoked
from adapter_registry.messages import RoutingState
from adapter_registry.routing import Routing, drawn
from adapter_registry.versions import State
from prefill_service import follower as module
from prefill_service.catalogue import KeyRing, TaskCatalogue, TaskVersions
from prefill_service.errors import InvalidKeyError, NotReadyError, UnknownModelError
from tests.prefill.fakes import version
from tests.prefill.following import Registry, digest, followed, state


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.0)


async def test_versions_for_other_weights_are_named_and_nothing_waits_for_them() -> None:
    """They were verified where another model is served."""
    registry = Registry(state(1, 1, v1=State.ROUTABLE), state(2, 1, v1=State.ROUTABLE))
    catalogue, _ = await followed(registry, weights="other")
    (trouble,) = registry.troubles
    assert trouble.startswith("t@1: trained on weights tiny of tiny, the model has other: serve that model")
    assert registry.in_force == [1, 2], "what is in force does not depend on them"
    assert registry.fetched == []
    assert catalogue.tasks() == []
    with pytest.raises(NotReadyError, match="trained on weights tiny"):
        catalogue.resolve("t", None)
    same, _ = await followed(Registry(state(1, 1, v1=State.ROUTABLE)), weights="tiny")
    assert same.resolve("t", None)[0].version == 1


async def test_a_task_whose_versions_are_all_retired_says_so() -> None:
    catalogue, _ = await followed(Registry(state(3, None, v1=State.RETIRED)))
    assert catalogue.tasks() == []
    with pytest.raises(UnknownModelError, match="task 't' has no current version"):
        catalogue.resolve("t", None)


def test_a_name_means_the_current_version_and_what_is_not_there_is_named() -> None:
    catalogue = TaskCatalogue("plain")
    with pytest.raises(UnknownModelError, match="none yet"):
        catalogue.resolve("t", None)
    one, two = version("a"), version("b")
    routing = Routing(revision=5, split={2: 100}, aliases={"canary": 1}, previous=1)
    routed = TaskVersions.of(routing, {1: one, 2: two})
    catalogue.replace({"t": routed, "u": TaskVersions.of(Routing(), {1: one})})
    assert catalogue.resolve("t", None) == catalogue.resolve("t", None, "somebody") == (two, 5)
    for name in (1, "canary", "previous"):
        assert catalogue.resolve("t", name) == (one, 5)
    for task, number, said in (
        ("t", 3, "t@1, t@2, t@canary, t@previous"),
        ("t", "latest", "no t@latest"),
        ("u", None, "no current version"),
        ("u", "previous", "no u@previous"),
        ("x", 1, "t, u"),
    ):
        with pytest.raises(UnknownModelError, match=said):
            catalogue.resolve(task, number)
    assert [entry.name for entry in catalogue.tasks()] == ["t"], "one without a current version is not listed"


def with_keys(told: RoutingState, *keys: StoredKey) -> RoutingState:
    return told.model_copy(update={"keys": keys})


async def test_keys_are_in_force_before_anything_is_fetched() -> None:
    alice = issued(None, NewKey(name="alice"), hashed("token"), 1, "", "")
    gone = revoked(alice, "alice", 2, "later", "")
    ring, shown = KeyRing(told=False), "Bearer token"
    with pytest.raises(NotReadyError, match="has not answered yet"):
        ring.client(shown)
    seen: list[str | None] = []

    class Watched(Registry):
        async def fetch(self, task: str, number: int, of: str) -> Any:
            try:
                client = ring.client(shown)
                seen.append(None if client is None else client.name)
            except InvalidKeyError:
                seen.append("refused")
            return await super().fetch(task, number, of)

    states = [state(number, None, **{f"v{number}": State.VERIFIED}) for number in (1, 2, 3)]
    registry = Watched(states[0], with_keys(states[1], alice), with_keys(states[2], gone))
    await followed(registry, keys=ring)
    assert seen == [None, "alice", "refused"]


async def test_without_the_keys_nobody_is_served_as_if_there_were_none() -> None:
    untold = state(1, 1, v1=State.ROUTABLE).model_copy(update={"keys": None})
    registry = Registry(untold)
    catalogue, _ = await followed(registry)
    assert (registry.fetched, catalogue.trouble is None) == ([], False)


async def test_what_answers_is_served_and_fetched_once() -> None:
    first, second = state(1, 1, v1=State.ROUTABLE), state(2, 2, v1=State.ROUTABLE, v2=State.ROUTABLE)
    registry = Registry(first, second)
    catalogue, _ = await followed(registry)
    assert (registry.fetched, catalogue.trouble) == ([1, 2], None)
    assert (registry.in_force, registry.tidied) == ([1, 2], 1), (
        "asked for the next one when each was in force"
    )
    assert catalogue.resolve("t", None)[0].digest == digest(2)
    assert catalogue.resolve("t", 1)[0].digest == digest(1)


async def test_what_is_pushed_is_probed_and_served_only_once_it_answers() -> None:
    registry = Registry(state(1, None, v1=State.PUSHED))
    catalogue, _ = await followed(registry)
    assert registry.probes == [(1, True, "")]
    with pytest.raises(UnknownModelError):
        catalogue.resolve("t", 1)


async def test_one_that_fails_its_probe_is_reported_with_the_reason() -> None:
    async def burns(artefact: Any) -> None:
        raise RuntimeError("burnt")

    registry = Registry(state(1, None, v1=State.PUSHED))
    registry.moot = True
    await followed(registry, burns)
    assert registry.probes == [(1, False, "burnt")]


async def test_a_task_named_as_the_plain_model_is_refused() -> None:
    registry = Registry(state(1, None, v1=State.PUSHED))
    await followed(registry, base="t")
    ((_, ok, reason),) = registry.probes
    assert (ok, "plain model's name" in reason) == (False, True)


async def test_what_cannot_be_had_takes_nothing_else_along() -> None:
    registry = Registry(state(1, 2, v1=State.ROUTABLE, v2=State.ROUTABLE))
    registry.damaged = {1}
    catalogue, _ = await followed(registry)
    assert catalogue.resolve("t", None)[0].digest == digest(2)
    with pytest.raises(NotReadyError, match="t@1 is not here"):
        catalogue.resolve("t", 1)
    assert registry.troubles == ["t@1: damaged"]
    assert registry.in_force == [0], "what could not be had is not said to be in force"


async def test_while_the_registry_is_away_what_was_known_is_served() -> None:
    away = [RegistryUnreachableError("away"), RegistryUnreachableError("away"), ValueError("odd")]
    registry = Registry(state(1, 1, v1=State.ROUTABLE), *away)
    catalogue, _ = await followed(registry)
    assert catalogue.resolve("t", None)[0].artefact.folder == Path()
    assert catalogue.trouble is None


async def test_a_routing_to_what_cannot_be_had_is_not_put_in_force() -> None:
    registry = Registry(state(1, 1, v1=State.ROUTABLE), state(2, 2, v1=State.ROUTABLE, v2=State.ROUTABLE))
    registry.damaged = {2}
    catalogue, _ = await followed(registry)
    assert catalogue.resolve("t", None)[0].digest == digest(1), "it goes on with the one before"
    assert (catalogue.resolve("t", None)[1], registry.in_force) == (1, [1, 1])
    registry = Registry(state(1, 1, v1=State.ROUTABLE), state(2, 2, v2=State.ROUTABLE))
    registry.damaged = {2}
    catalogue, _ = await followed(registry)
    assert catalogue.tasks() == [], "nor can the one before be, whose version is retired"


async def test_while_a_share_of_a_split_cannot_be_had_its_keys_are_asked_to_come_again() -> None:
    found = state(1, 1, v1=State.ROUTABLE, v2=State.ROUTABLE)
    routing = Routing(revision=1, split={1: 50, 2: 50}, aliases={"canary": 2, "stable": 1})
    started = Registry(
        RoutingState(revision=1, tasks=(found.tasks[0].model_copy(update={"routing": routing}),))
    )
    started.damaged = {2}
    catalogue, _ = await followed(started)
    first, second = (next(k for k in KEYS if drawn("t", routing.split, k) == n) for n in (1, 2))
    assert (
        catalogue.resolve("t", "stable")[0].digest
        == catalogue.resolve("t", None, first)[0].digest
        == digest(1)
    )
    for name, key in ((None, second), ("canary", None), (2, None)):
        with pytest.raises(NotReadyError) as refused:
            catalogue.resolve("t", name, key)
        assert refused.value.message == ("t@2 is not here (it answers as: t@1, t@stable): damaged")
        assert refused.value.retry_after == 5.0
    assert [entry.routed.aliases_here for entry in catalogue.tasks()] == [{"stable": 1}]
    with pytest.raises(UnknownModelError, match=r"no t@latest \(it answers as: t@1, t@stable\)"):
        catalogue.resolve("t", "latest")


async def test_a_task_of_which_nothing_can_be_had_is_not_unknown() -> None:
    registry = Registry(state(1, 1, v1=State.ROUTABLE))
    registry.damaged = {1}
    catalogue, _ = await followed(registry)
    with pytest.raises(NotReadyError, match=r"t@1 is not here.*\(it answers as: none\): damaged"):
        catalogue.resolve("t", None, "somebody")
    with pytest.raises(UnknownModelError, match="tasks: none yet"):
        catalogue.resolve("u", None)


async def test_what_routed_nothing_is_no_record_to_go_on_with() -> None:
    registry = Registry(state(1, None, v1=State.VERIFIED), state(2, 2, v1=State.VERIFIED, v2=State.ROUTABLE))
    registry.damaged = {2}
    catalogue, _ = await followed(registry)
    with pytest.raises(NotReadyError, match="t@2 is not here"):
        catalogue.resolve("t", None)


KEYS = [f"user {number}" for number in range(20_000)]


def shares(split: dict[int, int], task: str = "t") -> dict[str, int]:
    return {key: drawn(task, split, key) for key in KEYS}


def test_a_split_divides_keys_by_weight() -> None:
    """Within five standard deviations of the share of as many coins."""
    for split in ({1: 90, 2: 10}, {1: 1, 2: 1}, {1: 995, 7: 5}, {1: 5, 2: 3, 3: 2, 4: 90}):
        found = Counter(shares(split).values())
        for number, weight in split.items():
            share = weight / sum(split.values())
            bound = 5 * (len(KEYS) * share * (1 - share)) ** 0.5
            assert abs(found[number] - len(KEYS) * share) < bound


def test_a_growing_share_moves_keys_one_way() -> None:
    before = shares({1: 90, 2: 10})
    for split in ({1: 80, 2: 20}, {1: 90, 2: 40}, {1: 1, 2: 99}):
        after = shares(split)
        assert {(before[key], after[key]) for key in KEYS} == {(1, 1), (1, 2), (2, 2)}
        before = after
    three, more = shares({1: 50, 2: 30, 3: 20}), shares({1: 50, 2: 30, 3: 40})
    assert {more[key] for key in KEYS if more[key] != three[key]} == {3}
    taken, given = shares({1: 60, 2: 30, 3: 10}), shares({1: 40, 2: 30, 3: 30})
    moved = sum(taken[key] != given[key] for key in KEYS) / len(KEYS)
    assert 0.19 < moved < 2 * 0.2 / 1.2 + 0.02, "from one to another of three: at most twice what must"
    assert shares({1: 5, 2: 3}) == shares({2: 30, 1: 50}), "weights are relative"


def test_a_key_is_drawn_as_it_was_on_any_machine_and_for_each_task_anew() -> None:
    keys = ("ada", "bob", "", "\ud800", "日本語", *map(str, range(20)))
    assert "".join(str(drawn("t", {1: 1, 2: 1}, key)) for key in keys) == "2222221111112122112221221"
    assert shares({1: 1, 2: 1}) != shares({1: 1, 2: 1}, "u")


def warmed(revision: int, **versions: int) -> RoutingState:
    told = state(revision, 1, **dict.fromkeys(versions, State.ROUTABLE))
    (task,) = told.tasks
    routes = tuple(v.model_copy(update={"warmed": versions[f"v{v.version}"]}) for v in task.versions)
    return told.model_copy(update={"tasks": (task.model_copy(update={"versions": routes}),)})


async def test_what_is_asked_to_be_in_memory_is_loaded_once() -> None:
    loaded: list[str] = []

    async def load(artefact: Any) -> None:
        loaded.append(artefact.digest)

    registry = Registry(
        warmed(5, v1=4, v2=0),  # of an earlier life
        warmed(6, v1=4, v2=6),
        warmed(7, v1=4, v2=6),
        warmed(9, v1=9, v2=8),
        state(1, 1, v1=State.ROUTABLE, v2=State.ROUTABLE),  # its data are gone
        warmed(2, v1=2, v2=0),
    )
    await followed(registry, load=load)
    assert loaded == [digest(2), digest(1), digest(2), digest(1)]
    assert registry.in_force == [5, 6, 7, 9, 1, 2], "told once it is there"
    assert registry.troubles == []


async def test_more_cold_versions_than_can_be_told_are_said_to_be_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def load(artefact: Any) -> None:
        raise ValueError("no")

    names = [f"v{number}" for number in range(1, 11)]
    for some, told in (
        (names[:8], [f"t@{number}: no" for number in range(1, 9)]),
        (names, [*(f"t@{number}: no" for number in range(1, 8)), f"{UNTOLD}3 that this service's log names"]),
    ):
        registry = Registry(warmed(1, **dict.fromkeys(some, 0)), warmed(3, **dict.fromkeys(some, 2)))
        await followed(registry, load=load)
        assert registry.troubles == told
    assert "t@10 did not come into memory: no" in caplog.text


async def test_what_does_not_come_into_memory_is_told_and_delays_no_routing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_WARM_S", 0.01)

    async def load(artefact: Any) -> None:
        if artefact.digest == digest(1):
            raise ValueError("it does not load")
        await asyncio.Event().wait()

    registry = Registry(warmed(1, v1=0, v2=0), warmed(3, v1=2, v2=3))
    await followed(registry, load=load)
    assert registry.troubles == ["t@1: it does not load", "t@2: there was no room in memory within 0.01 s"]
    assert registry.in_force == [1, 3]
    registry = Registry(warmed(1, v1=0, v2=0), warmed(3, v1=2, v2=3), warmed(4, v1=2, v2=3))
    await followed(registry, load=load)
    assert registry.troubles == [], "it was wanted once"
