"""Prompts that must run whole are never cut, wait for their turn and leave nothing behind: plain data."""

from prad.core.kv import BlockPool
from prefill_service.scheduler import PromptScheduler
from tests.prefill.fakes import prompt


def scheduler(*, pass_tokens: int = 100, chunk_tokens: int = 50) -> PromptScheduler:
    return PromptScheduler(
        BlockPool(200, 4, keep=100),
        pass_tokens=pass_tokens,
        chunk_tokens=chunk_tokens,
        pass_prompts=4,
        max_waiting=9,
    )


def run(queue: PromptScheduler) -> list[tuple[str, int, int, int]]:
    chunks = queue.next_pass(0)
    queue.computed()
    return [(chunk.prompt.request.request_id, chunk.start, chunk.end, chunk.stored) for chunk in chunks]


def test_one_that_is_longer_than_a_chunk_goes_in_whole_beside_chunks_of_others() -> None:
    queue = scheduler()
    queue.add(prompt("whole", 60, whole=True))
    queue.add(prompt("long", 60))
    assert run(queue) == [("whole", 0, 60, 0), ("long", 0, 40, 40)]
    assert run(queue) == [("long", 40, 60, 20)]
    assert queue.blocks.in_use == 0
    assert queue.lookups.prompts == 1, "nobody looked for what the whole one begins with"


def test_one_that_does_not_fit_beside_others_waits_until_it_is_the_oldest() -> None:
    queue = scheduler()
    queue.add(prompt("long", 180))
    queue.add(prompt("whole", 90, whole=True))
    queue.add(prompt("short", 20))
    assert run(queue) == [("long", 0, 50, 50), ("short", 0, 20, 20)]
    passes = [run(queue) for _ in range(4)]
    assert passes[-1] == [("whole", 0, 90, 0)]
    assert all(job == "long" for each in passes[:-1] for job, *_ in each)


def test_one_that_is_longer_than_a_pass_gets_one_of_its_own() -> None:
    queue = scheduler()
    queue.add(prompt("short", 10))
    queue.add(prompt("whole", 250, whole=True))
    queue.add(prompt("later", 10))
    assert run(queue) == [("short", 0, 10, 8), ("later", 0, 10, 8)]
    assert run(queue) == [("whole", 0, 250, 0)]
    assert queue.next_wakeup() is None


def test_one_that_decode_refused_is_still_whole_when_it_comes_again() -> None:
    queue = scheduler()
    queue.add(prompt("whole", 250, whole=True))
    (chunk,) = queue.next_pass(0)
    queue.put_back(chunk, not_before=3.0)
    queue.computed()
    assert queue.next_wakeup() == 3.0
    assert [(c.start, c.end) for c in queue.next_pass(3.0)] == [(0, 250)]
