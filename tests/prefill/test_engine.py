"""The engine among parts of plain data: what comes of a prompt, whoever fails, leaves or says nothing."""

import asyncio

import pytest

from kvtransfer.errors import LostError
from prad.core.sampling import TokenEvent
from prad.core.search import Beams
from prefill_service.decode_link import NoRoom
from prefill_service.errors import (
    DeadlineError,
    DecodeUnavailableError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    ServingError,
)
from prefill_service.prompt import Prompt
from tests.prefill.fakes import HandOff, Setting, request, version


async def test_a_request_is_scheduled_run_and_delivered() -> None:
    setting = Setting()
    async with setting.running():
        tokens = setting.engine.generate(request("r", range(23)))
        first = await anext(tokens)
        assert (first.index, first.tokens[0].id, first.finish_reason) == (0, 40, None)
        await setting.idle()
        (room,) = setting.link.opened
        assert [token.id for token in room.committed] == [40]
        assert [chunk for run in setting.passes.ran for chunk in run][-1] == ("r", 20, 23)
        setting.tell(1, "stop", tokens=3)
        assert [(t.index, t.finish_reason) async for t in tokens] == [(1, None), (2, None), (3, "stop")]
    assert setting.link.cancelled == []


async def test_one_token_needs_no_room_at_decode() -> None:
    setting = Setting()
    async with setting.running():
        only = await setting.only_token(request("r", max_tokens=1))
    assert (only.finish_reason, setting.link.opened) == ("length", [])


@pytest.mark.parametrize("reason", ["deadline", "error"])
async def test_an_early_end_delivers_what_it_brings_fails_and_is_cancelled(reason: str) -> None:
    setting = Setting()
    async with setting.running():
        tokens = setting.engine.generate(request("r"))
        await anext(tokens)
        await setting.idle()
        setting.tell(1, reason, tokens=2)
        assert [(await anext(tokens)).tokens[0].id for _ in range(2)] == [41, 42]
        with pytest.raises(DeadlineError if reason == "deadline" else InternalError):
            await anext(tokens)
    assert setting.link.cancelled == [("r", 1)]


async def test_a_stream_that_decode_dropped_ends_at_the_requests_deadline() -> None:
    setting = Setting(request_timeout_s=0.05)
    async with setting.running():
        tokens = setting.engine.generate(request("r"))
        await anext(tokens)
        with pytest.raises(DeadlineError):
            await anext(tokens)
    assert setting.link.cancelled == [("r", 1)]


