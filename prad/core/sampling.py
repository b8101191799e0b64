"""How a request's tokens are drawn: its settings, the random number behind each token, and what is drawn; and
guesses of what will be.

Random numbers belong to the request, not to the process: the number behind a token is a hash of (seed, prompt
index, choice, output index), whatever else is in the batch, and again after a replay elsewhere. What a
sequence drew goes to its owner as a `TokenEvent`.

Because of that a guess can be checked: one step computes the logits behind each token of a draft, and as many
as are what is drawn anyway are kept. A `Drafter` looks up what came behind the latest tokens before: in the
text itself (prompt lookup) and in recent answers that are alike. It learns how often each kind of guess is
right, whether or not it was computed, and how long steps take, and guesses where that pays.
"""

import math
import struct
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import blake2b
from typing import NamedTuple

from prad.core.rules import Rules


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
    alternatives to report with each token (0: the token alone), None for no log-probabilities. `rules`: what
    else is said about the tokens; None: nothing.
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
    rules: Rules | None = None

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


class Scoring(NamedTuple):
    """Which given tokens get log-probabilities, counted through prompt and continuation: those from `first`
    on, but for the very first; each with so many alternatives."""

    first: int
    alternatives: int


@dataclass(frozen=True, slots=True)
class ScoredToken(Token):
    """A given token, not a drawn one; `rank` 1: no other was likelier."""

    rank: int = 1


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one sequence drew since its last event. `index` is the output index of the first of `tokens`, or
    of the next one if there are none.

    finish_reason, a `FinishReason`, ends the sequence.
    cached_tokens: of the prompt's tokens, how many were not computed but taken from the prefix cache; told
    with its very first token only, or with its end if it has none.
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


@dataclass(frozen=True, slots=True)
class ScoresEvent(TokenEvent):
    """Before a prompt's first token, inside prefill alone: `scores` of the given tokens that were to have
    some, None for one that no model draws."""

    scores: tuple[ScoredToken | None, ...] = ()


_LONGEST_CONTEXT = 4  # latest tokens that a guess is looked up by; those of fewer follow
_CONFIDENCE = 4  # how often in a row the same token came behind a context: 0 to 3
_OWN, _ALIKE = 0, _LONGEST_CONTEXT  # kinds of guesses: by the text itself, by answers alike
_KINDS = _LONGEST_CONTEXT * (1 + _CONFIDENCE)
_UNKNOWN_CHANCE = 0.4
_LEARNED_A_TIME = 1 / 16
_LEAST_CHANCE = 0.05
_TEXT = 4096  # latest tokens of a text that are looked into
_ANSWERS = 1 << 17  # contexts that are remembered of answers
_REMEMBERED = 4096  # latest tokens of an answer that are
_REMEMBERED_A_STEP = 64  # twice as many as it draws, so that nobody waits long for the latest
_TO_REMEMBER = 32  # answers at most that have yet to be
_LABELS = 1024
_MOST_SEQUENCES, _MOST_ROWS = 4, 32
_GAIN = 1.05  # in tokens a second, below which a draft is not worth its risk


@dataclass(slots=True, eq=False)
class Written:
    """A sequence's text up to the token that its next step is fed. `answer`: where its output begins;
    `alike`: whose recent answers may be like it, 0 for nobody's. `known`: what followed the contexts in
    `ids`, as far as `read`."""

    ids: list[int]
    alike: int
    answer: int
    known: dict[int, int] = field(default_factory=dict)
    read: int = 0

    @classmethod
    def of(cls, text: Sequence[int], first: int, alike: int) -> "Written":
        """`text` stands in front of an answer's token `first`."""
        ids = [*text[-_TEXT:], first]
        return cls(ids, alike, len(ids) - 1)

    def look_up(self) -> None:
        """Reads on to the end."""
        for at in range(max(1, self.read), len(self.ids)):
            for n in range(1, min(at, _LONGEST_CONTEXT) + 1):
                self.known[hash(tuple(self.ids[at - n : at]))] = self.ids[at]
        self.read = len(self.ids)


@dataclass(slots=True, eq=False)
class _Answer:
    """The end of an answer that is over, with what stands in front of it; from `at` on it has yet to be
    remembered, among answers `alike`."""

    ids: list[int]
    at: int
    alike: int

    @classmethod
    def of(cls, written: Written) -> "_Answer":
        ids = written.ids
        first = max(1, written.answer, len(ids) - _REMEMBERED)
        start = max(0, first - _LONGEST_CONTEXT)
        return cls(ids[start:], first - start, written.alike)


class StepSeconds:
    """What a step takes by its rows, of the latest ones: a line through them, and as long as they all had the
    same number of rows, one that a prior gives its slope."""

    _FORGOTTEN, _SLOPE, _WEIGHT = 0.03, 0.05, 20.0

    def __init__(self) -> None:
        self._n = self._rows = self._seconds = self._squares = self._products = 0.0

    def add(self, rows: int, seconds: float) -> None:
        if self._n > 1:
            seconds = min(seconds, 2 * self(rows))  # a neighbour's doing
        kept = 1 - self._FORGOTTEN
        self._n = self._n * kept + 1
        self._rows = self._rows * kept + rows
        self._seconds = self._seconds * kept + seconds
        self._squares = self._squares * kept + rows * rows
        self._products = self._products * kept + rows * seconds

    def __call__(self, rows: int) -> float:
        if not self._n:
            return 1 + self._SLOPE * rows
        mean, seconds = self._rows / self._n, self._seconds / self._n
        apart = max(0.0, self._squares - self._rows * mean) + self._WEIGHT
        prior = self._SLOPE * seconds
        slope = (self._products - self._rows * seconds + self._WEIGHT * prior) / apart
        return max(seconds * 0.1, seconds + min(max(slope, 0.1 * prior), seconds) * (rows - mean))


