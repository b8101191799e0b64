"""Adapters on their way: tasks are served before all are here, and each as soon as it is."""

import asyncio

import pytest

from adapter_registry.client_calls import Progress
from adapter_registry.errors import RegistryUnreachableError, StoredFilesDamagedError, StoreUnavailableError
from adapter_registry.messages import RoutingState, TaskRoute
from adapter_registry.routing import Routing
from adapter_registry.versions import State
from prefill_service import follower as module
from prefill_service.catalogue import TaskCatalogue
from prefill_service.errors import NotReadyError, OverloadedError, UnknownModelError
from prefill_service.prompt import TaskVersion
from tests.prefill.following import digest, routed
from tests.prefill.live_registry import LiveRegistry, following, tasks, until, wanted


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_RETRY_S", "_TELL_S", "_FETCH_S", "AGAIN_S"):
        monkeypatch.setattr(module, name, 0.01)


NAMES = [f"t{number:02}" for number in range(20)]


async def test_what_a_request_names_comes_before_all_others() -> None:
    registry = LiveRegistry(tasks(1, *NAMES))
    async with following(registry) as catalogue:
        assert catalogue.fetching == 20
        assert [entry.name for entry in catalogue.tasks()] == NAMES, "listed before they are here"
        waiting = [asyncio.create_task(wanted(catalogue, "t19")) for _ in range(50)]
        await until(lambda: "t19@1" in registry.fetched)
        assert registry.fetched == ["t00@1", "t01@1", "t02@1", "t03@1", "t19@1"], (
            "in a place kept free for it"
        )
        registry.let("t19@1")
        assert {found.digest for found in await asyncio.gather(*waiting)} == {digest(1901)}
        assert registry.fetched.count("t19@1") == 1, "once for all of them"
        await until(lambda: registry.progress == Progress(1, 19, []))  # routed by it, and how many miss
        named = [asyncio.create_task(wanted(catalogue, name)) for name in NAMES[4:19]]
        await until(lambda: registry.running == 8)
        await asyncio.sleep(0.01)
        assert registry.most == 8, "at once"
        registry.let(*NAMES, *(f"{name}@1" for name in NAMES))
        await asyncio.gather(*named)
        await until(lambda: not registry.progress.fetching)
        assert (catalogue.fetching, sorted(registry.fetched)) == (0, [f"{name}@1" for name in NAMES])


async def test_one_that_cannot_be_had_stops_no_other_and_is_tried_again() -> None:
    registry = LiveRegistry(tasks(1, "a", "b"))
    registry.wrong["a@1"] = StoredFilesDamagedError("damaged")
    registry.let("a@1", "b@1")
    async with following(registry) as catalogue:
        assert (await wanted(catalogue, "b")).digest == digest(101)
        await until(lambda: registry.progress.troubles)
        assert registry.progress == Progress(0, 0, ["a@1: damaged"])
        with pytest.raises(NotReadyError, match=r"a@1 is not here.*damaged") as refused:
            await wanted(catalogue, "a")
        assert refused.value.retry_after
        registry.wrong.clear()
        await until(lambda: registry.progress == Progress(1, 0, []))
        assert (await wanted(catalogue, "a")).digest == digest(1)


async def test_who_waits_hears_why_it_cannot_be_had() -> None:
    registry = LiveRegistry(tasks(1, "a"))
    registry.wrong["a@1"] = ValueError("odd")
    async with following(registry) as catalogue:
        waiting = asyncio.create_task(wanted(catalogue, "a"))
        await until(lambda: registry.fetched)
        registry.let("a@1")
        with pytest.raises(NotReadyError, match="a@1 is not here: odd"):
            await waiting


