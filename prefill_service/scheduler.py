"""Which waiting prompts share the next pass. Pure: plain data in, plain data out."""

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waiting(Generic[T]):
    """A prompt in the queue: its token count, and the time before which decode has no room for it."""

    job: T
    tokens: int
    not_before: float = 0.0


class PromptScheduler(Generic[T]):
    """First come, first served, under a token budget per pass."""

    def __init__(self, *, pass_tokens: int, pass_prompts: int, max_waiting: int) -> None:
        self._pass_tokens = pass_tokens
        self._pass_prompts = pass_prompts
        self._max_waiting = max_waiting
        self._queue: deque[Waiting[T]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def full(self) -> bool:
        return len(self._queue) >= self._max_waiting

    def add(self, waiting: Waiting[T]) -> None:
        self._queue.append(waiting)

    def put_back(self, waiting: Waiting[T]) -> None:
        """To the front again: decode had no room for it."""
        self._queue.appendleft(waiting)

    def remove(self, job: T) -> None:
        self._queue = deque(w for w in self._queue if w.job != job)

    def next_due(self) -> float | None:
        """When the head of the queue may run; None if nothing waits."""
        return self._queue[0].not_before if self._queue else None

    def next_batch(self, now: float) -> list[Waiting[T]]:
        """Takes the prompts of the next pass off the queue.

        The head goes first even if it alone exceeds the budget. While the head waits for decode to have
        room, nothing overtakes it.
        """
        batch: list[Waiting[T]] = []
        budget = self._pass_tokens
        while self._queue and len(batch) < self._pass_prompts:
            head = self._queue[0]
            if head.not_before > now or (batch and head.tokens > budget):
                break
            batch.append(self._queue.popleft())
            budget -= head.tokens
        return batch
