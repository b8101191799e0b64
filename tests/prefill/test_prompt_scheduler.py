"""Which chunks of which prompts share a pass: plain data, no torch."""

from collections import Counter

import pytest

from prad.core.kv import BlockPool, Chunk
from prefill_service.prompt import Prompt
from prefill_service.scheduler import PromptScheduler
from tests.prefill.fakes import prompt

SIZE = 4


def scheduler(
    *tokens: int,
    pass_tokens: int = 100,
    chunk_tokens: int = 0,
    pass_prompts: int = 4,
    working: int = 1000,
    kept: int = 0,
) -> PromptScheduler:
    made = PromptScheduler(
        BlockPool(working + kept, SIZE, keep=kept),
        pass_tokens=pass_tokens,
        chunk_tokens=chunk_tokens or pass_tokens,
        pass_prompts=pass_prompts,
        max_waiting=6,
    )
    for i, n in enumerate(tokens):
        made.add(prompt(f"job{i}", n))
    return made


def name(chunk: Chunk[Prompt]) -> str:
    return chunk.prompt.request.request_id


def parts(chunks: list[Chunk[Prompt]]) -> list[tuple[str, int, int]]:
    return [(name(chunk), chunk.start, chunk.end) for chunk in chunks]


def run(queue: PromptScheduler, now: float = 0) -> list[tuple[str, int, int]]:
    """One pass, to its end."""
    chunks = queue.next_pass(now)
    queue.computed()
    return parts(chunks)


def test_prompts_that_fit_share_a_pass_in_order_of_arrival() -> None:
    queue = scheduler(40, 50, 10)
    assert run(queue) == [("job0", 0, 40), ("job1", 0, 50), ("job2", 0, 10)]
    assert queue.next_wakeup() is None
    assert run(queue) == []


def test_blocks_of_a_broken_job_are_not_found_again() -> None:
    queue = scheduler(kept=20)
    for breaks, cached in ((True, 0), (False, 0), (False, 4 * SIZE)):
        job = prompt("job", 4 * SIZE + 1)
        queue.add(job)
        (chunk,) = queue.next_pass(0)
        assert chunk.start == cached
        queue.computed({job} if breaks else ())


def test_short_prompts_go_in_beside_the_chunks_of_a_long_one() -> None:
    queue = scheduler(250, 10, pass_tokens=100)
    assert run(queue) == [("job0", 0, 90), ("job1", 0, 10)]
    queue.add(prompt("late", 70))
    assert run(queue) == [("job0", 90, 140), ("late", 0, 50)]
    assert run(queue) == [("job0", 140, 220), ("late", 50, 70)]
    assert run(queue) == [("job0", 220, 250)]


def test_a_stream_of_short_prompts_does_not_starve_a_long_one() -> None:
    queue = scheduler(1000, pass_tokens=100)
    passes = 0
    while queue.next_wakeup() is not None and passes < 100:
        for i in range(4):
            queue.add(prompt(f"short{passes}.{i}", 30))
        if any(job == "job0" and end == 1000 for job, _, end in run(queue)):
            break
        passes += 1
    assert passes == 19  # half of each pass is its own


def test_a_burst_of_short_prompts_is_one_pass_and_long_ones_share_a_chunk() -> None:
    queue = scheduler(300, 40, 40, 200, 10, pass_tokens=200, chunk_tokens=50, pass_prompts=9)
    whole = [("job1", 0, 40), ("job2", 0, 40)]
    assert run(queue) == [("job0", 0, 25), *whole, ("job3", 0, 25), ("job4", 0, 10)]
    assert run(queue) == [("job0", 25, 50), ("job3", 25, 50)]


def test_a_full_pass_need_not_wait_for_more() -> None:
    assert not scheduler(40, 50).fills_a_pass(0)
    assert scheduler(40, 60).fills_a_pass(0)
    assert not scheduler(40, 600, chunk_tokens=50).fills_a_pass(0)
    assert scheduler(1, 1, pass_prompts=2).fills_a_pass(0)
    under_way = scheduler(150)
    run(under_way)
    assert under_way.fills_a_pass(0)


