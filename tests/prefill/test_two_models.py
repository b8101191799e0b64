"""Versions for several base models on one registry: a replica serves those of its own, judges no other."""

from typing import Any

import pytest

from adapter_registry.client_calls import MOST_TROUBLES
from adapter_registry.messages import RoutingState
from adapter_registry.versions import State
from prefill_service.catalogue import TaskCatalogue
from prefill_service.errors import NotReadyError
from tests.prefill.following import Registry, digest, followed, routed, state

BOTH = {"v1": State.ROUTABLE, "v2": State.ROUTABLE}
BASES = {"v1": "old", "v2": "new", "v3": "new"}


def split(revision: int, *versions: int, **aliases: int) -> RoutingState:
    return routed(revision, dict.fromkeys(versions, 100), BOTH, BASES, aliases)


def answer(catalogue: TaskCatalogue, name: int | str | None = None, key: str | None = None) -> str:
    return catalogue.resolve("t", name, key)[0].digest


async def test_a_split_between_models_is_divided_at_each_between_its_own() -> None:
    for weights, number in (("old", 1), ("new", 2)):
        registry = Registry(split(1, 1, 2))
        catalogue, _ = await followed(registry, weights=weights)
        assert {answer(catalogue, key=f"user {n}") for n in range(40)} == {digest(number)}
        assert (registry.fetched, registry.troubles, registry.in_force) == ([number], [], [1])
        assert [entry.default.version for entry in catalogue.tasks()] == [number]
        with pytest.raises(NotReadyError, match=rf"t@{3 - number} is not here .it answers as: t@{number}"):
            answer(catalogue, 3 - number)


async def test_versions_of_one_model_share_what_is_left_of_a_split_as_their_weights_say() -> None:
    versions = {**BOTH, "v3": State.ROUTABLE}
    told = routed(1, {1: 1000, 2: 50, 3: 50}, versions, BASES)
    catalogue, _ = await followed(Registry(told), weights="new")
    alone, _ = await followed(Registry(routed(1, {2: 50, 3: 50}, versions, BASES)), weights="new")
    users = [f"user {n}" for n in range(200)]
    shares = [answer(catalogue, key=user) for user in users]
    assert set(shares) == {digest(2), digest(3)}
    assert shares == [answer(alone, key=user) for user in users], "nobody moves when the others leave it"


async def test_an_alias_for_another_model_is_answered_there_alone_and_stops_nothing() -> None:
    registry = Registry(split(1, 1), split(2, 1, 2, canary=2))
    catalogue, _ = await followed(registry, weights="old")
    assert catalogue.resolve("t", None) == catalogue.resolve("t", 1)
    assert catalogue.resolve("t", None)[1] == 2, "the routing is in force"
    with pytest.raises(NotReadyError, match="t@2 is not here"):
        answer(catalogue, "canary")


async def test_what_was_promoted_for_another_model_alone_leaves_the_routing_before() -> None:
    registry = Registry(split(1, 1), split(2, 2))
    catalogue, _ = await followed(registry, weights="old")
    assert catalogue.resolve("t", None)[1] == 1
    assert answer(catalogue) == digest(1)
    assert registry.troubles == []
    started, told = Registry(split(2, 2)), "t@2: trained on weights new of tiny, the model has old"
    catalogue, _ = await followed(started, weights="old")
    assert [trouble.partition(":")[0] for trouble in started.troubles] == ["t@2"]
    assert started.troubles[0].startswith(told), "one that starts now knows none before"
    with pytest.raises(NotReadyError, match=f"t@2 is not here .*{told.partition(': ')[2]}"):
        answer(catalogue)


async def test_a_push_for_another_model_is_left_to_who_serves_that() -> None:
    pushed = {"v1": State.ROUTABLE, "v2": State.PUSHED, "v3": State.PUSHED}
    told = routed(3, {1: 100}, pushed, {"v2": "new"})
    old = Registry(told, told)
    catalogue, _ = await followed(old, weights="tiny")
    assert [number for number, ok, _ in old.probes] == [3], "once"
    assert [trouble.partition(":")[0] for trouble in old.troubles] == ["t@2"], "whoever pushed it is told"
    assert answer(catalogue) == digest(1)
    new = Registry(told, told)
    await followed(new, weights="new")
    assert [number for number, ok, _ in new.probes] == [2]


async def test_who_warms_a_version_hears_where_it_cannot_be() -> None:
    async def load(artefact: Any) -> None:
        loaded.append(artefact.digest)

    before, after = split(1, 1, 2), split(2, 1, 2)
    (task,) = after.tasks
    versions = tuple(v.model_copy(update={"warmed": 2}) for v in task.versions)
    after = after.model_copy(update={"tasks": (task.model_copy(update={"versions": versions}),)})
    loaded: list[str] = []
    registry = Registry(before, after)
    await followed(registry, weights="old", load=load)
    assert loaded == [digest(1)]
    assert [trouble.partition(":")[0] for trouble in registry.troubles] == ["t@2"]


async def test_versions_of_others_hide_nothing_that_somebody_waits_for() -> None:
    async def load(artefact: Any) -> None:
        raise ValueError("no room")

    others = {f"v{number}": State.ROUTABLE for number in range(3, 13)}
    pushed = {"v13": State.PUSHED, "v14": State.PUSHED}
    bases = dict.fromkeys((*others, *pushed), "new")
    split = dict.fromkeys(range(3, 13), 10)
    ours = {"v1": State.ROUTABLE, "v2": State.ROUTABLE}
    told = routed(2, split, {**ours, **others, **pushed}, bases)
    (task,) = told.tasks
    versions = tuple(
        v.model_copy(update={"warmed": 2 if v.version == 1 else 0, "pushed_at": f"2026-01-{v.version:02}"})
        for v in task.versions
    )
    told = told.model_copy(update={"tasks": (task.model_copy(update={"versions": versions}),)})
    registry = Registry(routed(1, split, {"v1": State.ROUTABLE, **others}, bases), told)
    registry.damaged = {2}
    await followed(registry, weights="tiny", load=load)
    assert [trouble.partition(":")[0] for trouble in registry.troubles[:4]] == ["t@1", "t@2", "t@14", "t@13"]
    assert len(registry.troubles) == MOST_TROUBLES


async def test_a_version_that_is_a_trouble_is_cold_where_it_is_wanted() -> None:
    wanted = state(2, 1, **{f"v{number}": State.ROUTABLE for number in range(1, 13)})
    (task,) = wanted.tasks
    versions = tuple(v.model_copy(update={"warmed": 2 if v.version == 12 else 0}) for v in task.versions)
    wanted = wanted.model_copy(update={"tasks": (task.model_copy(update={"versions": versions}),)})
    registry = Registry(state(1, 1, v1=State.ROUTABLE), wanted)
    registry.damaged = set(range(2, 13))
    await followed(registry)
    assert registry.troubles[0] == "t@12: damaged"


async def test_any_weights_are_taken_where_that_is_said() -> None:
    registry = Registry(state(1, 1, v1=State.ROUTABLE, v2=State.ROUTABLE), split(2, 1, 2))
    catalogue, _ = await followed(registry)
    assert {answer(catalogue, key=f"user {n}") for n in range(40)} == {digest(1), digest(2)}
