"""Prompts for which nobody waits: they run beside nothing, and end where others would have to wait."""

import asyncio

import pytest

from prefill_service.decode_link import NoRoom
from prefill_service.errors import OverloadedError
from tests.prefill.fakes import Setting, prompt, request, version


def giving_way(name: str = "shadow", **more: object):
    return request(name, version=version("d"), gives_way=True, **more)


async def refused(tokens) -> None:
    with pytest.raises(OverloadedError):
        await anext(tokens)


async def test_it_runs_where_nothing_waits() -> None:
    setting = Setting()
    async with setting.running():
        tokens = setting.engine.generate(giving_way("r"))
        assert (await anext(tokens)).tokens[0].id == 40
        await setting.idle()
        setting.tell(1, "length")
        assert [token.finish_reason async for token in tokens] == ["length"]
    assert setting.passes.ran == [[("r", 0, 3)]]


async def test_it_does_not_begin_while_anybody_waits_or_would_lose_an_adapter() -> None:
    setting = Setting()
    async with setting.running():
        setting.passes.hold = asyncio.Event()
        running = asyncio.create_task(setting.only_token(request("first", max_tokens=1)))
        await setting.until(lambda: setting.passes.ran)
        waiting = asyncio.create_task(setting.only_token(request("second", max_tokens=1)))
        await setting.idle()
        await refused(setting.engine.generate(giving_way()))
        setting.passes.hold.set()
        await waiting
        await running
        setting.residents.full = True
        await refused(setting.engine.generate(giving_way()))
    assert all(name != "shadow" for ran in setting.passes.ran for name, _, _ in ran)


async def test_who_comes_before_its_pass_goes_alone() -> None:
    setting = Setting()
    async with setting.running():
        setting.passes.hold = asyncio.Event()
        first = asyncio.create_task(setting.only_token(request("first", max_tokens=1)))
        await setting.until(lambda: setting.passes.ran)
        shadow = asyncio.create_task(anext(setting.engine.generate(giving_way())))
        await setting.idle()
        second = asyncio.create_task(setting.only_token(request("second", max_tokens=1)))
        await setting.idle()
        setting.passes.hold.set()
        await second
        with pytest.raises(OverloadedError):
            await shadow
        await first
    assert setting.passes.ran == [[("first", 0, 3)], [("second", 0, 3)]]


async def test_who_still_waits_for_its_adapter_ends_it_too() -> None:
    """A live request may wait for the memory that a shadow's adapter takes, and is in no pass meanwhile."""
    setting = Setting()
    async with setting.running():
        setting.passes.hold = asyncio.Event()
        shadow = asyncio.create_task(anext(setting.engine.generate(giving_way())))
        await setting.until(lambda: setting.passes.ran)
        live = asyncio.create_task(setting.only_token(request("live", max_tokens=1)))
        with pytest.raises(OverloadedError):
            await shadow
        setting.passes.hold.set()
        await live


async def test_it_leaves_decode_when_others_find_no_room_there() -> None:
    setting = Setting()
    full = asyncio.Event()
    answer = setting.link.answer

    def asked(of):
        return NoRoom(0.01) if full.is_set() and not setting.link.cancelled else answer(of)

    setting.link.answer = asked
    async with setting.running():
        tokens = setting.engine.generate(giving_way())
        await anext(tokens)
        await setting.idle()
        full.set()
        tokens_of_live = setting.engine.generate(request("live"))
        live = asyncio.create_task(anext(tokens_of_live))
        await refused(tokens)
        assert setting.link.cancelled == [("shadow", 1)]
        assert (await live).tokens[0].id == 40
        await setting.idle()
        setting.tell(1, "length", name="live")
        assert [token.finish_reason async for token in tokens_of_live] == ["length"]


async def test_it_does_not_wait_for_room_at_decode() -> None:
    setting = Setting()
    setting.link.answer = lambda of: NoRoom(60)
    async with setting.running():
        await refused(setting.engine.generate(giving_way()))


def test_it_takes_no_turn_of_its_task_and_no_place_in_the_prefix_cache() -> None:
    own = prompt("a", range(64), digest="d")
    assert own.block_keys(16)
    shadow = giving_way()
    assert shadow.flow != request("live", version=version("d")).flow
    own.request = shadow
    assert own.block_keys(16) == ()
