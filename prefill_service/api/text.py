"""From the tokens of one choice to its text: one token at a time, never looking back over the whole.

Text goes out only once it is settled: a character when it is complete, and what may be the beginning of a
stop text when it turned out not to be one. A token costs time in the length of its own text and of the stop
texts.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from prad.core.sampling import Token
from prad.lm import Tokenizer

REMEMBERED_TOKENS = 65_536
LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class Detokeniser(Protocol):
    """`prad.lm.TextStream`."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class StopScanner:
    """Finds the stop text that is completed first; of two completed by the same character, the longer one.

    Only the held-back tail (shorter than the longest stop text) is looked at again with new text.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that is settled now, and whether a stop text ended it."""
        if not self._stops:
            return text, False
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)[1]], True
        keep = self._open_tail(held)
        self._held = held[keep:]
        return held[:keep], False

    def release(self) -> str:
        """What is held back, once nothing more comes."""
        held, self._held = self._held, ""
        return held

    def _open_tail(self, text: str) -> int:
        """Where the longest tail of `text` begins that some stop text begins with."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[start:]
            if any(stop.startswith(tail) for stop in self._stops):
                return start
        return len(text)


@dataclass(frozen=True, slots=True)
class Piece:
    """Settled text. `stopped`: a stop text was found, nothing follows."""

    text: str
    stopped: bool = False


class ChoiceText:
    """The text of one choice.

    `strip_space`: leave out the one space that training puts before a completion. Stop texts are looked for
    in the text of all but the first `min_tokens` tokens. `length` counts the characters so far, held-back
    ones included: where the next token's text begins.
    """

    def __init__(
        self, stream: Detokeniser, stops: tuple[str, ...], *, strip_space: bool, min_tokens: int = 0
    ) -> None:
        self._stream = stream
        self._scanner = StopScanner(stops)
        self._strip_space = strip_space
        self._unscanned = min_tokens
        self.length = 0

    def push(self, token: int) -> Piece:
        text = self._stripped(self._stream.push(token))
        if self._unscanned:
            self._unscanned -= 1
            return Piece(text)
        return self._scanned(text)

    def finish(self) -> Piece:
        """The rest, when the choice ended by itself: incomplete characters and held-back text included."""
        piece = self._scanned(self._stripped(self._stream.flush()))
        return piece if piece.stopped else Piece(piece.text + self._scanner.release())

    def _scanned(self, text: str) -> Piece:
        return Piece(*self._scanner.feed(text)) if text else Piece("")

    def _stripped(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            text = text.removeprefix(" ")
        self.length += len(text)
        return text


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One output token. `top`: the likeliest alternatives, best first; `offset`: characters before it."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int


class TokenScorer:
    """Puts names to the engine's numbers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._name = lru_cache(REMEMBERED_TOKENS)(tokenizer.token_text)

    def score(self, token: Token, offset: int) -> TokenScore:
        assert token.logprob is not None
        top = tuple((self._name(other), max(logprob, LOWEST)) for other, logprob in token.top)
        return TokenScore(self._name(token.id), max(token.logprob, LOWEST), top, offset)