def test_long_prompts_never_take_more_than_a_chunk_together() -> None:
    queue = scheduler(130, 130, 130, pass_tokens=400, chunk_tokens=50, pass_prompts=9)
    while queue.next_wakeup() is not None:
        assert sum(end - start for _, start, end in run(queue)) <= 50


def test_prompts_that_cannot_be_cut_share_a_pass_if_they_fit() -> None:
    queue = scheduler(60, 60, 60, pass_tokens=130, chunk_tokens=50, working=1)
    assert run(queue) == [("job0", 0, 60), ("job1", 0, 60)]
    assert run(queue) == [("job2", 0, 60)]


def test_of_two_long_prompts_the_first_is_finished_first() -> None:
    queue = scheduler(300, 300, pass_tokens=100)
    ends = {}
    for number in range(6):
        ends |= {job: number for job, _, end in run(queue) if end == 300}
    assert ends == {"job0": 2, "job1": 5}


@pytest.mark.parametrize("chunk_tokens", [1, 3, 10])
def test_every_token_is_computed_once_and_in_order(chunk_tokens: int) -> None:
    queue = scheduler(7, 64, 1, 33, pass_tokens=10, chunk_tokens=chunk_tokens, pass_prompts=2)
    seen: Counter[str] = Counter()
    while queue.next_wakeup() is not None:
        chunks = run(queue)
        assert len(chunks) <= 2
        assert sum(end - start for _, start, end in chunks) <= 10
        for job, start, end in chunks:
            assert start == seen[job]
            seen[job] = end
    assert seen == {"job0": 7, "job1": 64, "job2": 1, "job3": 33}
    assert queue.blocks.in_use == 0


def test_a_pass_of_one_token_gets_through() -> None:
    queue = scheduler(3, pass_tokens=1)
    assert [run(queue) for _ in range(3)] == [[("job0", i, i + 1)] for i in range(3)]


def test_a_prompt_too_long_for_all_blocks_has_a_pass_of_its_own() -> None:
    queue = scheduler(30, 401, 10, pass_tokens=20, working=100)
    assert run(queue) == [("job0", 0, 10), ("job2", 0, 10)]
    assert run(queue) == [("job0", 10, 30)]
    assert run(queue) == [("job1", 0, 401)]


def test_the_oldest_prompt_gets_the_blocks_that_it_waits_for() -> None:
    queue = scheduler(100, 180, 80, pass_tokens=20, working=50)  # blocks for 200 tokens
    started: list[str] = []
    for number in range(60):
        if number == 5:
            queue.add(prompt("late", 90))
        started += [job for job, start, _ in run(queue) if start == 0]
        assert queue.blocks.in_use <= 50
    assert started == ["job0", "job2", "job1", "late"]
    assert queue.next_wakeup() is None


@pytest.mark.parametrize(("tasks", "tokens"), [(2, 150), (9, 150), (4, 90)])
def test_who_waits_for_blocks_keeps_nobody_from_going_on(tasks: int, tokens: int) -> None:
    """Whatever turns the tasks have: no pass is empty while somebody holds blocks, and all get through."""
    queue = scheduler(pass_tokens=40, chunk_tokens=20, working=60)  # blocks for 240 tokens
    left = {f"job{i}" for i in range(tasks)}
    for i in range(tasks):
        queue.add(prompt(f"job{i}", tokens, task=f"task{i}"))
        queue.add(prompt(f"short{i}", 3, task=f"task{i}"))
        left -= {job for job, _, end in run(queue) if end == tokens}
    while queue.next_wakeup() is not None:
        ran = run(queue)
        assert ran
        left -= {job for job, _, end in ran if end == tokens}
    assert not left
    assert queue.blocks.in_use == 0


def test_no_equal_overtakes_a_prompt_that_waits_for_room_at_decode() -> None:
    queue = scheduler(10, 10)
    for chunk in queue.next_pass(0):
        queue.put_back(chunk, not_before=5.0 if name(chunk) == "job0" else 0.0)
    queue.computed()
    queue.add(prompt("late", 10))
    assert queue.next_pass(4.9) == []
    assert queue.next_wakeup() == 5.0
    assert run(queue, 5.0) == [("job0", 0, 10), ("job1", 0, 10), ("late", 0, 10)]