async def test_a_registry_that_is_away_stops_what_is_fetched_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = LiveRegistry(tasks(1, *NAMES))
    registry.let(*(f"{name}@1" for name in NAMES))
    registry.wrong = {f"{name}@1": RegistryUnreachableError("no registry") for name in NAMES[1:]}
    registry.away = True
    async with following(registry) as catalogue:
        assert (await wanted(catalogue, "t00")).digest == digest(1), "what is here is served"
        with pytest.raises(NotReadyError, match="t07@1 is not here: no registry"):
            await wanted(catalogue, "t07")
        assert catalogue.fetching == 19, "they are not given up"
        tries = len(registry.fetched)
        await asyncio.sleep(0.05)
        assert len(registry.fetched) < tries + 19, "nor is each tried again and again meanwhile"
        registry.wrong.clear()
        registry.away = False
        await until(lambda: registry.progress == Progress(1, 0, []))
    assert "adapters are fetched when that is mended" in caplog.text


async def test_a_routing_is_in_force_when_what_it_names_is_here() -> None:
    registry = LiveRegistry(tasks(1, "a", *NAMES))
    registry.let("a@1")
    async with following(registry) as catalogue:
        first = await wanted(catalogue, "a")
        both = {"v1": State.ROUTABLE, "v2": State.ROUTABLE}
        (moved,) = tasks(2, "a", current=2, **both).tasks
        registry.tell(RoutingState(revision=2, tasks=(moved,), mark="mark 2", since=1, same_keys=True))
        await until(lambda: "a@2" in registry.fetched)
        assert "t05@1" not in registry.fetched, "what is new comes before the background"
        await until(lambda: registry.asked[-1] == (2, "mark 2"))
        assert (await wanted(catalogue, "a"), registry.progress.in_force) == (first, 0)
        registry.let("a@2")
        await until(lambda: registry.progress.in_force == 2)
        assert (await wanted(catalogue, "a")).digest == digest(2)
        assert registry.progress.fetching == 20, "of others"


async def test_only_what_changed_is_asked_for_and_a_gap_is_filled_with_all_there_is() -> None:
    registry = LiveRegistry(tasks(1, "a", "b"))
    registry.let("a@1", "b@1", "c@1")
    async with following(registry) as catalogue:
        await until(lambda: registry.asked == [(1, "mark 1")] or len(registry.asked) > 1)
        (changed,) = tasks(2, "c").tasks
        registry.tell(RoutingState(revision=2, tasks=(changed,), mark="mark 2", since=1, same_keys=True))
        assert await until_known(catalogue, "c")
        assert {entry.name for entry in catalogue.tasks()} == {"a", "b", "c"}
        registry.tell(RoutingState(revision=9, tasks=(), since=7))
        registry._first = tasks(9, "a")
        await until(lambda: registry.wholes == 2)
        await until(lambda: [entry.name for entry in catalogue.tasks()] == ["a"])
        with pytest.raises(UnknownModelError):
            catalogue.resolve("c", None)


async def until_known(catalogue: TaskCatalogue, task: str) -> TaskVersion:
    await until(lambda: any(entry.name == task for entry in catalogue.tasks()))
    return await wanted(catalogue, task)


async def test_what_is_retired_while_a_request_waits_is_not_fetched_any_more() -> None:
    registry = LiveRegistry(tasks(1, *NAMES))
    async with following(registry) as catalogue:
        waiting = asyncio.create_task(wanted(catalogue, "t19"))
        await until(lambda: "t19@1" in registry.fetched)
        gone = TaskRoute(
            task="t19",
            routing=Routing(revision=2),
            versions=tuple(
                v.model_copy(update={"state": State.RETIRED}) for v in tasks(1, *NAMES).tasks[19].versions
            ),
        )
        registry.tell(RoutingState(revision=2, tasks=(gone,), since=1, same_keys=True, mark="mark 2"))
        with pytest.raises(UnknownModelError, match="no current version"):
            await waiting
        registry.let("t19@1")
        await until(lambda: registry.running == 4)
        assert catalogue.fetching == 19


