"""A prompt on its way through the scheduler, a type per state, and the part of it that one pass computes."""

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Waiting(Generic[T]):
    """A prompt in the queue: its token count, the keys of its blocks that may be shared, whether it must run
    in one piece, and the time before which decode has no room for it."""

    job: T
    tokens: int
    keys: tuple[bytes, ...] = ()
    whole: bool = False
    not_before: float = 0.0


@dataclass(slots=True, eq=False)
class Started(Generic[T]):
    """A prompt of which `done` tokens have their KV, the first `cached` of them from earlier prompts.

    `table`: its blocks; they hold all of it while it is computed in chunks, and its shareable part otherwise.
    """

    waiting: Waiting[T]
    table: tuple[int, ...]
    cached: int
    done: int

    @property
    def job(self) -> T:
        return self.waiting.job


@dataclass(frozen=True, slots=True)
class Chunk(Generic[T]):
    """Tokens start .. end of a prompt, for one pass; `stored` of them go to the prompt's blocks."""

    prompt: Started[T]
    start: int
    end: int
    stored: int

    @property
    def job(self) -> T:
        return self.prompt.job

    @property
    def is_first(self) -> bool:
        return self.start == self.prompt.cached

    @property
    def is_last(self) -> bool:
        return self.end == self.prompt.waiting.tokens


@dataclass(slots=True)
class PrefixLookups:
    """Since the start: prompts looked up, their tokens, and what of both was found."""

    prompts: int = 0
    tokens: int = 0
    hits: int = 0
    hit_tokens: int = 0

    def count(self, tokens: int, cached: int) -> None:
        self.prompts += 1
        self.tokens += tokens
        self.hits += cached > 0
        self.hit_tokens += cached
