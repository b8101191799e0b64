"""Beam searches as prefill hands them over: nothing is told before decode is done, a lost one begins anew."""

import asyncio

import pytest

from prad.core.sampling import Token, TokenEvent
from prad.core.search import Beams
from prefill_service.errors import DeadlineError, DecodeUnavailableError, InternalError
from prefill_service.prompt import DecodeSize, Prompt, RoomWanted
from tests.prefill.fakes import HandOff, Setting, request, version

CANDIDATES = Token(40, -1.0, tuple((40 + i, -1.0 - i) for i in range(6)))


class Searching(Setting):
    """Whose prompt passes find CANDIDATES."""

    def __init__(self, **settings: float) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self.passes.drawn = CANDIDATES

    def search(self, *, choices: int = 2, **more: object) -> "asyncio.Task[list[TokenEvent]]":
        asked = request("r", range(23), choices=choices, beams=Beams(3), **more)

        async def all_of() -> list[TokenEvent]:
            return [event async for event in self.engine.generate(asked)]

        return asyncio.create_task(all_of())

    async def handed_over(self, rooms: int = 1) -> HandOff:
        await self.until(lambda: len(self.link.opened) == rooms and self.link.opened[-1].committed)
        await self.idle()
        room: HandOff = self.link.opened[-1]
        return room

    def tell_answers(self, attempt: int = 1) -> None:
        for choice in range(2):
            drawn = tuple(Token(50 + choice + i) for i in range(3))
            self.link.tell(TokenEvent("r", attempt, choice, 0, drawn, "length"))


async def test_one_hand_off_brings_the_candidates_and_the_answers_come_at_the_end() -> None:
    setting = Searching()
    async with setting.running():
        search = setting.search(version=version("d"))
        room = await setting.handed_over()
        assert room.committed is not None
        assert room.committed[0] == CANDIDATES
        assert (setting.residents.taken, setting.residents.pins) == (1, 0), (
            "whoever needs its room may have it"
        )
        assert not search.done()
        setting.tell_answers()
        told = [(e.choice, e.index, e.tokens[0].id, e.finish_reason) for e in await search]
    assert told == [
        (choice, i, 50 + choice + i, "length" if i == 2 else None) for choice in range(2) for i in range(3)
    ]
    assert len(setting.passes.ran) == 3, "23 tokens in chunks of 10: once"
    assert setting.link.cancelled == []


async def test_what_was_cached_is_told_with_the_first_token() -> None:
    setting = Searching()
    async with setting.running():
        for rooms, cached in ((1, 0), (2, 20)):
            search = setting.search()
            await setting.handed_over(rooms)
            setting.tell_answers()
            assert [event.cached_tokens for event in await search] == [cached, 0, 0, 0, 0, 0]


async def test_a_search_that_is_over_with_its_first_tokens_needs_no_decode() -> None:
    setting = Searching()
    async with setting.running():
        events = await setting.search(max_tokens=1)
    assert [(e.choice, e.tokens[0].id, e.finish_reason) for e in events] == [
        (0, 40, "length"),
        (1, 41, "length"),
    ]
    assert setting.link.opened == []


async def test_room_is_asked_for_all_hypotheses() -> None:
    prompt = Prompt(request("r", range(23), max_tokens=10, choices=2, beams=Beams(3)))
    assert prompt.wanted == RoomWanted(23 + 3 * 9, 3, 0)
    assert DecodeSize(99, 4, 99).wanted(prompt) == (5 + 3 * 3, 3)


async def test_its_flow_pays_for_hypotheses_that_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, charged = Searching(), list[int]()
    monkeypatch.setattr(setting.scheduler, "drew", lambda _, tokens: charged.append(tokens))
    async with setting.running():
        search = setting.search()
        await setting.handed_over()
        setting.tell_answers()
        await search
    assert charged == [4, 4], "3 tokens of each of 2 answers, of 3 hypotheses"


async def test_a_search_without_an_end_ends_at_its_deadline() -> None:
    setting = Searching(request_timeout_s=0.05)
    async with setting.running():
        with pytest.raises(DeadlineError):
            await setting.search()
    assert setting.link.cancelled == [("r", 1)]


async def test_a_search_that_decode_ends_early_fails() -> None:
    setting = Searching()
    async with setting.running():
        search = setting.search()
        await setting.handed_over()
        for choice in range(3):
            setting.link.tell(TokenEvent("r", 1, choice, 1, (), "error", "not finite"))
        with pytest.raises(InternalError, match="not finite"):
            await search


async def test_a_client_that_leaves_ends_the_search() -> None:
    setting = Searching()
    async with setting.running():
        search = setting.search()
        await setting.handed_over()
        search.cancel()
        await asyncio.gather(search, return_exceptions=True)
        assert setting.link.cancelled == [("r", 1)]


async def test_a_search_that_decode_lost_begins_anew_once_decode_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prefill_service.replays._LOOK_AGAIN_S", 0.001)
    setting = Searching()
    async with setting.running():
        search = setting.search(version=version("d"))
        await setting.handed_over()
        setting.link.trouble = "it was killed"
        setting.link.lose("it was killed")
        await asyncio.sleep(0.01)
        assert (search.done(), len(setting.link.opened)) == (False, 1)
        setting.link.trouble = None
        again = await setting.handed_over(2)
        assert (again.prompt.attempt, setting.residents.taken) == (2, 2)
        setting.link.tell(TokenEvent("r", 1, 0, 1, (), "error", "fenced by attempt 2"))
        setting.tell_answers(attempt=2)
        assert [event.tokens[0].id for event in await search] == [50, 51, 52, 51, 52, 53]


@pytest.mark.parametrize("back", [False, True])
async def test_a_search_is_not_begun_for_ever(back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode does not come back in time, or is lost a second time."""
    monkeypatch.setattr("prefill_service.replays._LOOK_AGAIN_S", 0.001)
    setting = Searching(queue_timeout_s=0.02)
    async with setting.running():
        search = setting.search()
        await setting.handed_over()
        setting.link.trouble = None if back else "it was killed"
        setting.link.lose("it was killed")
        if back:
            await setting.handed_over(2)
            setting.link.lose("it was killed")
        with pytest.raises(DecodeUnavailableError, match="it was killed"):
            await search
        setting.link.trouble = None


async def test_a_search_that_was_never_handed_over_is_refused_at_once() -> None:
    setting = Searching()
    setting.link.trouble = "nobody there"
    async with setting.running():
        with pytest.raises(DecodeUnavailableError, match="nobody there"):
            await setting.search()
