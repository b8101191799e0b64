"""A flood delays no quiet task, though it came first: neither at decode, nor in the queue."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from prad.core.kv import BlockPool
from prefill_service.errors import OverloadedError
from prefill_service.prompt import DecodeSize, Finished, Prompt, Queued
from prefill_service.scheduler import PromptScheduler
from tests.prefill.fakes import Setting, request, version
from tests.prefill.test_fair_turns import Simulated, names, prompt, refuse, scheduler


class Decode:
    """Passes of a queue's prompts, which take room of `size` for good; who finds none is refused."""

    def __init__(self, size: DecodeSize) -> None:
        self.queue = PromptScheduler(
            BlockPool(1000, 4), pass_tokens=10**5, chunk_tokens=10**5, pass_prompts=64, max_waiting=10**5
        )
        self.queue.decode_has(size)
        self.size, self.blocks, self.sequences = size, size.blocks, size.sequences

    def add(self, task: str, count: int = 1, *, max_tokens: int = 23, key: str | None = None) -> None:
        for _ in range(count):
            self.queue.add(prompt(task, max_tokens=max_tokens, key=key))

    def taken(self, now: float = 0.0) -> list[str]:
        """Whose prompts run, as long as any do."""
        ran = list[str]()
        while chunks := self.queue.next_pass(now):
            for chunk in chunks:
                blocks, sequences = self.size.wanted(chunk.prompt)
                if blocks <= self.blocks and sequences <= self.sequences:
                    self.blocks, self.sequences = self.blocks - blocks, self.sequences - sequences
                    ran.append(chunk.prompt.request.flow[0] or "")
                else:
                    self.queue.put_back(chunk, now + 0.2)
            self.queue.computed()
        return ran


@pytest.mark.parametrize(("sequences", "flood_holds"), [(256, 241), (17, 16), (16, 15), (15, 15), (1, 1)])
def test_a_flood_leaves_a_sixteenth_of_the_sequences_that_it_holds(sequences: int, flood_holds: int) -> None:
    decode = Decode(DecodeSize(10**6, 16, sequences))
    decode.add("flood", 400)
    assert len(decode.taken()) == flood_holds
    decode.add("quiet")
    assert decode.taken() == ["quiet"] * (sequences > flood_holds)


def test_a_key_leaves_some_to_the_other_keys_of_its_task() -> None:
    decode = Decode(DecodeSize(10**6, 16, 17))
    decode.add("task", 400, key="flood")
    assert len(decode.taken()) == 16
    decode.add("task", key="quiet")
    assert decode.taken() == ["task"]
    assert decode.sequences == 0


def test_a_flood_leaves_a_sixteenth_of_the_blocks_that_it_holds() -> None:
    decode = Decode(DecodeSize(1000, 16, 10**6))
    decode.add("flood", 600)  # of 32 tokens each: 2 blocks
    assert (len(decode.taken()), decode.blocks) == (471, 58)
    decode.add("quiet", max_tokens=500)
    assert decode.taken() == ["quiet"]


def test_choices_share_the_blocks_that_their_prompt_fills() -> None:
    size = DecodeSize(1000, 16, 100)
    assert size.wanted(prompt("a", 40, max_tokens=10, choices=3)) == (2 + 3 * 2, 3)
    assert size.wanted(prompt("a", 32, max_tokens=1)) == (2, 1)


def test_a_second_flood_takes_what_the_first_left_and_leaves_some_of_its_own() -> None:
    decode = Decode(DecodeSize(10**6, 16, 256))
    decode.add("first", 400)
    assert len(decode.taken()) == 241
    decode.add("second", 400)
    assert decode.taken() == ["second"] * 15


def test_two_floods_share_what_there_is_though_one_came_first() -> None:
    decode = Decode(DecodeSize(10**6, 16, 256))
    decode.add("first", 400)
    decode.add("second", 400)
    ran = decode.taken()
    assert abs(ran.count("first") - ran.count("second")) <= 1
    assert decode.sequences == 7, "a sixteenth of what one of them holds"


def test_what_a_task_that_leaves_some_waits_for_is_the_end_of_others() -> None:
    queue = Decode(DecodeSize(10**6, 16, 256)).queue
    ran = [prompt("flood") for _ in range(300)]
    for each in ran:
        queue.add(each)
    while names(queue, now=7.0):
        pass
    assert queue.next_wakeup() == 8.0, "somebody's time may be over then"
    queue.remove(ran[0])
    assert queue.next_wakeup() == 0.0
    assert len(names(queue, now=7.1)) == 1


