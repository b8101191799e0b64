"""The adapters in memory: shared, bounded, least recently used out first, pinned ones never."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapter_registry.routing import Routing
from prad.adapters import Adapter, load_adapter
from prad.artefact import Artefact
from prad.lm import LanguageModel
from prefill_service.catalogue import TaskVersions
from prefill_service.engine import Residents
from prefill_service.errors import InternalError
from prefill_service.pinning import EVERY, Pinned
from tests.conftest import random_artefact
from tests.prefill.fakes import version


class Loader:
    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.loaded: list[str] = []

    def __call__(self, artefact: Artefact) -> Adapter:
        self.loaded.append(artefact.digest)
        return load_adapter(artefact, self._model)


@pytest.fixture
def setting(load_tiny: Callable[[str], LanguageModel], tmp_path: Path) -> tuple[Loader, list[Artefact]]:
    model = load_tiny("llama")
    return Loader(model), [random_artefact(tmp_path / str(i), model, i) for i in range(3)]


async def use(residents: Residents, artefact: Artefact) -> None:
    async with residents.pinned(artefact) as adapter:
        assert adapter.nbytes == artefact.nbytes(4)


async def test_concurrent_users_share_one_load(setting: tuple[Loader, list[Artefact]]) -> None:
    loader, (red, *_) = setting
    residents = Residents(loader, 1 << 30, 4)
    await asyncio.gather(*(use(residents, red) for _ in range(5)))
    assert loader.loaded == [red.digest]
    assert (len(residents), residents.nbytes) == (1, red.nbytes(4))


@pytest.mark.parametrize("method", ["prad-pa", "prad-ia3", "prad-bitfit", "prad-lora", "prad-dora"])
async def test_what_is_counted_is_what_it_takes(
    method: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """In bf16, where vectors stay float32. Only DoRA derives more than its file holds."""
    model = LanguageModel.load(tiny_model("llama"), dtype=torch.bfloat16)
    artefact = random_artefact(tmp_path / "a", model, 1, method=method, config={})
    residents = Residents(Loader(model), 1 << 30, model.dtype.itemsize)
    async with residents.pinned(artefact) as adapter:
        assert residents.nbytes == adapter.nbytes
        assert (artefact.nbytes(2) == adapter.nbytes) is (method != "prad-dora")


async def test_the_least_recently_used_leaves(setting: tuple[Loader, list[Artefact]]) -> None:
    loader, (red, green, blue) = setting
    residents = Residents(loader, 2 * red.nbytes(4), 4)
    for artefact in (red, green, red, blue, red, green):
        await use(residents, artefact)
    assert loader.loaded == [red.digest, green.digest, blue.digest, green.digest]


async def test_pinned_adapters_stay_and_a_newcomer_waits_its_turn(
    setting: tuple[Loader, list[Artefact]],
) -> None:
    loader, (red, green, _) = setting
    residents = Residents(loader, red.nbytes(4), 4)
    async with residents.pinned(red):
        waits = asyncio.create_task(use(residents, green))
        await asyncio.sleep(0.01)
        assert (waits.done(), loader.loaded) == (False, [red.digest])
    await waits
    assert (loader.loaded, residents.nbytes) == ([red.digest, green.digest], green.nbytes(4))


async def test_the_oldest_goes_first_and_takes_along_who_wants_the_same(
    setting: tuple[Loader, list[Artefact]],
) -> None:
    """An adapter in steady use keeps nobody from its room: who wants it again waits behind the others."""
    loader, (red, green, blue) = setting
    residents, order, go = Residents(loader, red.nbytes(4), 4), list[str](), asyncio.Event()
    names = {red.digest: "red", green.digest: "green", blue.digest: "blue"}

    async def one(artefact: Artefact) -> None:
        async with residents.pinned(artefact):
            order.append(names[artefact.digest])
            await go.wait()

    users = [asyncio.create_task(one(artefact)) for artefact in (red, green, red, blue, green, red)]
    await asyncio.sleep(0)  # all are in line
    go.set()
    await asyncio.gather(*users)
    assert order == ["red", "green", "green", "red", "red", "blue"]
    assert loader.loaded == [red.digest, green.digest, red.digest, blue.digest]


async def test_who_leaves_the_line_holds_up_nobody(setting: tuple[Loader, list[Artefact]]) -> None:
    loader, (red, green, blue) = setting
    residents = Residents(loader, 2 * red.nbytes(4), 4)
    async with residents.pinned(red):
        async with residents.pinned(green):
            first, second, third = (
                asyncio.create_task(use(residents, artefact)) for artefact in (blue, red, blue)
            )
            await asyncio.sleep(0)
            first.cancel()
            await second
            assert not third.done(), "there is no room for it"
        await third
    assert loader.loaded == [red.digest, green.digest, blue.digest]


async def test_a_turn_that_comes_as_its_user_leaves_goes_to_the_next(
    setting: tuple[Loader, list[Artefact]],
) -> None:
    loader, (red, green, blue) = setting
    residents = Residents(loader, red.nbytes(4), 4)
    async with residents.pinned(red):
        leaves, stays = (asyncio.create_task(use(residents, artefact)) for artefact in (green, blue))
        await asyncio.sleep(0)
    leaves.cancel()  # its turn has come, it has not heard of it yet
    await stays
    assert leaves.cancelled()
    assert residents.nbytes == blue.nbytes(4)


async def test_files_that_do_not_load_are_an_error_each_time(
    setting: tuple[Loader, list[Artefact]],
) -> None:
    loader, (red, *_) = setting
    residents = Residents(loader, 1 << 30, 4)
    red.weights.unlink()
    for _ in range(2):
        with pytest.raises(InternalError, match="does not load"):
            await use(residents, red)
    assert (len(residents), residents.nbytes) == (0, 0)


async def test_an_operators_tasks_leave_last(setting: tuple[Loader, list[Artefact]]) -> None:
    """Even when they were used least recently; where nothing else is left, they make room as others do."""
    loader, (red, green, blue) = setting
    residents = Residents(loader, 2 * red.nbytes(4), 4, stay={red.digest})
    for artefact in (red, green, blue, red, green, red):
        await use(residents, artefact)
    assert loader.loaded == [red.digest, green.digest, blue.digest, green.digest]
    alone = Residents(loader, red.nbytes(4), 4, stay={red.digest})
    for artefact in (red, green):
        await use(alone, artefact)
    assert alone.nbytes == green.nbytes(4)


async def test_what_a_pinned_tasks_names_mean_is_loaded_before_anybody_asks() -> None:
    versions = {number: version(f"v{number}") for number in (1, 2, 3)}
    pinned, loaded, came = Pinned(["t"]), list[str](), asyncio.Event()

    async def load(artefact: Artefact) -> None:
        loaded.append(artefact.digest)
        came.set()
        if artefact.digest == "v1":
            raise InternalError("the adapter v1 does not load")

    async def told(task: str, routing: Routing | None) -> None:
        came.clear()
        pinned.follow(task, None if routing is None else TaskVersions.of(routing, versions))

    running = asyncio.create_task(pinned.run(load, lambda _: False))
    await told("u", Routing(split={3: 100}))
    await told("t", Routing(split={1: 100}))
    await came.wait()
    await told("t", Routing(split={1: 100}, aliases={"canary": 2}))
    await came.wait()
    assert loaded == ["v1", "v2"], "once each, also the one that does not load, and of no other task"
    assert ("v1" in pinned, "v2" in pinned, "v3" in pinned) == (True, True, False)
    await told("t", Routing(split={2: 100}, previous=1))
    assert ("v1" in pinned, "v2" in pinned) == (True, True), "task@previous is a name, too"
    await told("t", None)
    assert "v2" not in pinned
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert loaded == ["v1", "v2"]
    every = Pinned([EVERY])
    every.follow("u", TaskVersions.of(Routing(split={3: 100}), versions))
    assert "v3" in every


async def test_who_waits_behind_all_others_keeps_nobody_from_what_is_there(
    setting: tuple[Loader, list[Artefact]],
) -> None:
    loader, (red, green, _) = setting
    residents = Residents(loader, red.nbytes(4), 4)

    async def behind() -> None:
        async with residents.pinned(green, last=True):
            pass

    async with residents.pinned(red):
        waits = asyncio.create_task(behind())
        await asyncio.sleep(0)
        await asyncio.wait_for(use(residents, red), 10)
        assert not waits.done()
    await waits