async def test_decode_is_asked_after_what_it_owes_and_its_answer_ends_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A choice that has ended, or was cancelled, is not asked after, and no answer about it counts."""
    monkeypatch.setattr("prefill_service.engine._ASK_EVERY_S", 0.001)
    setting = Setting()
    async with setting.running():
        tokens = setting.engine.generate(request("r", choices=3))
        firsts = [await anext(tokens) for _ in range(3)]
        assert [first.choice for first in firsts] == [0, 1, 2]
        setting.engine.cancel_choice("r", 2)
        await setting.until(lambda: setting.link.asked)
        assert setting.link.asked[0] == [("r", 1, 0), ("r", 1, 1)]
        setting.tell(1, "stop", choice=0)
        await setting.until(lambda: setting.link.asked[-1] == [("r", 1, 1)])
        for choice in (0, 2):
            setting.link.tell(TokenEvent("r", 1, choice, 0, (), "error", "not here"))
        assert (await anext(tokens)).finish_reason == "stop"
        setting.link.tell(TokenEvent("r", 1, 1, 0, (), "error", "not here"))
        with pytest.raises(InternalError, match="not here"):
            await anext(tokens)
        asked = len(setting.link.asked)
        await asyncio.sleep(0.01)
        assert len(setting.link.asked) == asked


async def test_a_prompt_that_is_never_run_ends_at_its_deadline() -> None:
    setting = Setting(request_timeout_s=0.05)
    setting.link.answer = lambda prompt: NoRoom(60)
    async with setting.running():
        with pytest.raises(DeadlineError):
            await anext(setting.engine.generate(request("r")))


async def test_loading_an_adapter_is_within_the_deadline() -> None:
    setting = Setting(request_timeout_s=0.05)
    setting.residents.loaded = asyncio.Event()
    async with setting.running():
        for beams in (None, Beams(2)):
            with pytest.raises(DeadlineError):
                await anext(setting.engine.generate(request("r", version=version("d"), beams=beams)))


async def test_prompts_that_wait_for_their_adapter_are_within_the_queues_bound() -> None:
    setting = Setting(max_waiting=2)
    setting.residents.loaded = asyncio.Event()
    async with setting.running():
        loading = [
            asyncio.create_task(setting.only_token(request(f"r{i}", version=version("d"), max_tokens=1)))
            for i in range(2)
        ]
        await setting.until(lambda: setting.engine.waiting == 2)
        with pytest.raises(OverloadedError):
            await anext(setting.engine.generate(request("late", version=version("d"))))
        with pytest.raises(OverloadedError):
            await anext(setting.engine.generate(request("plain")))
        setting.residents.loaded.set()
        assert [token.finish_reason for token in await asyncio.gather(*loading)] == ["length"] * 2


async def test_no_room_waits_and_whoever_came_later_waits_behind_it() -> None:
    setting = Setting()
    told = iter([NoRoom(0.01)])
    setting.link.answer = lambda prompt: next(told, None) or HandOff(prompt)
    async with setting.running():
        jobs = [setting.engine.generate(request(name)) for name in ("first", "second")]
        await asyncio.gather(*(anext(job) for job in jobs))
        _, given_back, *rooms = setting.link.opened
        assert given_back.aborted is not None
        assert [(r.prompt.request.request_id, r.prompt.attempt) for r in rooms] == [
            ("first", 1),
            ("second", 2),
        ]
        assert setting.passes.ran == [[("first", 0, 3), ("second", 0, 3)]]
        for job in jobs:
            await job.aclose()


async def test_room_that_decode_is_slow_to_take_back_holds_up_nobody() -> None:
    setting = Setting()
    told, slow = iter([NoRoom(0.0)]), asyncio.Event()
    setting.link.answer = lambda prompt: next(told, None) or HandOff(prompt, slow)
    async with setting.running():
        jobs = [setting.engine.generate(request(name)) for name in ("first", "second")]
        async with asyncio.timeout(10):
            await asyncio.gather(*(anext(job) for job in jobs))
        assert [room.aborted for room in setting.link.opened[1:]] == [
            "an earlier prompt goes first",
            None,
            None,
        ]
        slow.set()
        for job in jobs:
            await job.aclose()


async def test_no_room_for_too_long_is_an_overload() -> None:
    setting = Setting(queue_timeout_s=0.01)
    setting.link.answer = lambda prompt: NoRoom(0.02)
    async with setting.running():
        with pytest.raises(OverloadedError, match="no room"):
            await anext(setting.engine.generate(request("r")))


async def test_a_smaller_one_passes_who_has_no_room_even_with_room_asked_for_together() -> None:
    setting = Setting()
    setting.link.answer = lambda p: NoRoom(60) if p.request.request_id == "large" else HandOff(p)
    async with setting.running():
        large = asyncio.create_task(anext(setting.engine.generate(request("large", max_tokens=7000))))
        small = setting.engine.generate(request("small"))
        async with asyncio.timeout(10):
            await anext(small)
            later = setting.engine.generate(request("later"))
            await anext(later)
        assert not large.done()
        assert [room.aborted for room in setting.link.opened if isinstance(room, HandOff)] == [None, None]
        large.cancel()
        await asyncio.gather(large, return_exceptions=True)
        await small.aclose()
        await later.aclose()


async def test_whoever_waits_too_long_is_told_when_to_come_again_asked_for_or_not() -> None:
    setting = Setting(queue_timeout_s=0.05)
    setting.link.answer = lambda prompt: NoRoom(0.02)
    async with setting.running():
        jobs = [anext(setting.engine.generate(request(f"r{i}"))) for i in range(9)]  # a pass takes 8
        errors = await asyncio.gather(*jobs, return_exceptions=True)
        assert all(isinstance(e, OverloadedError) and "no room" in e.message for e in errors)


async def test_who_cannot_be_reached_in_time_is_refused_on_arrival_and_told_how_long_that_is() -> None:
    now = [100.0]
    setting = Setting(max_waiting=200, queue_timeout_s=30.0, clock=lambda: now[0])
    flood, quiet = version("d", "flood"), version("q", "quiet")
    for i in range(100):  # of 22 tokens each at most, 10 of which are computed in a turn
        setting.scheduler.add(Prompt(request(f"r{i}", version=flood), enqueued=100.0))
    for _ in range(10):
        for chunk in setting.scheduler.next_pass(now[0])[1:]:
            setting.scheduler.put_back(chunk)
        setting.scheduler.computed()
        now[0] += 1
    with pytest.raises(OverloadedError, match="may wait for 30 s") as caught:
        await anext(setting.engine.generate(request("late", version=flood)))
    assert caught.value.retry_after == pytest.approx(60, rel=0.2)  # 90 wait, one leaves each second
    async with asyncio.timeout(10):
        asked = asyncio.create_task(anext(setting.engine.generate(request("quiet", version=quiet))))
        await setting.until(lambda: setting.engine.live)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)


async def test_who_is_refused_for_good_is_told_and_others_go_on() -> None:
    setting = Setting()
    refused = InvalidRequestError("too large")
    setting.link.answer = lambda p: refused if p.request.request_id == "large" else HandOff(p)
    async with setting.running():
        large, small = (setting.engine.generate(request(name)) for name in ("large", "small"))
        error, token = await asyncio.gather(anext(large), anext(small), return_exceptions=True)
        assert error is refused
        assert isinstance(token, TokenEvent)
        await small.aclose()


async def test_a_failed_pass_fails_its_prompts_and_gives_their_room_back() -> None:
    setting = Setting()
    setting.passes.fails = RuntimeError("burnt")
    async with setting.running():
        with pytest.raises(InternalError):
            await anext(setting.engine.generate(request("r")))
        await setting.idle()
        assert [room.aborted for room in setting.link.opened] == ["cancelled"]


async def test_who_cannot_be_sent_what_it_begins_with_ends_alone() -> None:
    setting = Setting()
    setting.passes.unsent = {"bad": IndexError("out of range")}
    async with setting.running():
        jobs = [setting.engine.generate(request(name)) for name in ("good", "bad", "fine")]
        first, bad, third = await asyncio.gather(*(anext(job) for job in jobs), return_exceptions=True)
        assert isinstance(bad, InternalError)
        assert isinstance(first, TokenEvent)
        assert isinstance(third, TokenEvent)
        assert setting.passes.ran == [[("good", 0, 3), ("fine", 0, 3)]]
        for job in jobs:
            await job.aclose()


@pytest.mark.parametrize("why", ["lost", "left", "overdue"])
async def test_who_is_given_up_between_its_chunks_is_not_computed_to_the_end(why: str) -> None:
    setting = Setting(request_timeout_s=0.2 if why == "overdue" else 60)
    setting.passes.hold = asyncio.Event()
    async with setting.running():
        tokens = setting.engine.generate(request("r", range(30)))
        waits = asyncio.ensure_future(anext(tokens))
        await setting.until(lambda: setting.passes.ran)
        setting.passes.sending = asyncio.Event()  # the next chunk is chosen, and waits for those before it
        setting.passes.hold.set()
        await setting.idle()
        if why == "lost":
            setting.link.opened[0].failure = LostError("gone")
        elif why == "left":
            waits.cancel()
        else:
            await setting.until(waits.done)
        await setting.idle()
        setting.passes.sending.set()
        (outcome,) = await asyncio.gather(waits, return_exceptions=True)
        kinds = {"lost": DecodeUnavailableError, "left": asyncio.CancelledError, "overdue": DeadlineError}
        assert isinstance(outcome, kinds[why])
        await setting.idle()
        assert [chunk for run in setting.passes.ran for chunk in run] == [("r", 0, 10)]
        await tokens.aclose()


@pytest.mark.parametrize(
    ("fault", "kind"), [(LostError("gone"), DecodeUnavailableError), (KeyError("ours"), InternalError)]
)
async def test_a_hand_off_that_breaks_off_ends_the_request(
    fault: Exception, kind: type[ServingError]
) -> None:
    """That of one that decode lost, with its second."""
    setting = Setting()
    setting.link.answer = lambda prompt: HandOff(prompt, fails=fault)
    attempts = 2 if kind is DecodeUnavailableError else 1
    async with setting.running():
        tokens = setting.engine.generate(request("r"))
        assert [(await anext(tokens)).index for _ in range(attempts)] == list(range(attempts))
        with pytest.raises(kind):
            await anext(tokens)
    assert setting.link.cancelled == [("r", 1), ("r", 2)][:attempts], "decode may have it all the same"


async def test_a_lost_decode_that_is_not_back_in_time_ends_what_was_handed_over() -> None:
    setting = Setting(queue_timeout_s=0.01)
    async with setting.running():
        tokens = setting.engine.generate(request("r"))
        await anext(tokens)
        await setting.idle()
        setting.link.trouble = "reconnecting"
        setting.link.lose("gone")
        with pytest.raises(DecodeUnavailableError, match="gone"):
            await anext(tokens)
        with pytest.raises(DecodeUnavailableError, match="reconnecting"):
            await anext(setting.engine.generate(request("next")))


@pytest.mark.parametrize("when", ["queued", "prefilling", "decoding"])
async def test_a_client_that_leaves_frees_everything(when: str) -> None:
    setting = Setting()
    setting.passes.hold = asyncio.Event()
    if when == "queued":
        setting.link.answer = lambda prompt: NoRoom(60)
    async with setting.running():
        tokens = setting.engine.generate(request("r", range(30)))
        if when == "decoding":
            setting.passes.hold.set()
            await anext(tokens)
            await setting.idle()
        else:
            waits = asyncio.ensure_future(anext(tokens))
            await setting.until(lambda: setting.link.opened if when == "queued" else setting.passes.ran)
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)
            setting.passes.hold.set()
        await tokens.aclose()
        await setting.idle()
        rooms = [room for room in setting.link.opened if isinstance(room, HandOff)]
        assert [room.aborted for room in rooms] == {"prefilling": ["cancelled"], "decoding": [None]}.get(
            when, []
        )
    assert setting.link.cancelled == ([("r", 1)] if when == "decoding" else [])


async def test_a_choice_cancelled_before_decode_confirms_is_cancelled_there() -> None:
    setting = Setting()
    setting.passes.hold = asyncio.Event()
    async with setting.running():
        tokens = setting.engine.generate(request("r", choices=2))
        waits = asyncio.ensure_future(anext(tokens))
        await setting.until(lambda: setting.passes.ran)
        setting.engine.cancel_choice("r", 1)
        setting.passes.hold.set()
        await waits
        await setting.idle()
        assert setting.link.cancelled == [("r", 1, 1)]
        setting.engine.cancel_choice("r", 0)
        assert setting.link.cancelled == [("r", 1, 1), ("r", 1, 0)]
        await tokens.aclose()
