"""Tasks, and a task's keys, take turns, and nobody keeps others from room at decode: a simulated clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import pytest

from prad.core.kv import BlockPool
from prefill_service.prompt import Flow, Prompt
from prefill_service.scheduler import PromptScheduler
from tests.prefill.fakes import request, version


def scheduler(
    *, pass_tokens: int = 100, chunk_tokens: int = 100, pass_prompts: int = 9, patience_s: float = 10
) -> PromptScheduler:
    return PromptScheduler(
        BlockPool(1000, 4),
        pass_tokens=pass_tokens,
        chunk_tokens=chunk_tokens,
        pass_prompts=pass_prompts,
        max_waiting=10_000,
        patience_s=patience_s,
    )


def prompt(
    task: str,
    tokens: int = 10,
    *,
    at: float = 0,
    max_tokens: int = 21,
    choices: int = 1,
    name: str = "",
    key: str | None = None,
) -> Prompt:
    its = version("d", task)
    named = name or task
    asked = request(named, range(tokens), version=its, max_tokens=max_tokens, choices=choices, key=key)
    return Prompt(asked, enqueued=at)


def names(queue: PromptScheduler, now: float = 0) -> list[str]:
    """Who runs the next pass, which decode has room for."""
    chunks = queue.next_pass(now)
    queue.computed()
    return [chunk.prompt.request.request_id for chunk in chunks]


def refuse(queue: PromptScheduler, until: float, *refused: str, now: float = 0) -> list[str]:
    """A pass for which decode refuses some; who runs."""
    ran = []
    for chunk in queue.next_pass(now):
        if chunk.prompt.request.request_id in refused:
            queue.put_back(chunk, until)
        else:
            ran.append(chunk.prompt.request.request_id)
    queue.computed()
    return ran


def test_a_task_that_comes_late_has_the_next_turn() -> None:
    queue = scheduler(pass_tokens=20)
    for i in range(6):
        queue.add(prompt("flood", name=f"flood{i}"))
    assert names(queue) == ["flood0", "flood1"]
    queue.add(prompt("quiet"))
    assert names(queue) == ["flood2", "quiet"]  # lifted to flood's counter: who waits longer goes first
    queue.add(prompt("quiet"))
    assert names(queue) == ["flood3", "quiet"]
    assert names(queue) == ["flood4", "flood5"], "in order of arrival"


def test_what_decode_draws_counts_too() -> None:
    queue = scheduler(pass_tokens=10)
    first, second = prompt("a", name="a0"), prompt("b", name="b0")
    for each in (first, second, prompt("a", name="a1"), prompt("b", name="b1")):
        queue.add(each)
    assert names(queue) + names(queue) == ["a0", "b0"]
    queue.drew(first, 1)
    assert names(queue) == ["b1"]


def test_nobody_saves_up_turns() -> None:
    queue = scheduler(pass_tokens=10)
    for i in range(20):
        queue.add(prompt("busy", name=f"busy{i}"))
    for _ in range(10):
        names(queue)
    for i in range(9):
        queue.add(prompt("idle", name=f"idle{i}"))
    turns = [each[:4] for _ in range(8) for each in names(queue)]
    assert turns.count("idle") == turns.count("busy") == 4


def test_turns_are_by_tokens_not_by_prompts() -> None:
    queue = scheduler(pass_tokens=40, chunk_tokens=40)
    for i in range(40):
        queue.add(prompt("short", 5, name="short"))
        if i < 5:
            queue.add(prompt("long", 40, name="long"))
    ran = [each for _ in range(6) for each in names(queue)]
    assert abs(ran.count("short") * 5 - ran.count("long") * 40) <= 40


def test_a_long_prompt_goes_on_among_other_tasks_short_ones() -> None:
    queue = scheduler(pass_tokens=100, chunk_tokens=100)
    queue.add(prompt("long", 1000, name="long"))
    passes = 0
    while passes < 200:
        passes += 1
        for i in range(12):
            queue.add(prompt(f"short{i}", 10, name="short"))
        chunks = queue.next_pass(0)
        queue.computed()
        if any(chunk.end == 1000 for chunk in chunks):
            break
    assert 100 < passes < 200, "one of 13 tasks, and more comes than can be computed"


def test_who_put_back_gets_its_turn_again() -> None:
    queue = scheduler(pass_tokens=10)
    for task in ("a", "b"):
        queue.add(prompt(task))
    assert refuse(queue, 0.0, "a") == []
    assert names(queue) == ["a"]


def test_smaller_ones_pass_who_has_no_room_and_equal_ones_do_not() -> None:
    queue = scheduler()
    queue.add(prompt("a", max_tokens=1000, name="large"))
    assert refuse(queue, 5.0, "large") == []
    assert queue.next_wakeup() == 5.0
    for task, max_tokens in (("a", 1000), ("b", 999), ("c", 1000), ("d", 2000), ("e", 1)):
        queue.add(prompt(task, max_tokens=max_tokens, name=f"{task}{max_tokens}"))
    assert queue.next_wakeup() == 0.0
    assert sorted(names(queue, 4.9)) == ["b999", "e1"]
    assert queue.next_wakeup() == 5.0
    assert sorted(names(queue, 5.0)) == ["a1000", "c1000", "d2000", "large"]


def test_more_choices_than_there_are_sequences_hold_up_nobody_with_fewer() -> None:
    queue = scheduler()
    queue.add(prompt("a", max_tokens=2, choices=9, name="many"))
    assert refuse(queue, 5.0, "many") == []
    queue.add(prompt("b", max_tokens=500))
    assert names(queue) == ["b"]


def test_behind_who_has_waited_too_long_nobody_passes_who_needs_room() -> None:
    queue = scheduler(patience_s=3)
    queue.add(prompt("a", max_tokens=1000, name="large"))
    for now in range(4):
        queue.add(prompt("b", name="small"))
        assert refuse(queue, now + 1.0, "large", now=now) == ["small"]
    queue.add(prompt("b", name="small"))
    queue.add(prompt("b", max_tokens=1, name="one token"))
    assert names(queue, 3.5) == ["one token"]
    assert queue.next_wakeup() == 4.0
    assert names(queue, 4.0) == ["large"]
    assert names(queue, 4.0) == ["small"]


def test_for_a_task_that_has_more_than_its_share_nobody_waits() -> None:
    queue = scheduler(patience_s=3)
    held = [prompt("a", max_tokens=1000, name=f"held{i}") for i in range(3)]
    for each in (*held, prompt("a", max_tokens=1000, name="fourth")):
        queue.add(each)
    for now in range(20):
        if now:
            queue.add(prompt("b", name="small"))
        ran = refuse(queue, now + 1.0, "fourth", now=now)
        assert ran == (["small"] if now else ["held0", "held1", "held2"])
    for each in held:
        queue.remove(each)
    queue.add(prompt("b", name="small"))
    assert names(queue, 19.5) == [], "it holds nothing now, and has waited long enough"
    assert names(queue, 20.0) == ["fourth"]


def test_a_flood_that_has_waited_too_long_holds_up_no_task_that_comes() -> None:
    queue = scheduler(patience_s=3)
    held, first, second = (prompt("flood", max_tokens=500, name=f"flood{i}") for i in range(3))
    queue.add(held)
    assert names(queue) == ["flood0"]
    queue.add(first)
    queue.add(second)
    for now in range(6):
        assert refuse(queue, now + 1.0, "flood1", "flood2", now=now) == []
    queue.add(prompt("quiet", max_tokens=9))
    assert names(queue, 5.5) == ["quiet"]


def test_a_task_with_more_than_its_share_gets_none_while_others_wait() -> None:
    queue = scheduler()
    for i in range(4):
        queue.add(prompt("flood", max_tokens=100, name=f"flood{i}"))
    assert len(names(queue)) == 4
    queue.add(prompt("quiet", max_tokens=100))
    assert refuse(queue, 0.2, "quiet") == []
    queue.add(prompt("flood"))
    queue.add(prompt("other"))
    assert names(queue, 0.1) == ["other"]
    assert names(queue, 0.2) == ["quiet"]
    assert names(queue, 0.2) == ["flood"]


def test_the_wait_is_expected_by_what_left_the_queue_lately() -> None:
    queue = scheduler(pass_tokens=10)  # a prompt a pass
    for i in range(40):
        queue.add(prompt("flood", at=0.0, name=f"flood{i}"))
    assert queue.expected_wait(prompt("flood").request) is None
    for second in range(11):
        names(queue, float(second))
    flood, quiet = (queue.expected_wait(prompt(task).request) for task in ("flood", "quiet"))
    assert flood == pytest.approx(29, rel=0.2)
    assert quiet == pytest.approx(1, rel=0.2)
    assert queue.expected_place() == pytest.approx(1, rel=0.2)


# ---- simulated: prompts arrive, passes take their time, decode has few places ------------------------------


@dataclass
class Simulated:
    """A pass takes 10 ms and 0.1 ms a token; decode holds `places` sequences for `life_s` each."""

    queue: PromptScheduler
    places: int
    life_s: float
    now: float = 0.0
    ends: list[tuple[float, Prompt]] = field(default_factory=list)
    waited: dict[Flow, list[float]] = field(default_factory=dict)
    random: Random = field(default_factory=lambda: Random(2))

    def run(self, arrivals: Sequence[tuple[float, Callable[[float], Prompt]]], until: float) -> None:
        coming = sorted(arrivals, key=lambda each: each[0])
        while self.now < until:
            while coming and coming[0][0] <= self.now:
                at, make = coming.pop(0)
                self.queue.add(make(at))
            for _, over in [each for each in self.ends if each[0] <= self.now]:
                self.queue.drew(over, 20)
                self.queue.remove(over)
            self.ends = [each for each in self.ends if each[0] > self.now]
            self._pass()

    def _pass(self) -> None:
        ran, free, began = 0, self.places - len(self.ends), list[Prompt]()
        for chunk in self.queue.next_pass(self.now):
            if chunk.prompt in began or free > 0:
                free, ran = free - 1, ran + len(chunk)
                began.append(chunk.prompt)
            else:
                self.queue.put_back(chunk, self.now + 0.2)
        self.queue.computed()
        self.now += 0.01 + 0.0001 * ran
        for prompt in began:
            self.waited.setdefault(prompt.request.flow, []).append(self.now - prompt.enqueued)
            self.ends.append((self.now + self.life_s * self.random.uniform(0.5, 1.5), prompt))


TASKS: tuple[Flow, Flow] = ("flood", None), ("quiet", None)
KEYS: tuple[Flow, Flow] = ("task", "flood"), ("task", "quiet")
"""Of one task: one application's key beside another's."""


def quiet_p99(flows: tuple[Flow, Flow], *, busy: int, places: int) -> float:
    """What a quiet flow waits for its first token beside another, of which `busy` prompts a second come."""

    def of(flow: Flow) -> Callable[[float], Prompt]:
        return lambda at: prompt(flow[0] or "", 64, at=at, key=flow[1])

    flood, quiet = flows
    random = Random(1)
    at = [random.uniform(0, 10) for _ in range(10 * busy)]
    arrivals = [(t, of(flood)) for t in at] + [(0.2 * i, of(quiet)) for i in range(50)]
    simulated = Simulated(scheduler(pass_tokens=4096, chunk_tokens=512, pass_prompts=64), places, life_s=1.0)
    simulated.run(arrivals, until=12)
    waited = sorted(simulated.waited[quiet])
    assert len(waited) == 50
    return waited[int(0.99 * len(waited))]


@pytest.mark.parametrize("flows", [TASKS, KEYS], ids=["tasks", "keys"])
def test_a_flood_does_not_double_what_the_quiet_wait_beside_full_passes(flows: tuple[Flow, Flow]) -> None:
    beside_full_passes = 2 * (0.01 + 0.0001 * 4096)  # the rest of the one under way, and its own
    assert quiet_p99(flows, busy=80, places=10_000) <= 2 * beside_full_passes
    assert quiet_p99(flows, busy=80, places=64) <= 2 * beside_full_passes, "decode is full all the time"
