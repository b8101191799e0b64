"""From text to the ids that are computed, and from drawn ids back to text.

In: the same ids that training saw, as many as fit.

    completion, task         template(text), or the ids as given; `raw_prompt` leaves the template out
    completion, plain model  text
    chat, task               template(the user message): such an adapter has only ever seen single prompts, so
                             other messages are refused rather than silently left out
    chat, task trained on    the model's chat template over all messages, the last user message inside the
    the chat template        artefact's template
    chat, plain model        the model's chat template over all messages

A completion of a task that was trained on the chat template is a conversation of one user message. Task
tokens and the model's special tokens come from templates alone: a prompt's text that looks like one is text
(`Tokenizer.as_text`). Of ids, those outside the vocabulary are refused.

Out: one token of one choice at a time, never looking back over the whole. Text goes out only once it is
settled: a character when it is complete, and what may be the beginning of a stop text when it turned out not
to be one. A token costs time in the length of its own text and of the stop texts.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from jinja2 import TemplateError

from prad.artefact import AdapterRecord
from prad.core.sampling import Token, TokenEvent
from prad.lm import Tokenizer
from prefill_service.api.intake import Message, PromptInput
from prefill_service.errors import InvalidRequestError, PromptTooLongError

ChatTurns = list[dict[str, str]]

FIT = -1
"""truncate_prompt_tokens that keeps as much of the prompt as fits."""
REMEMBERED_TOKENS = 65_536
LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Tokenises prompts. Texts longer than `thread_chars` are tokenised in a thread, as others wait."""

    tokenizer: Tokenizer
    vocab_size: int
    thread_chars: int

    async def completion(
        self, record: AdapterRecord | None, prompt: PromptInput, *, raw: bool
    ) -> tuple[int, ...]:
        """`record` None: the plain model. Raises InvalidRequestError."""
        if not isinstance(prompt, str):
            return self._checked(prompt)
        if not prompt:
            raise InvalidRequestError("the prompt is empty: expected at least one token", param="prompt")
        text = self.tokenizer.as_text(prompt)
        if raw or record is None:
            return await self._text(text)
        if record.chat_template:
            return await self._chat([{"role": "user", "content": record.wrap(text)}], "prompt")
        return await self._text(*record.parts(text))

    async def chat(
        self, record: AdapterRecord | None, messages: Sequence[Message], *, raw: bool
    ) -> tuple[int, ...]:
        """`record` None: the plain model. Raises InvalidRequestError."""
        last = messages[-1]
        if last.role != "user":
            raise InvalidRequestError(
                f"the last message must be the user's, got role {last.role!r}: going on with a given answer "
                "is not supported yet",
                param="messages",
            )
        if record is None or record.chat_template:
            as_text = self.tokenizer.as_text
            text = as_text(last.content)
            content = text if raw or record is None else record.wrap(text)
            turns = [{"role": m.template_role, "content": as_text(m.content)} for m in messages[:-1]]
            return await self._chat([*turns, {"role": "user", "content": content}], "messages")
        if len(messages) > 1:
            raise InvalidRequestError(
                f"this task's adapter was trained on single prompts and cannot see a conversation: expected "
                f"one user message, got {len(messages)} messages",
                param="messages",
                code="conversation_not_supported",
            )
        if not last.content:
            raise InvalidRequestError("the message is empty", param="messages")
        text = self.tokenizer.as_text(last.content)
        return await self._text(*((text,) if raw else record.parts(text)))

    def _checked(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise InvalidRequestError(
                f"token id {wrong} is out of range: expected 0 to {self.vocab_size - 1}", param="prompt"
            )
        return ids

    async def _text(self, text: str, *more: str | int) -> tuple[int, ...]:
        if sum(len(part) for part in (text, *more) if isinstance(part, str)) <= self.thread_chars:
            return tuple(self.tokenizer.encode_prompt(text, *more))
        return tuple(await asyncio.to_thread(self.tokenizer.encode_prompt, text, *more))

    async def _chat(self, turns: ChatTurns, param: str) -> tuple[int, ...]:
        if not self.tokenizer.has_chat_template:
            raise InvalidRequestError(
                "this model has no chat template: send a prompt to /v1/completions",
                param=param,
                code="no_chat_template",
            )
        try:
            if sum(len(turn["content"]) for turn in turns) <= self.thread_chars:
                return tuple(self.tokenizer.encode_chat(turns))
            return tuple(await asyncio.to_thread(self.tokenizer.encode_chat, turns))
        except TemplateError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", param=param
            ) from error


def fit(
    ids: tuple[int, ...],
    *,
    context: int,
    virtual: int = 0,
    requested: int | None,
    default: int,
    min_tokens: int,
    truncate: int | None,
) -> tuple[tuple[int, ...], int]:
    """The prompt as it will be computed, and how many tokens may follow it.

    `context`: positions for both and the adapter's `virtual` tokens; `requested`: max_tokens if the request
    names it (kept to the letter), else `default` is clipped to what fits. `truncate`: keep only that many of
    the prompt's last tokens.
    Raises PromptTooLongError with the numbers, InvalidRequestError for an empty prompt or min_tokens that
    cannot be reached.
    """
    capacity = context - virtual
    if truncate is not None:
        kept = _room(capacity, requested, default) if truncate == FIT else truncate
        ids = ids[-kept:] if kept > 0 else ids
    if not ids:
        raise InvalidRequestError("the prompt is empty: expected at least one token", param="prompt")
    room = capacity - len(ids)
    if room < (requested or 1):
        if room > 0:
            advice, param = f"max_tokens is at most {room} with this prompt", "max_tokens"
        else:
            advice, param = "shorten the prompt or send 'truncate_prompt_tokens'", "prompt"
        beside = f" beside the adapter's {virtual} virtual ones" if virtual else ""
        raise PromptTooLongError(
            f"the context holds {capacity} tokens{beside}, but {len(ids) + (requested or 1)} were asked for: "
            f"{len(ids)} in the prompt and {requested or 'at least 1'} for the output; {advice}",
            param=param,
        )
    max_tokens = min(default, room) if requested is None else requested
    if min_tokens > max_tokens:
        raise InvalidRequestError(
            f"'min_tokens' is {min_tokens}, but the output is limited to {max_tokens} tokens",
            param="min_tokens",
        )
    return ids, max_tokens


def _room(capacity: int, requested: int | None, default: int) -> int:
    """How much prompt fits beside the output; a default output length takes at most half the context."""
    return capacity - (min(default, capacity // 2) if requested is None else requested)


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

    def settle(self, event: TokenEvent) -> tuple[str, str | None]:
        """The text that is settled with this token, and why the choice ends with it, if it does."""
        settled = ""
        if event.finish_reason != "stop":  # a stop id counts, but has no text
            piece = self.push(event.tokens[0].id)
            if piece.stopped:
                return piece.text, "stop"
            settled = piece.text
        if event.finish_reason is None:
            return settled, None
        rest = self.finish()
        return settled + rest.text, "stop" if rest.stopped else event.finish_reason

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


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one choice. `scores`: of the tokens that came since its last delta, if they were asked for."""

    index: int
    text: str
    scores: tuple[TokenScore, ...] = ()
    finish_reason: str | None = None