class Drafter:
    """Guesses the next tokens of the sequences of a small batch. Not thread-safe.

    `longest`: tokens of a draft, at most; 0 guesses nothing.
    """

    def __init__(self, longest: int, vocab_size: int, seconds: StepSeconds | None = None) -> None:
        self._longest = longest
        self._vocab_size = vocab_size
        self._seconds = seconds or StepSeconds()
        self._few = False
        # of a context and whose answers: the next token, its confidence; a plain dict finds its oldest slowly
        self._answers: OrderedDict[int, int] = OrderedDict()
        self._to_remember: deque[_Answer] = deque(maxlen=_TO_REMEMBER)
        self._chances: OrderedDict[int, list[float]] = OrderedDict()  # of each kind of guess

    def drafts(self, batch: Sequence[Written], room: Sequence[int]) -> list[tuple[int, ...]]:
        """A draft for each, of as many tokens as there is room for, or none: as many as make the batch the
        fastest. A large batch, which gets none, pays for nothing."""
        self._few = bool(self._longest) and len(batch) <= _MOST_SEQUENCES
        if not self._few:
            return [()] * len(batch)
        self._remember()
        chains = [self._chain(w, min(most, self._longest)) for w, most in zip(batch, room, strict=True)]
        least = self._least(len(batch), sorted((p for chain in chains for _, p in chain), reverse=True))
        return [tuple(token for token, p in chain if p >= least) for chain in chains]

    def drew(self, written: Written, tokens: Sequence[int]) -> None:
        """These were drawn next. If `drafts` has read the text for this step, what would have been guessed is
        compared, too: others may wait for this call."""
        compared = self._few and written.read == len(written.ids)
        chances = self._chances_of(written.alike) if compared else []
        for token in tokens:
            if compared:
                written.look_up()
                for guess, kind in self._guesses(written, tuple(written.ids[-_LONGEST_CONTEXT:])):
                    chances[kind] += ((guess == token) - chances[kind]) * _LEARNED_A_TIME
            written.ids.append(token)

    def ended(self, written: Written) -> None:
        """Its answer will be remembered, a little in each step of a small batch."""
        if self._longest and written.alike:
            self._to_remember.append(_Answer.of(written))

    def took(self, rows: int, seconds: float) -> None:
        """A step of so many rows."""
        self._seconds.add(rows, seconds)

    def _remember(self) -> None:
        """The next tokens of answers that are over."""
        for _ in range(_REMEMBERED_A_STEP):
            while self._to_remember and self._to_remember[0].at == len(self._to_remember[0].ids):
                self._to_remember.popleft()
            if not self._to_remember:
                return
            answer = self._to_remember[0]
            self._followed(answer.ids[max(0, answer.at - _LONGEST_CONTEXT) : answer.at + 1], answer.alike)
            answer.at += 1

    def _followed(self, ids: Sequence[int], alike: int) -> None:
        """The last one came behind the others, the longest context."""
        *context, drawn = ids
        answers = self._answers
        for n in range(1, len(context) + 1):
            key = hash(tuple(context[-n:])) ^ alike
            token, confidence = divmod(answers.get(key, -1), _CONFIDENCE)
            if token == drawn:
                confidence = min(confidence + 1, _CONFIDENCE - 1)
            elif token < 0 or not confidence:
                token, confidence = drawn, 0
            else:
                confidence -= 1
            answers[key] = token * _CONFIDENCE + confidence
            answers.move_to_end(key)
            if len(answers) > _ANSWERS:
                answers.popitem(last=False)

    def _chain(self, written: Written, most: int) -> list[tuple[int, float]]:
        """(token, chance that it and all before it are right)."""
        if most > 0:
            written.look_up()
        chances, chance = self._chances_of(written.alike), 1.0
        latest, chain = tuple(written.ids[-_LONGEST_CONTEXT:]), list[tuple[int, float]]()
        while len(chain) < most:
            guesses = [(chances[kind], guess) for guess, kind in self._guesses(written, latest)]
            right, token = max(guesses, default=(0.0, 0))
            chance *= right
            if chance < _LEAST_CHANCE or token >= self._vocab_size:
                break
            chain.append((token, chance))
            latest = (*latest[1 - _LONGEST_CONTEXT :], token)
        return chain

    def _guesses(self, written: Written, latest: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """By the longest contexts known, the text's own and that of answers alike: (token, kind)."""
        keys = [hash(latest[-n:]) for n in range(len(latest), 0, -1)]
        for n, key in zip(range(len(latest), 0, -1), keys, strict=True):
            if (guess := written.known.get(key)) is not None:
                yield guess, _OWN + n - 1
                break
        if written.alike:
            for n, key in zip(range(len(latest), 0, -1), keys, strict=True):
                if (known := self._answers.get(key ^ written.alike)) is not None:
                    guess, confidence = divmod(known, _CONFIDENCE)
                    yield guess, _ALIKE + (n - 1) * _CONFIDENCE + confidence
                    break

    def _least(self, sequences: int, chances: Sequence[float]) -> float:
        """The least chance that pays to compute."""
        tokens, least = float(sequences), math.inf
        fastest = tokens / self._seconds(sequences) * _GAIN
        for rows, chance in enumerate(chances[: _MOST_ROWS - sequences], sequences + 1):
            tokens += chance
            if (speed := tokens / self._seconds(rows)) > fastest:
                fastest, least = speed, chance
        return least

    def _chances_of(self, alike: int) -> list[float]:
        chances = self._chances.pop(alike, None) or [_UNKNOWN_CHANCE] * _KINDS
        self._chances[alike] = chances
        if len(self._chances) > _LABELS:
            self._chances.popitem(last=False)
        return chances