def test_a_large_one_that_has_to_leave_room_is_not_passed_by_its_own_tasks_smaller_ones() -> None:
    decode = Decode(DecodeSize(100, 16, 1000))
    decode.add("flood", 45)  # 90 blocks
    assert len(decode.taken()) == 45
    decode.add("flood", max_tokens=80)
    decode.add("flood", max_tokens=3)
    decode.add("other", max_tokens=80)
    assert decode.taken() == ["other"], "which holds nothing yet"


def test_what_does_not_fit_at_all_is_decodes_to_refuse() -> None:
    decode = Decode(DecodeSize(100, 16, 1000))
    decode.add("flood", 45)
    assert len(decode.taken()) == 45
    decode.add("flood", max_tokens=500)
    decode.add("flood", max_tokens=3)
    assert decode.taken() == ["flood"]
    assert len(decode.queue) == 1


def test_who_has_waited_too_long_leaves_nothing() -> None:
    """Else others would wait for it, and it for them."""
    queue = Decode(DecodeSize(100, 16, 1000)).queue
    others = [prompt("b", max_tokens=16 * 18, name="other") for _ in range(2)]
    for each in (prompt("a", name="held"), *others):
        queue.add(each)
    assert names(queue) == ["held", "other", "other"]
    queue.add(prompt("a", max_tokens=16 * 75, name="large"))
    for now in range(12):
        assert refuse(queue, now + 1.0, "large", now=now) == []
    queue.remove(others[0])  # now it fits, but leaves only 3 blocks of 100
    assert names(queue, now=12.0) == ["large"]


def test_a_flood_that_fills_decode_first_does_not_double_what_a_quiet_task_waits() -> None:
    """Simulated: the flood comes at once and decodes for 20 s and more, the quiet task comes later."""
    arrivals: list[tuple[float, Callable[[float], Prompt]]] = [
        (0.0, lambda at: prompt("flood", 64, at=at)) for _ in range(1000)
    ]
    arrivals += [(5.0 + i, lambda at: prompt("quiet", 64, at=at)) for i in range(12)]
    queue = scheduler(pass_tokens=4096, chunk_tokens=512, pass_prompts=64)
    queue.decode_has(DecodeSize(10**6, 16, sequences=256))
    simulated = Simulated(queue, places=256, life_s=40.0)
    simulated.run(arrivals, until=19)
    waits = simulated.waited["quiet", None]
    beside_full_passes = 2 * (0.01 + 0.0001 * 4096)  # the rest of the one under way, and its own
    assert len(waits) == 12
    assert max(waits) <= 2 * beside_full_passes
    assert len(simulated.waited["flood", None]) == 241


# ---- the queue's bound -------------------------------------------------------------------------------------


def waiting(setting: Setting, task: str, count: int) -> "list[asyncio.Task[Any]]":
    return [
        asyncio.create_task(
            anext(setting.engine.generate(request(f"{task}{i}", version=version(task, task))))
        )
        for i in range(count)
    ]


