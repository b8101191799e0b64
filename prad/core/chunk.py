"""The part of a prompt that one pass computes: from the scheduler through the pass, one value."""

from dataclasses import dataclass
from typing import Generic, TypeVar

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Chunk(Generic[P]):
    """Tokens start .. end of a prompt.

    `table`: its blocks, with the KV of all tokens before `start`; that of the first `stored` tokens of the
    chunk goes there as well.
    """

    prompt: P
    start: int
    end: int
    table: tuple[int, ...] = ()
    stored: int = 0

    def __len__(self) -> int:
        """Tokens to compute."""
        return self.end - self.start
