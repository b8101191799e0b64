"""Which tokens an answer takes: greedy, or the best of several beams. Pure policy, no tensors.

A search owns the live rows of one prompt. At each step it is shown every row's best continuations and says
which rows go on, as children of the rows before. The first step shows the prompt's own row.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from prad.core.sampling import FinishReason, Token, TokenEvent

_MOST_PENALTY = 10.0  # keeps a length to its power within a float


class Candidate(NamedTuple):
    """A row's continuation by one token; score: the log-probability (0 where it is not wanted)."""

    token: int
    score: float


class Child(NamedTuple):
    """A row of the next step: row `parent` of this one, continued by `token`."""

    parent: int
    token: int


@dataclass(frozen=True, slots=True)
class Limits:
    """When an answer ends: with one of `stop_ids`, or after `max_tokens`."""

    max_tokens: int
    stop_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class Beams:
    """How a beam search is done: it keeps `width` hypotheses.

    One that has ended is worth its log-probability, divided by its number of tokens to the power of
    `length_penalty`: over 0 longer ones gain. early_stopping: whether the search ends as soon as `width` have
    ended. False: once the best live one is worth no more than the worst of these now; None: once it cannot
    come to be worth more ("never" in transformers).
    """

    width: int
    length_penalty: float = 1.0
    early_stopping: bool | None = False

    @property
    def fault(self) -> str | None:
        """What of it is out of its range, if anything."""
        if not -_MOST_PENALTY <= self.length_penalty <= _MOST_PENALTY:
            return f"length_penalty {self.length_penalty} is not in -{_MOST_PENALTY} to {_MOST_PENALTY}"
        return None if self.width > 0 else "a beam search without beams"

    def report(self) -> dict[str, object]:
        """In the API's words."""
        early = "never" if self.early_stopping is None else self.early_stopping
        return {"beams": self.width, "length_penalty": self.length_penalty, "early_stopping": early}

    def candidates(self, stop_ids: frozenset[int]) -> int:
        """How many continuations of each row a step looks at: enough that `width` of them do not stop."""
        return self.width * max(2, 1 + len(stop_ids))

    def worth(self, score: float, length: int) -> float:
        """Of a hypothesis of `length` tokens whose log-probability is `score`."""
        return score / math.pow(length, self.length_penalty)


class Search(ABC):
    """The answer to one prompt in the making."""

    @abstractmethod
    def advance(self, rows: Sequence[Sequence[Candidate]]) -> list[Child]:
        """Takes each live row's best continuations, best first; returns the next rows, none at the end."""

    @property
    @abstractmethod
    def answer(self) -> tuple[int, ...]:
        """Once it has ended: the ids, without the stop id."""


class Greedy(Search):
    """The best token at each step."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tokens: list[int] = []

    def advance(self, rows: Sequence[Sequence[Candidate]]) -> list[Child]:
        token = rows[0][0].token
        if token in self._limits.stop_ids:
            return []
        self._tokens.append(token)
        return [Child(0, token)] if len(self._tokens) < self._limits.max_tokens else []

    @property
    def answer(self) -> tuple[int, ...]:
        return tuple(self._tokens)


@dataclass(frozen=True, slots=True, order=True)
class _Hypothesis:
    """score: a sum of log-probabilities while it lives, what it is worth once it ended."""

    score: float
    tokens: tuple[int, ...] = field(compare=False)


class _Ranked(NamedTuple):
    """A candidate of all rows."""

    score: float
    parent: int
    token: int


class BeamSearch(Search):
    """The `width` best hypotheses at each step, as transformers' beam search.

    A stop token counts as a token of the hypothesis that it ends. At max_tokens all end.
    """

    def __init__(self, limits: Limits, beams: Beams) -> None:
        self._limits = limits
        self._beams = beams
        self._live = [_Hypothesis(0.0, ())]
        self._ended: list[_Hypothesis] = []

    def advance(self, rows: Sequence[Sequence[Candidate]]) -> list[Child]:
        stop_ids, width = self._limits.stop_ids, self._beams.width
        ranked = sorted(
            (
                _Ranked(live.score + c.score, parent, c.token)
                for parent, (live, row) in enumerate(zip(self._live, rows, strict=True))
                for c in row
            ),
            key=lambda each: -each.score,
        )[: self._beams.candidates(stop_ids)]
        length = len(self._live[0].tokens) + 1
        full = length >= self._limits.max_tokens
        over = [each for each in ranked[:width] if full or each.token in stop_ids]
        self._ended += [
            _Hypothesis(self._beams.worth(each.score, length), self._tokens(each)) for each in over
        ]
        self._ended = sorted(self._ended, reverse=True)[:width]
        going = [each for each in ranked if each.token not in stop_ids][:width]
        self._live = [_Hypothesis(each.score, self._tokens(each)) for each in going]
        if full or (len(self._ended) == width and self._is_enough(going[0].score, length)):
            return []
        return [Child(each.parent, each.token) for each in going]

    def _tokens(self, ranked: _Ranked) -> tuple[int, ...]:
        return (*self._live[ranked.parent].tokens, ranked.token)

    def _is_enough(self, best: float, length: int) -> bool:
        """Whether `width` that have ended are; best: the score of the best live one, of `length` tokens."""
        beams = self._beams
        if beams.early_stopping is None and beams.length_penalty > 0:
            length = self._limits.max_tokens  # at which what it has now is worth the most
        return beams.early_stopping is True or beams.worth(best, length) <= self._ended[-1].score

    @property
    def score(self) -> float:
        """What the answer is worth."""
        return self._ended[0].score

    @property
    def hypotheses(self) -> tuple[tuple[int, ...], ...]:
        """Once it has ended: the ids of the `width` best, best first, stop ids included."""
        return tuple(hypothesis.tokens for hypothesis in self._ended)

    @property
    def answer(self) -> tuple[int, ...]:
        tokens = self._ended[0].tokens
        return tokens[:-1] if tokens[-1] in self._limits.stop_ids else tokens

    def events(self, request_id: str, attempt: int, choices: int, at_once: int) -> Iterator[TokenEvent]:
        """Once it has ended: the `choices` best in full, best first, `at_once` tokens in an event at most."""
        for choice, tokens in enumerate(self.hypotheses[:choices]):
            reason = FinishReason.STOP if tokens[-1] in self._limits.stop_ids else FinishReason.LENGTH
            for first in range(0, len(tokens), at_once):
                part = tuple(map(Token, tokens[first : first + at_once]))
                ends = reason.value if first + at_once >= len(tokens) else None
                yield TokenEvent(request_id, attempt, choice, first, part, ends)