async def given_up(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_full_queue_takes_a_quiet_tasks_prompt_for_the_floods_last() -> None:
    setting = Setting(max_waiting=5)
    flood = waiting(setting, "flood", 5)
    await setting.until(lambda: setting.engine.waiting == 5)
    quiet = waiting(setting, "quiet", 3)
    await setting.until(lambda: any(task.done() for task in quiet))
    refused = [task.exception() for task in (*flood[3:], quiet[2])]
    assert all(isinstance(e, OverloadedError) and (e.retry_after or 0) >= 1 for e in refused)
    assert not any(task.done() for task in (*flood[:3], *quiet[:2]))
    assert setting.engine.waiting == 5
    with pytest.raises(OverloadedError, match="5 prompts are waiting already"):
        await anext(setting.engine.generate(request("flood", version=version("flood", "flood"))))
    await given_up(*flood, *quiet)


async def test_of_an_answer_that_has_begun_no_prompt_leaves_a_full_queue() -> None:
    setting = Setting(max_waiting=5)
    flood = version("d", "flood")

    def add(answer: str, *indices: int, prompts: int) -> list[Prompt]:
        asked = [request(f"{answer}-{i}", version=flood, answer=answer, prompts=prompts) for i in indices]
        added = [Prompt(each) for each in asked]
        for each in added:
            setting.scheduler.add(each)
        return added

    add("alone", 0, prompts=1)
    whole, begun = (
        add("whole", 0, 1, prompts=2),
        add("begun", 1, 2, prompts=3),
    )  # begun-0 has its first tokens
    quiet = waiting(setting, "quiet", 1)
    await setting.until(lambda: any(isinstance(prompt.state, Finished) for prompt in (*whole, *begun)))
    assert [type(prompt.state) for prompt in (*whole, *begun)] == [Queued, Finished, Queued, Queued]
    await given_up(*quiet)


async def test_a_task_that_only_loads_does_not_keep_another_flood_in_a_full_queue() -> None:
    setting = Setting(max_waiting=9)
    flood = waiting(setting, "flood", 4)
    await setting.until(lambda: len(setting.scheduler) == 4)
    setting.residents.loaded = asyncio.Event()
    loading = waiting(setting, "loading", 5)
    await setting.until(lambda: setting.engine.waiting == 9)
    quiet = waiting(setting, "quiet", 1)
    await setting.until(lambda: any(task.done() for task in (*flood, *quiet)))
    assert [task.done() for task in (*flood, *quiet)] == [False, False, False, True, False]
    await given_up(*flood, *loading, *quiet)


async def test_who_cannot_be_reached_in_time_takes_nobodys_place_in_a_full_queue() -> None:
    now = [100.0]
    setting = Setting(max_waiting=90, queue_timeout_s=10.0, clock=lambda: now[0])
    for i in range(100):
        task = version("d", "flood" if i < 60 else "other")
        setting.scheduler.add(Prompt(request(f"r{i}", version=task), enqueued=100.0))
    for _ in range(10):
        for chunk in setting.scheduler.next_pass(now[0])[1:]:
            setting.scheduler.put_back(chunk)
        setting.scheduler.computed()
        now[0] += 1
    with pytest.raises(OverloadedError, match="may wait for 10 s"):
        await anext(setting.engine.generate(request("late", version=version("d", "other"))))
    assert setting.engine.waiting == 90


async def test_an_answer_under_way_does_not_leave_a_full_queue() -> None:
    setting = Setting(max_waiting=2)
    for i in range(2):
        setting.scheduler.add(Prompt(request(f"replay{i}", continuation_ids=(5,), output_offset=1)))
    with pytest.raises(OverloadedError, match="waiting already"):
        await anext(setting.engine.generate(request("quiet", version=version("d", "quiet"))))


async def test_who_has_to_leave_room_at_decode_waits_no_longer_than_it_may() -> None:
    setting = Setting(queue_timeout_s=0.05)
    async with setting.running():
        await setting.idle()
        setting.link.found(DecodeSize(20, 16, 100))
        first = setting.engine.generate(request("first", max_tokens=14 * 16))
        await anext(first)
        second = asyncio.create_task(anext(setting.engine.generate(request("second", max_tokens=4 * 16))))
        with pytest.raises(OverloadedError, match="no room"):
            await second
        assert len(setting.link.opened) == 1, "decode was not asked for the second"
        await first.aclose()


@pytest.mark.parametrize("how", ["ended", "cancelled"])
async def test_room_that_decode_freed_is_free_though_the_client_has_not_read_its_answer(how: str) -> None:
    setting = Setting(max_waiting=99)
    async with setting.running():
        await setting.idle()
        setting.link.found(DecodeSize(10**6, 16, 32))
        held = [setting.engine.generate(request(f"r{i}")) for i in range(31)]
        await asyncio.gather(*(anext(each) for each in held))
        last = setting.engine.generate(request("late"))
        late = asyncio.create_task(anext(last))
        await setting.until(lambda: setting.scheduler.held_back)
        if how == "ended":
            setting.tell(1, "stop", name="r0")
        else:
            setting.engine.cancel_choice("r0", 0)
        async with asyncio.timeout(0.9):  # sooner than it is looked after
            await late
        for each in (*held, last):
            await each.aclose()


async def test_who_has_to_leave_room_at_decode_goes_on_when_others_end() -> None:
    setting = Setting(max_waiting=99)
    async with setting.running():
        await setting.idle()
        setting.link.found(DecodeSize(10**6, 16, 32))
        held = [setting.engine.generate(request(f"r{i}")) for i in range(31)]
        await asyncio.gather(*(anext(each) for each in held))
        last = setting.engine.generate(request("late"))
        late = asyncio.create_task(anext(last))
        await setting.until(lambda: setting.scheduler.held_back)
        assert not late.done()
        await held[0].aclose()
        async with asyncio.timeout(0.9):  # sooner than it is looked after
            await late
        for each in (*held[1:], last):
            await each.aclose()
