"""Prompts of batches wait behind all others: for a turn, for room at decode, and in a full queue."""

import asyncio
from collections.abc import Sequence

import pytest

from prad.core.kv import BlockPool
from prefill_service.errors import OverloadedError
from prefill_service.prompt import BEHIND, DecodeSize, Prompt
from prefill_service.scheduler import PromptScheduler
from tests.prefill.fakes import Setting, request, version


def prompt(
    name: str, tokens: int = 10, *, behind: bool = False, at: float = 0, max_tokens: int = 21
) -> Prompt:
    more = {"version": version("d", name[0]), "max_tokens": max_tokens, "behind": behind}
    return Prompt(request(name, range(tokens), **more), enqueued=at)


def scheduler(**more: int) -> PromptScheduler:
    sizes = {"pass_tokens": 100, "chunk_tokens": 100, "pass_prompts": 2, "max_waiting": 10_000, **more}
    return PromptScheduler(BlockPool(1000, 4), patience_s=10, **sizes)


def passes(queue: PromptScheduler, count: int, now: float = 0) -> list[list[str]]:
    ran = []
    for _ in range(count):
        ran.append([chunk.prompt.request.request_id for chunk in queue.next_pass(now)])
        queue.computed()
    return ran


def refuse(queue: PromptScheduler, until: float, refused: Sequence[str], now: float = 0) -> list[str]:
    """A pass for which decode refuses some; who runs."""
    ran = []
    for chunk in queue.next_pass(now):
        if chunk.prompt.request.request_id in refused:
            queue.put_back(chunk, until)
        else:
            ran.append(chunk.prompt.request.request_id)
    queue.computed()
    return ran


def test_they_are_one_flow_of_no_task() -> None:
    assert prompt("b1", behind=True).request.flow == prompt("c1", behind=True).request.flow == BEHIND
    assert prompt("a1").request.flow == ("a", None)


def test_all_others_have_their_turns_first_and_then_they_fill_the_pass() -> None:
    queue = scheduler()
    for name in ("b1", "b2", "b3"):
        queue.add(prompt(name, behind=True))
    for name in ("a1", "a2", "c1"):
        queue.add(prompt(name))
    assert passes(queue, 3) == [["a1", "c1"], ["a2", "b1"], ["b2", "b3"]]


def test_who_comes_later_goes_first_all_the_same_and_saves_no_turns_by_it() -> None:
    queue = scheduler()
    for number in range(4):
        queue.add(prompt(f"b{number}", behind=True))
    assert passes(queue, 1) == [["b0", "b1"]]
    queue.add(prompt("a1"))
    assert passes(queue, 1) == [["a1", "b2"]]
    for name in ("a2", "a3", "c1", "c2"):
        queue.add(prompt(name))
    *first, last = passes(queue, 3)
    assert ([{name[0] for name in ran} for ran in first], last) == ([{"a", "c"}, {"a", "c"}], ["b3"])


def test_a_long_one_gets_what_the_others_leave() -> None:
    queue = scheduler(chunk_tokens=20)
    queue.add(prompt("b1", 90, behind=True))
    queue.add(prompt("a1", 10))
    chunks = queue.next_pass(0)
    assert [(chunk.prompt.request.request_id, len(chunk)) for chunk in chunks] == [("a1", 10), ("b1", 20)]
    queue.computed()


def test_room_at_decode_is_for_others_first_however_long_it_waits() -> None:
    queue = scheduler()
    queue.decode_has(DecodeSize(1000, 4, 100))
    queue.add(prompt("a0"))
    assert passes(queue, 1) == [["a0"]]
    queue.add(prompt("b1", 40, behind=True))
    assert refuse(queue, 1.0, ["b1"]) == []
    assert refuse(queue, 20.0, ["b1"], now=15.0) == []  # longer than others' patience
    queue.add(prompt("a1", at=16.0))
    assert "a1" in [chunk.prompt.request.request_id for chunk in queue.next_pass(16.0)]


def test_others_are_told_no_longer_wait_because_of_them() -> None:
    queue = scheduler()
    for number in range(12):
        queue.add(prompt(f"b{number}", 90, behind=True))
    for second in range(8):  # so that something is known of the queue's rate
        passes(queue, 1, float(second))
    live, waiting = request("a9", range(10)), request("b99", range(10), behind=True)
    told, told_behind = queue.expected_wait(live), queue.expected_wait(waiting)
    assert told is None  # nobody is before it
    assert told_behind is not None


async def test_in_a_full_queue_they_take_nobodys_place() -> None:
    setting = Setting(max_waiting=2)
    async with setting.running():
        setting.passes.hold = asyncio.Event()
        asked = [asyncio.create_task(setting.only_token(request("first", max_tokens=1)))]
        await setting.until(lambda: setting.passes.ran)
        for name in ("second", "third"):
            asked.append(asyncio.create_task(setting.only_token(request(name, max_tokens=1))))
        await setting.idle()
        with pytest.raises(OverloadedError, match="waiting already"):
            await anext(setting.engine.generate(request("batch", behind=True)))
        setting.passes.hold.set()
        await asyncio.gather(*asked)


async def test_who_comes_to_a_full_queue_gets_the_place_of_one() -> None:
    """Also of an answer of which a prompt is under way: a batch asks again."""
    setting = Setting(max_waiting=2)
    async with setting.running():
        setting.passes.hold = asyncio.Event()
        parts = [
            request(f"b{n}", max_tokens=1, behind=True, answer="line", prompts=3, prompt_index=n)
            for n in range(3)
        ]
        batch = [asyncio.create_task(setting.only_token(parts[0]))]
        await setting.until(lambda: setting.passes.ran)
        batch += [asyncio.create_task(setting.only_token(part)) for part in parts[1:]]
        await setting.idle()
        live = asyncio.create_task(setting.only_token(request("live", max_tokens=1)))
        await setting.idle()
        setting.passes.hold.set()
        await live
        ended = await asyncio.gather(*batch, return_exceptions=True)
    assert [isinstance(each, OverloadedError) for each in ended] == [False, True, True]


def test_what_is_left_free_for_others_is_not_for_them() -> None:
    """A flow that has to leave some of decode's room does not leave it to what waits behind all."""
    queue = scheduler(pass_prompts=8)
    queue.decode_has(DecodeSize(17 * 8, 4, 100))
    for number in range(16):
        queue.add(prompt(f"a{number}"))
    assert sum(map(len, passes(queue, 2))) == 16
    queue.add(prompt("a16"))
    queue.add(prompt("b1", behind=True))
    assert passes(queue, 1) == [[]], "a16 is left out so that a new flow has room"
    queue.add(prompt("c1"))
    assert "c1" in passes(queue, 1)[0]
