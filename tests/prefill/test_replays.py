"""Answers that decode lost in mid-stream go on once it is back, and are told once."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from kvtransfer.errors import TimedOutError
from prad.core.kv import Chunk
from prad.core.sampling import Scoring, Token, TokenEvent
from prefill_service.errors import DeadlineError, DecodeUnavailableError, OverloadedError
from prefill_service.passes import answered_in
from prefill_service.prompt import Prompt, PromptRequest
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


def test_output_is_known_in_any_chunk_and_shared_with_nobody() -> None:
    """Ten tokens of a prompt, two given behind them, nine of output."""
    ids = tuple(range(21))
    replayed = Prompt(request("r", ids[:10], continuation_ids=ids[10:], output_offset=9))
    given = Prompt(request("g", ids[:10], continuation_ids=ids[10:]))
    chunks = ((0, 21), (0, 12), (5, 14), (12, 21), (14, 15))
    assert [answered_in(Chunk(replayed, *each)) for each in chunks] == [9, 0, 2, 9, 1]
    assert {answered_in(Chunk(given, *each)) for each in chunks} == {0}
    assert len(given.block_keys(5)) == 4
    assert replayed.block_keys(5) == given.block_keys(5)[:2], "the third block has output"


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


async def test_its_one_turn_is_not_spent_on_a_decode_service_that_does_not_answer() -> None:
    """It is frozen, and its token stream counts as connected: the hand-off is the first to know."""
    setting = Losing()
    setting.link.answer = lambda its: HandOff(its, fails=TimedOutError("no answer to Commit"))
    async with setting.running():
        told, reading = setting.asks(request("r"))
        await setting.until(lambda: told)
        await asyncio.sleep(0.01)
        assert (reading.done(), len(setting.link.opened)) == (False, 1)
        setting.link.answer, setting.link.trouble = HandOff, None
        await setting.handed_over(2)
        setting.tells(2, 0, 2, 42, reason="stop")
        await reading
    assert told == [(0, 0, 40), (0, 1, 40), (0, 2, 42)]


@pytest.mark.parametrize("prompts", [1, 2])
async def test_one_of_several_prompts_waits_for_decode_though_nothing_of_it_is_told(prompts: int) -> None:
    """It would end the others, of which their client may have some."""
    setting = Losing()

    def lost(_: Prompt) -> DecodeUnavailableError:
        setting.link.trouble = "it was killed"
        return DecodeUnavailableError("it was killed")

    setting.link.answer = lost
    async with setting.running():
        asked = request("r", prompts=prompts, prompt_index=1, answer="a", scoring=Scoring(0, 0))
        told, reading = setting.asks(asked)
        await setting.until(lambda: setting.link.opened)
        await asyncio.sleep(0.01)
        if prompts == 1:
            with pytest.raises(DecodeUnavailableError, match="it was killed"):
                await reading
            return
        assert not reading.done()
        setting.link.answer, setting.link.trouble = HandOff, None
        again = (await setting.handed_over(2)).prompt
        assert (again.attempt, again.request) == (2, asked)
        setting.tells(2, 0, 1, 41, reason="stop")
        await reading
    assert told == [(0, 0, 40), (0, 1, 41)]


@pytest.mark.parametrize("choices", [1, 2])
async def test_the_rest_of_an_answer_keeps_its_place_in_a_full_queue(choices: int) -> None:
    setting = Losing(max_waiting=2)
    async with setting.running():
        _, reading = setting.asks(request("r", choices=choices, version=version("d", "flood")))
        await setting.handed_over(1)
        setting.passes.hold = asyncio.Event()
        ahead = asyncio.create_task(setting.only_token(request("ahead", max_tokens=1)))
        await setting.until(lambda: len(setting.passes.ran) == 2)
        setting.scheduler.add(waits := Prompt(request("waits", version=version("d", "flood"))))
        setting.lose()
        setting.link.trouble = None
        await setting.until(lambda: setting.engine.waiting == 2)
        for name in ("quiet", "other"):
            with pytest.raises(OverloadedError, match="waiting already"):
                await anext(setting.engine.generate(request(name, version=version("q", "quiet"))))
        assert not reading.done()
        setting.scheduler.remove(waits)
        setting.passes.hold.set()
        await ahead
        await setting.handed_over(2)
        for choice in range(choices):
            setting.tells(2, choice, 2, 42, reason="stop")
        await reading


async def test_an_answer_that_is_overdue_is_not_said_to_have_no_token() -> None:
    setting = Losing(request_timeout_s=0.2)
    async with setting.running():
        told, reading = setting.asks(request("r"))
        await setting.handed_over(1)
        setting.passes.hold = asyncio.Event()
        setting.lose()
        setting.link.trouble = None
        with pytest.raises(DeadlineError, match="took longer than it may"):
            await reading
        setting.passes.hold.set()
    assert told


async def test_a_shadow_does_not_go_on() -> None:
    setting = Losing()
    async with setting.running():
        _, reading = setting.asks(request("r", gives_way=True))
        await setting.handed_over(1)
        setting.lose()
        setting.link.trouble = None
        with pytest.raises(DecodeUnavailableError):
            await reading
        assert len(setting.link.opened) == 1
