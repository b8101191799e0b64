"""How a request's tokens are drawn: its settings, the random number behind each token, and what is drawn.

Random numbers belong to the request, not to the process: the number behind a token is a hash of (seed, prompt
index, choice, output index), whatever else is in the batch, and again after a replay elsewhere. What a
sequence drew goes to its owner as a `TokenEvent`.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import blake2b
from typing import NamedTuple


class FinishReason(StrEnum):
    """Why a sequence ends: with its last token, or (an early end) after it."""

    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"
    ERROR = "error"


SEED_MASK = 2**64 - 1
"""Keys use 64 bits of a seed: a negative one draws as its remainder does."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when a sequence ends.

    temperature 0 is greedy (ties go to the lowest id). The filters apply to the distribution after
    temperature, in the order min_p, top_k, top_p; top_k 0, top_p 1 and min_p 0 switch them off.
    `stop_ids` end a sequence and are drawn only once `min_tokens` came before them. `logprobs`: how many
    alternatives to report with each token (0: the token alone), None for no log-probabilities.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    stop_ids: frozenset[int] = field(default_factory=frozenset)
    logprobs: int | None = None

    @property
    def fault(self) -> str | None:
        """What of it is out of its range, if anything; stop ids and alternatives depend on the vocabulary."""
        for wrong, message in (
            (not 0 <= self.temperature < float("inf"), f"temperature {self.temperature}"),
            (not 0 < self.top_p <= 1, f"top_p {self.top_p} is not in (0, 1]"),
            (not 0 <= self.min_p <= 1, f"min_p {self.min_p} is not in [0, 1]"),
        ):
            if wrong:
                return message
        return None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def finish_reason(self, token: int, count: int) -> FinishReason | None:
        """Why a sequence ends with `token` as its `count`-th output token: STOP, LENGTH or None."""
        if token in self.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if count >= self.max_tokens else None


class SampleKey(NamedTuple):
    """Names one random number: which request, which of its prompts and choices, which output token."""

    seed: int
    prompt_index: int
    choice: int
    output_index: int

    def uniform(self) -> float:
        """A float in [0, 1) that depends on the key alone."""
        packed = struct.pack(
            "<QIIQ", self.seed & SEED_MASK, self.prompt_index, self.choice, self.output_index
        )
        return float((int.from_bytes(blake2b(packed, digest_size=8).digest(), "little") >> 11) * 2.0**-53)


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

    finish_reason, a `FinishReason`, ends the sequence.
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
        return self.finish_reason not in (None, FinishReason.STOP, FinishReason.LENGTH)

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
