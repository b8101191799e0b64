"""A drawn token, and what a sequence's owner is told of it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Token:
    """A drawn token; log-probabilities are the plain model's, before temperature and filters. `top`:
    (id, log-probability), best first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one sequence drew since its last event. `index` is the output index of the first of `tokens`, or
    of the next one if there are none.

    finish_reason ends the sequence: "stop" or "length" with the last token, "deadline" or "error" after it.
    cached_tokens: of the prompt's tokens, how many were not computed but taken from the prefix cache; told
    with its very first token only.
    """

    request_id: str
    attempt: int
    choice: int
    index: int
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0

    @property
    def is_early_end(self) -> bool:
        """Whether the sequence ended before it was done."""
        return self.finish_reason not in (None, "stop", "length")

    def each(self) -> Iterator["TokenEvent"]:
        """An event for each token. A finish reason is the last one's; that of an early end is no token's."""
        last = None if self.is_early_end else len(self.tokens) - 1
        for i, token in enumerate(self.tokens):
            yield replace(
                self,
                index=self.index + i,
                tokens=(token,),
                finish_reason=self.finish_reason if i == last else None,
                error=None,
                cached_tokens=self.cached_tokens if i == 0 else 0,
            )