def test_a_prompt_under_way_goes_on_while_others_wait_for_room() -> None:
    queue = scheduler(150, 10, pass_tokens=80)
    _, second = queue.next_pass(0)
    queue.put_back(second, not_before=5.0)
    queue.computed()
    assert queue.next_wakeup() == 0.0
    assert run(queue) == [("job0", 70, 150)]
    assert queue.next_wakeup() == 5.0


def test_a_removed_prompt_is_never_scheduled_again_and_gives_its_blocks_back() -> None:
    queue = scheduler(pass_tokens=20)
    jobs = [prompt(f"job{i}", 50) for i in range(2)]
    for job in jobs:
        queue.add(job)
    queue.next_pass(0)
    queue.remove(jobs[0])
    assert queue.blocks.in_use > 0  # the pass under way still writes to them
    queue.computed()
    assert queue.blocks.in_use == 0
    assert {job for job, _, _ in run(queue)} == {"job1"}
    queue.remove(jobs[1])
    assert queue.blocks.in_use == 0
    assert queue.next_wakeup() is None


def test_the_prompts_of_a_failed_pass_leave() -> None:
    queue = scheduler(50, 7, pass_tokens=20, kept=100)
    queue.next_pass(0)
    queue.failed()
    assert queue.next_wakeup() is None
    assert (queue.blocks.in_use, queue.blocks.cached) == (0, 0)


def test_the_queue_is_bounded() -> None:
    queue = scheduler(1, 1, 1, 1, 1)
    last = prompt("last", 1)
    assert queue.full(arriving=1)
    assert not queue.full()
    queue.add(last)
    assert queue.full()
    queue.remove(last)
    assert not queue.full()
    assert run(queue)[0][0] == "job0"


def cached(queue: PromptScheduler, job: str, ids: list[int], digest: str | None = "d") -> list[int]:
    """Runs a prompt to its end; returns where its chunks began."""
    queue.add(prompt(job, ids, digest=digest))
    starts = []
    while queue.next_wakeup() is not None:
        starts += [start for _, start, _ in run(queue)]
    return starts


@pytest.mark.parametrize("pass_tokens", [1, 3, 4, 5, 8, 100])
def test_a_repeated_prompt_computes_what_no_block_holds(pass_tokens: int) -> None:
    queue = scheduler(pass_tokens=pass_tokens, kept=10)
    ids = list(range(18))
    assert cached(queue, "first", ids)[0] == 0
    assert cached(queue, "again", ids)[0] == 16
    assert cached(queue, "shorter", ids[:16])[0] == 12  # the last token is computed always
    assert cached(queue, "longer", ids + [7] * 9)[0] == 16
    assert cached(queue, "elsewhere", [99, *ids[1:]])[0] == 0
    assert cached(queue, "other end", [*ids[:14], 99, 98])[0] == 12
    assert cached(queue, "other adapter", ids, "e")[0] == 0
    assert cached(queue, "plain model", ids, None)[0] == 0
    lookups = queue.lookups
    assert (lookups.prompts, lookups.hits) == (8, 4)
    assert lookups.hit_tokens == 16 + 12 + 16 + 12


def test_the_same_prompt_twice_in_a_pass_is_computed_twice_and_kept_once() -> None:
    queue = scheduler(kept=10)
    for job in ("one", "two"):
        queue.add(prompt(job, range(8), digest="d"))
    assert run(queue) == [("one", 0, 8), ("two", 0, 8)]
    assert (queue.blocks.cached, queue.blocks.in_use) == (2, 0)


def test_without_room_for_its_blocks_a_prompt_is_computed_all_the_same() -> None:
    queue = scheduler(working=0, kept=2)
    assert cached(queue, "long", list(range(20))) == [0]
    assert queue.blocks.cached == 0
    assert cached(queue, "short", list(range(8))) == [0]
    assert cached(queue, "short again", list(range(8))) == [4]