async def test_as_many_wait_as_may_and_as_long() -> None:
    registry = LiveRegistry(tasks(1, *NAMES))
    async with following(registry, most_waiting=2, patience_s=0.05) as catalogue:
        waiting = [asyncio.create_task(wanted(catalogue, name)) for name in NAMES[:2]]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="2 requests wait"):
            await wanted(catalogue, "t05")
        for refused in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(refused, NotReadyError)
            assert "did not come within 0.05 s" in refused.message
        waiting = [asyncio.create_task(wanted(catalogue, "t07"))]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        registry.let("t07@1")
        await until(lambda: catalogue.fetching == 19)
        assert (await wanted(catalogue, "t07")).digest == digest(701), "though nobody waits any more"


def started(revision: int, split: int, old: int, **aliases: int) -> RoutingState:
    """One task of four versions that answer, t@old among its names."""
    versions = dict.fromkeys(("v1", "v2", "v3", "v4"), State.ROUTABLE)
    return routed(revision, {split: 100}, versions, aliases={"old": old, **aliases})


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(
    ("promoted", "here", "name"),
    [
        (started(2, 2, 3), "t@1", None),
        (started(2, 2, 1), "t@1", None),  # though it would bring t@old
        (started(2, 1, 3, canary=2), "t@4", "canary"),
    ],
)
async def test_a_promotion_during_a_start_takes_away_nothing_that_answers(
    promoted: RoutingState, here: str, name: str | None, damaged: bool
) -> None:
    registry = LiveRegistry(started(1, 1, 3, canary=4))
    if damaged:
        registry.wrong["t@2"] = StoredFilesDamagedError("damaged")
        registry.let("t@2")
    registry.let(here)
    number = int(here[2:])
    async with following(registry) as catalogue:
        await until(lambda: here in registry.fetched and catalogue.fetching == 3 - damaged)
        assert catalogue.resolve("t", name)[0].version == number
        registry.tell(promoted)
        await until(lambda: (2, "") in registry.asked)
        assert catalogue.resolve("t", name)[0].version == number, "nobody waits for a promotion"
        assert registry.progress.in_force < 2
        registry.wrong.clear()
        registry.let("t@1", "t@2", "t@3", "t@4")
        await until(lambda: registry.progress == Progress(2, 0, []))
        now = catalogue.resolve("t", name)[0].version
        assert now == (promoted.tasks[0].routing.aliases[name] if name else 2)


async def test_a_promotion_that_brings_plain_requests_an_answer_is_in_force_at_once() -> None:
    registry = LiveRegistry(started(1, 2, 3, canary=4))
    registry.wrong["t@2"] = StoredFilesDamagedError("damaged")
    registry.let("t@1", "t@2", "t@4")
    async with following(registry) as catalogue:
        await until(lambda: catalogue.fetching == 1)
        registry.tell(started(2, 1, 3, canary=3))
        await until(lambda: (2, "") in registry.asked)
        assert catalogue.resolve("t", None)[0].version == 1, "though t@canary waits for it"


async def test_what_goes_on_being_wrong_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A registry that misses its bucket, or keeps damaged files, is asked again all the time."""
    registry = LiveRegistry(tasks(1, "a", "b"))
    registry.let("a@1", "b@1")
    registry.wrong = {"a@1": StoreUnavailableError("no bucket"), "b@1": StoredFilesDamagedError("damaged")}
    async with following(registry) as catalogue:
        await until(lambda: min(registry.fetched.count(name) for name in ("a@1", "b@1")) > 5)
        assert [text for text in caplog.messages if "damaged" in text] == ["b@1 cannot be had: damaged"]
        registry.wrong.pop("b@1")
        await until(lambda: not registry.progress.troubles)
        caplog.clear()
        tries = len(registry.fetched)
        await until(lambda: len(registry.fetched) > tries + 5)
        assert len(caplog.messages) <= 1, "of what was said before"
        registry.wrong.clear()
        await until(lambda: registry.progress == Progress(1, 0, []))
        assert (await wanted(catalogue, "a")).digest == digest(1)
