"""Which tokens an answer takes: greedy, or the best of several beams. Pure policy, no tensors.

A search owns the live rows of one prompt. At each step it is shown every row's best continuations and says
which rows go on, as children of the rows before. The first step shows the prompt's own row.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


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
    """score: a sum of log-probabilities while it lives, divided by the number of tokens once it ended."""

    score: float
    tokens: tuple[int, ...] = field(compare=False)


class BeamSearch(Search):
    """The `width` best hypotheses at each step, as transformers' beam search with a length penalty of 1.

    An ended hypothesis is worth the mean log-probability of its tokens, its stop token included. The search
    ends when `width` have ended and the best live one is worth less than the worst of them now, or at
    max_tokens.
    """

    def __init__(self, limits: Limits, width: int) -> None:
        self._limits = limits
        self._width = width
        self._live = [_Hypothesis(0.0, ())]
        self._ended: list[_Hypothesis] = []

    @staticmethod
    def candidates(width: int, stop_ids: frozenset[int]) -> int:
        """How many continuations of each row a step looks at: enough that `width` of them do not stop."""
        return width * max(2, 1 + len(stop_ids))

    def advance(self, rows: Sequence[Sequence[Candidate]]) -> list[Child]:
        ranked = sorted(
            (
                (_Hypothesis(live.score + c.score, (*live.tokens, c.token)), parent)
                for parent, (live, row) in enumerate(zip(self._live, rows, strict=True))
                for c in row
            ),
            key=lambda pair: -pair[0].score,
        )[: self.candidates(self._width, self._limits.stop_ids)]
        length = len(self._live[0].tokens) + 1
        full = length >= self._limits.max_tokens
        over = [h for h, _ in ranked[: self._width] if full or h.tokens[-1] in self._limits.stop_ids]
        self._ended += [_Hypothesis(h.score / length, h.tokens) for h in over]
        self._ended = sorted(self._ended, reverse=True)[: self._width]
        going = [(h, parent) for h, parent in ranked if h.tokens[-1] not in self._limits.stop_ids]
        going = going[: self._width]
        self._live = [h for h, _ in going]
        if full or (len(self._ended) == self._width and going[0][0].score / length <= self._ended[-1].score):
            return []
        return [Child(parent, h.tokens[-1]) for h, parent in going]

    @property
    def score(self) -> float:
        """Of the answer: the mean log-probability of its tokens."""
        return self._ended[0].score

    @property
    def hypotheses(self) -> tuple[tuple[int, ...], ...]:
        """Once it has ended: the ids of the `width` best, best first, stop ids included."""
        return tuple(hypothesis.tokens for hypothesis in self._ended)

    @property
    def answer(self) -> tuple[int, ...]:
        tokens = self._ended[0].tokens
        return tokens[:-1] if tokens[-1] in self._limits.stop_ids else tokens
