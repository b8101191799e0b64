"""Prompts that begin alike and wait together: one computes what they share, the others begin behind it."""

import random

import pytest

from prad.core.kv import BlockPool
from prefill_service.scheduler import PromptScheduler
from tests.prefill.fakes import prompt
from tests.prefill.test_prompt_scheduler import parts, run, scheduler

SHARED = list(range(40))  # ten blocks


def waiting(ends: list[list[int]], *, shared: list[int] = SHARED, **made: int) -> PromptScheduler:
    """Prompts a, b, c, ... that begin alike."""
    queue = scheduler(**({"kept": 200, "pass_prompts": 64} | made))
    for job, end in zip("abcdefgh", ends, strict=False):
        queue.add(prompt(job, [*shared, *end], digest="d"))
    return queue


def test_one_computes_what_all_of_a_pass_begin_with() -> None:
    queue = waiting([[100], [101, 102], [103], []])
    queue.add(prompt("other", 50, digest="d"))
    assert run(queue) == [("a", 0, 41), ("other", 0, 50)]
    assert run(queue) == [("b", 40, 42), ("c", 40, 41), ("d", 36, 40)]
    assert queue.next_wakeup() is None
    assert (queue.lookups.hits, queue.lookups.hit_tokens) == (3, 40 + 40 + 36)
    assert queue.blocks.in_use == 0


@pytest.mark.parametrize(("tokens", "passes"), [(31, 1), (32, 1), (33, 2)])
def test_who_would_save_too_little_does_not_wait(tokens: int, passes: int) -> None:
    queue = waiting([[], []], shared=list(range(tokens)))
    ran = 0
    while queue.next_wakeup() is not None:
        run(queue)
        ran += 1
    assert ran == passes


def test_of_other_adapters_and_salts_nobody_waits_for_anybody() -> None:
    queue = scheduler(kept=200, pass_tokens=400, pass_prompts=64)
    for job, digest, salt in (("a", "d", None), ("b", "e", None), ("c", None, None), ("d", "d", "mine")):
        queue.add(prompt(job, SHARED, digest=digest, salt=salt))
    queue.add(prompt("e", SHARED, digest="d", whole=True))
    assert sorted(run(queue)) == [(job, 0, 40) for job in "abcde"]


def test_who_waited_goes_on_without_the_one_that_it_waited_for() -> None:
    """Its client left, it found no room at decode."""
    queue = waiting([[100], [101], [102], [103], [104]])
    (chunk,) = queue.next_pass(0)
    assert parts([chunk]) == [("a", 0, 41)]
    queue.remove(chunk.prompt)
    queue.put_back(chunk)
    queue.computed()
    (chunk,) = queue.next_pass(0)
    assert parts([chunk]) == [("b", 0, 41)]
    queue.put_back(chunk)
    queue.computed()
    assert run(queue) == [("b", 0, 41)]
    assert run(queue) == [(job, 40, 41) for job in "cde"]
    assert run(queue) == []


@pytest.mark.parametrize("breaks_off", [False, True])
def test_all_who_waited_for_a_broken_one_go_on_together(breaks_off: bool) -> None:
    """As many passes with a broken adapter as prompts, else; whoever comes later waits for one again."""
    queue = waiting([[100], [101], [102], [103]], pass_tokens=400)
    queue.add(prompt("other", [*range(50, 90), 100], digest="d"))
    (first, _) = queue.next_pass(0)
    assert first.prompt.request.request_id == "a"
    if breaks_off:
        queue.failed()
    else:
        queue.computed({first.prompt})
    queue.add(prompt("late", [*SHARED, 105], digest="d"))
    assert run(queue) == [(job, 0, 41) for job in "bcd"]
    assert run(queue) == [("late", 40, 41)]
    assert queue.next_wakeup() is None
    assert queue.blocks.in_use == 0


def test_of_long_prompts_one_is_computed_in_chunks_and_the_others_follow() -> None:
    shared = list(range(192))
    queue = waiting([[500 + i] * 8 for i in range(4)], shared=shared, chunk_tokens=40)
    computed = [run(queue) for _ in range(6)]
    assert computed[:5] == [[("a", i, i + 40)] for i in range(0, 200, 40)]
    assert computed[5] == [("b", 192, 200), ("c", 192, 200), ("d", 192, 200)]


def test_a_short_prompt_does_not_wait_for_a_long_one_in_several_passes() -> None:
    queue = waiting([[500] * 160, [501]], chunk_tokens=50)
    assert run(queue) == [("a", 0, 50), ("b", 0, 41)]


def test_a_long_prompt_does_not_wait_for_one_that_takes_much_longer() -> None:
    queue = waiting([[500] * 360, [501] * 20], chunk_tokens=50)
    assert [job for job, _, _ in run(queue)] == ["a", "b"]


def test_nobody_waits_for_blocks_that_may_not_be_kept() -> None:
    queue = waiting([[100], [101]], kept=9)
    assert run(queue) == [("a", 0, 41), ("b", 0, 41)]
    off = waiting([[100], [101]], kept=0)
    assert run(off) == [("a", 0, 41), ("b", 0, 41)]


@pytest.mark.parametrize("seed", range(20))
def test_whoever_waits_all_get_through(seed: int) -> None:
    """Prompts that fork from each other anywhere; what is left over of a block is everybody's own."""
    draw = random.Random(seed)
    blocks = BlockPool(3000, 4, keep=2000)
    queue = PromptScheduler(blocks, pass_tokens=150, chunk_tokens=60, pass_prompts=8, max_waiting=99)
    texts = [[draw.randrange(9) for _ in range(draw.randrange(1, 200))] for _ in range(3)]
    for number in range(24):
        text = draw.choice(texts)
        texts.append(text[: draw.randrange(len(text) + 1)] + [100 + number] * draw.randrange(1, 60))
        queue.add(prompt(f"job{number}", texts[-1], digest=draw.choice("de")))
    done, passes = dict[str, int](), 0
    while queue.next_wakeup() is not None:
        for job, start, end in run(queue):
            assert done.setdefault(job, start) == start
            done[job] = end
        passes += 1
        assert passes < 200
    assert len(done) == 24
    assert blocks.in_use == 0
