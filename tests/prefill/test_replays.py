"""Answers that decode lost in mid-stream go on once it is back, and are told once."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from prad.core.sampling import Scoring, Token, TokenEvent
from prefill_service.errors import DecodeUnavailableError
from prefill_service.prompt import PromptRequest
from tests.prefill.fakes import HandOff, Setting, request, version

Told = list[tuple[int, int, int]]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill_service.replays._LOOK_AGAIN_S", 0.001)


class Losing(Setting):
    async def handed_over(self, rooms: int) -> HandOff:
        await self.until(lambda: len(self.link.opened) == rooms and self.link.opened[-1].committed)
        await self.idle()
        room: HandOff = self.link.opened[-1]
        return room

    def lose(self) -> None:
        self.link.trouble = "it was killed"
        self.link.lose("it was killed")

    def tells(self, attempt: int, choice: int, index: int, *ids: int, reason: str | None = None) -> None:
        self.link.tell(TokenEvent("r", attempt, choice, index, tuple(map(Token, ids)), reason))

    def asks(self, of: PromptRequest) -> "tuple[Told, asyncio.Task[None]]":
        """What is told (choice, index, id), while it is."""
        told: Told = []
        events: AsyncGenerator[TokenEvent, None] = self.engine.generate(of)

        async def read() -> None:
            async for event in events:
                told.extend((event.choice, event.index, token.id) for token in event.tokens)

        return told, asyncio.create_task(read())


async def test_an_answer_goes_on_behind_what_its_client_has() -> None:
    setting = Losing()
    async with setting.running():
        asked = request("r", range(23), version=version("d"), continuation_ids=(7,), scoring=Scoring(0, 0))
        told, reading = setting.asks(asked)
        await setting.handed_over(1)
        setting.tells(1, 0, 1, 41, 42)
        await setting.idle()
        setting.lose()
        await asyncio.sleep(0.01)
        assert (reading.done(), len(setting.link.opened)) == (False, 1)
        setting.link.trouble = None
        again = (await setting.handed_over(2)).prompt
        assert (again.attempt, setting.residents.taken) == (2, 2)
        assert (again.request.continuation_ids, again.request.output_offset) == ((7, 40, 41, 42), 3)
        assert again.request.scoring is None
        setting.tells(1, 0, 3, 99)  # of the first attempt
        setting.tells(2, 0, 4, 44, reason="stop")
        await reading
    assert told == [(0, 0, 40), (0, 1, 41), (0, 2, 42), (0, 3, 40), (0, 4, 44)]


async def test_of_several_all_begin_anew_and_nothing_is_told_twice() -> None:
    """One of them has ended, another was cancelled."""
    setting = Losing()
    async with setting.running():
        told, reading = setting.asks(request("r", choices=4))
        await setting.handed_over(1)
        setting.tells(1, 0, 1, 41)
        setting.tells(1, 1, 1, 51, reason="stop")
        setting.tells(1, 2, 1, 61, 62)
        await setting.idle()
        setting.engine.cancel_choice("r", 3)
        setting.lose()
        setting.link.trouble = None
        again = (await setting.handed_over(2)).prompt
        assert (again.request.continuation_ids, again.request.output_offset) == ((), 0)
        assert sorted(call for call in setting.link.cancelled if len(call) == 3 and call[1] == 2) == [
            ("r", 2, 1),
            ("r", 2, 3),
        ]
        before = len(told)
        setting.tells(2, 0, 1, 41, 42, reason="stop")
        setting.tells(2, 2, 1, 61, 62, 63, reason="length")
        await reading
    assert told[before:] == [(0, 2, 42), (2, 3, 63)]


async def test_what_nobody_waits_for_any_more_does_not_begin_anew() -> None:
    """All that were wanted were cancelled while decode was away: none is not all."""
    setting = Losing()
    async with setting.running():
        _, reading = setting.asks(request("r", choices=2))
        await setting.handed_over(1)
        setting.tells(1, 0, 1, 41)
        await setting.idle()
        setting.lose()
        await asyncio.sleep(0.01)
        for choice in (0, 1):
            setting.engine.cancel_choice("r", choice)
        setting.link.trouble = None
        await asyncio.wait_for(reading, 5)
        assert len(setting.link.opened) == 1


async def test_an_answer_that_comes_otherwise_is_none() -> None:
    """As where numbers depend on what shares a batch: better an error than an answer of two halves."""
    setting = Losing()
    async with setting.running():
        told, reading = setting.asks(request("r", choices=2))
        await setting.handed_over(1)
        setting.tells(1, 0, 1, 41)
        await setting.idle()
        setting.lose()
        setting.link.trouble = None
        await setting.handed_over(2)
        setting.tells(2, 0, 1, 77)
        with pytest.raises(DecodeUnavailableError, match="it was killed"):
            await reading
    assert told == [(0, 0, 40), (1, 0, 40), (0, 1, 41)]
    assert ("r", 2) in setting.link.cancelled


@pytest.mark.parametrize("back", [False, True])
async def test_an_answer_does_not_go_on_for_ever(back: bool) -> None:
    """Decode does not come back in time, or is lost a second time."""
    setting = Losing(queue_timeout_s=0.02)
    async with setting.running():
        told, reading = setting.asks(request("r"))
        await setting.handed_over(1)
        setting.lose()
        if back:
            setting.link.trouble = None
            await setting.handed_over(2)
            setting.lose()
        with pytest.raises(DecodeUnavailableError, match="it was killed"):
            await reading
        setting.link.trouble = None
    assert len(told) == 1 + back
