"""Which prompts share a pass: plain data, no torch."""

from prefill_service.scheduler import PromptScheduler, Waiting


def scheduler(*tokens: int, pass_tokens: int = 100, pass_prompts: int = 4) -> PromptScheduler[str]:
    made: PromptScheduler[str] = PromptScheduler(
        pass_tokens=pass_tokens, pass_prompts=pass_prompts, max_waiting=6
    )
    for i, n in enumerate(tokens):
        made.add(Waiting(f"job{i}", n))
    return made


def jobs(batch: list[Waiting[str]]) -> list[str]:
    return [waiting.job for waiting in batch]


def test_first_come_first_served_under_the_budget() -> None:
    queue = scheduler(40, 50, 20, 10)
    assert jobs(queue.next_batch(0)) == ["job0", "job1"]
    assert jobs(queue.next_batch(0)) == ["job2", "job3"]
    assert queue.next_batch(0) == []


def test_a_prompt_beyond_the_budget_gets_a_pass_of_its_own() -> None:
    queue = scheduler(400, 10)
    assert jobs(queue.next_batch(0)) == ["job0"]
    assert jobs(queue.next_batch(0)) == ["job1"]


def test_a_pass_holds_a_bounded_number_of_prompts() -> None:
    queue = scheduler(1, 1, 1, 1, 1)
    assert len(queue.next_batch(0)) == 4
    assert len(queue) == 1


def test_nothing_overtakes_a_head_that_waits_for_room() -> None:
    queue = scheduler(10, 10)
    (head, _) = queue.next_batch(0)
    queue.add(Waiting("late", 1))
    queue.put_back(Waiting(head.job, head.tokens, not_before=5.0))
    assert queue.next_batch(4.9) == []
    assert queue.next_due() == 5.0
    assert jobs(queue.next_batch(5.0)) == ["job0", "late"]


def test_a_removed_job_is_never_scheduled_and_the_queue_is_bounded() -> None:
    queue = scheduler(1, 1, 1, 1, 1, 1)
    assert queue.full
    queue.remove("job0")
    assert not queue.full
    assert jobs(queue.next_batch(0))[0] == "job1"
