"""From text to the ids that are computed, and from drawn ids back to text.

In: the same ids that training saw, as many as fit.

    completion, task         template(text); `raw_prompt` leaves the template out. Ids would go without it,
                             so that has to be said (`raw_prompt`); `add_template` puts it around them if they
                             are the ids that the text inside the template has
    completion, plain model  text, or the ids as given
    chats                    `conversation`

A completion of a task that was trained on the chat template is a conversation of one user message. Task
tokens and the model's special tokens come from templates alone: a prompt's text that looks like one is text
(`Tokenizer.as_text`). Of ids, those outside the vocabulary are refused.

What is long is tokenised in threads, a few at a time; not at all if it cannot fit and is not to be cut.

Out: one token of one choice at a time, never looking back over the whole. Text goes out only once it is
settled: a character when it is complete, and what may be the beginning of a stop text when it turned out not
to be one. A token costs time in the length of its own text and of the stop texts.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, NamedTuple, Protocol, TypeVar

from prad.artefact import PROMPT_FIELD, AdapterRecord
from prad.core.sampling import Token, TokenEvent
from prad.lm import ChatTemplateError, Tokenizer
from prefill_service.api.intake import ApiLimits, PromptInput
from prefill_service.api.problems import shown
from prefill_service.errors import InvalidRequestError, OverloadedError, PromptTooLongError

T = TypeVar("T")

Template = Literal["task", "chat", "none"]
"""What is put around a prompt: the task's template (inside the model's chat template if the task was trained
so), the model's chat template alone, or nothing."""

TOKENISING_THREADS = 4
ID_CHARACTERS = 4
"""What an id counts where characters are counted that are tokenised."""

REMEMBERED_TOKENS = 65_536
LOWEST = -9999.0  # stands for minus infinity, which JSON does not have


class PromptEncoder:
    """Tokenises a request's prompts. `context`: positions of the model, which bound what is tokenised."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, context: int, limits: ApiLimits) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._context = context
        self._most_chars = context * tokenizer.longest_token
        self._limits = limits
        self._waiting_chars = 0
        self._threads = asyncio.Semaphore(TOKENISING_THREADS)

    async def completion(
        self,
        record: AdapterRecord | None,
        prompts: Sequence[PromptInput],
        template: Template,
        *,
        cut: bool,
        specials: bool | None = None,
    ) -> list[tuple[int, ...]]:
        """`record` None: the plain model; `template`: of `completion_template`; `cut`: what does not fit will
        be; `specials`: whether the tokenizer's special tokens come in front of texts, None: as was trained.
        Raises InvalidRequestError, OverloadedError."""
        for prompt in prompts:
            self._require_some(prompt, template, cut)
        encoded = []
        with self._room(sum(map(_weight, prompts))):
            for prompt in prompts:
                encoded.append(await self._completion(record, prompt, template, specials))
                await asyncio.sleep(0)  # a long list must not keep the event loop from other requests
        return encoded

    async def _completion(
        self, record: AdapterRecord | None, prompt: PromptInput, template: Template, specials: bool | None
    ) -> tuple[int, ...]:
        wrapping = record if template == "task" else None
        if isinstance(prompt, str):
            text = self._tokenizer.as_text(prompt)
            return await self._encoded(
                _weight(prompt), lambda: self._wrapped(wrapping, text, "prompt", specials)
            )
        self._require_known(prompt, "prompt")
        if wrapping is None:
            return prompt
        return await self._encoded(_weight(prompt), lambda: self._around(wrapping, prompt, specials))

    def _require_known(self, ids: Sequence[int], param: str) -> None:
        """Raises InvalidRequestError for an id that is not of the vocabulary."""
        if ids and not (min(ids) >= 0 and max(ids) < self._vocab_size):
            wrong = next(token for token in ids if not 0 <= token < self._vocab_size)
            raise InvalidRequestError(
                f"token id {wrong} is out of range: expected 0 to {self._vocab_size - 1}", param=param
            )

    def _around(self, record: AdapterRecord, ids: tuple[int, ...], specials: bool | None) -> list[int]:
        """The template around ids, which then are what their text has there: nothing else was trained on."""
        text = self._tokenizer.as_text(self._tokenizer.decode(ids))
        whole = tuple(self._wrapped(record, text, "prompt", specials))
        if not any(whole[at] == ids[0] and whole[at : at + len(ids)] == ids for at in range(len(whole))):
            raise InvalidRequestError(
                f"as text these token ids become others inside the task's template {shown(record.template)}, "
                "where they meet it or among themselves, and the adapter was trained on those: send the "
                "prompt as text",
                param="prompt",
                code="template_not_applicable",
            )
        return list(whole)

    def _wrapped(
        self, record: AdapterRecord | None, text: str, param: str, specials: bool | None = None
    ) -> list[int]:
        """Ids of a single prompt in the template of `record`; None: in no template."""
        if record is None:
            return self._tokenizer.encode_prompt(text, add_special_tokens=specials is not False)
        if record.chat_template:
            turns = [{"role": "user", "content": record.wrap(text)}]
            encode = partial(self._tokenizer.encode_chat, turns, add_special_tokens=bool(specials))
            return self._in_chat_template(param, encode)
        return self._tokenizer.encode_prompt(*record.parts(text), add_special_tokens=specials is not False)

    def _in_chat_template(self, param: str, encode: Callable[[], list[int]]) -> list[int]:
        """What `encode` makes with the model's chat template. Raises InvalidRequestError."""
        if not self._tokenizer.has_chat_template:
            raise InvalidRequestError(
                "this model has no chat template: send a prompt to /v1/completions",
                param=param,
                code="no_chat_template",
            )
        try:
            return encode()
        except ChatTemplateError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", param=param, quotes=True
            ) from error

    def _require_some(self, prompt: PromptInput, template: Template, cut: bool) -> None:
        if not prompt and (isinstance(prompt, str) or template == "task"):
            raise InvalidRequestError("the prompt is empty: expected at least one token", param="prompt")
        if isinstance(prompt, str):
            if not cut:
                self._require_short(len(prompt), "prompt")
        elif template == "task" and len(prompt) > self._context and not cut:
            raise PromptTooLongError(
                f"the context holds {self._context} tokens, but the prompt has {len(prompt)}: shorten it, or "
                "send truncate_prompt_tokens",
                param="prompt",
            )

    def _require_short(self, chars: int, param: str) -> None:
        """Before it is tokenised, which takes some 200 bytes, and some microseconds, for each character."""
        if chars > self._most_chars:
            raise PromptTooLongError(
                f"the context holds {self._context} tokens, at most {self._most_chars} characters of text, "
                f"but {chars} came; shorten the prompt",
                param=param,
            )

    @contextmanager
    def _room(self, chars: int) -> Iterator[None]:
        """Counts what waits for being tokenised in threads, or does not let it in. One request always may."""
        if chars <= self._limits.thread_chars:
            yield
            return
        if self._waiting_chars and self._waiting_chars + chars > self._limits.tokenising_chars:
            raise OverloadedError(
                f"{self._waiting_chars} characters of other prompts are being tokenised already: expected up "
                f"to {self._limits.tokenising_chars} with this request's {chars}; try again later"
            )
        self._waiting_chars += chars
        try:
            yield
        finally:
            self._waiting_chars -= chars

    async def _encoded(self, chars: int, encode: Callable[[], list[int]]) -> tuple[int, ...]:
        return tuple(await self._computed(chars, encode))

    async def _computed(self, chars: int, work: Callable[[], T]) -> T:
        """In a thread if the characters are many."""
        if chars <= self._limits.thread_chars:
            return work()
        async with self._threads:
            return await asyncio.to_thread(work)


def completion_template(
    record: AdapterRecord | None, prompt: PromptInput, *, raw: bool, add: bool
) -> Template:
    """`prompt`: one of the request's, which are of one kind. Raises InvalidRequestError where ids would
    silently go without the template that the adapter was trained in."""
    if record is None or raw:
        return "none"
    if isinstance(prompt, str) or add:
        return "task"
    if record.template == PROMPT_FIELD and not record.chat_template:
        return "none"
    raise InvalidRequestError(
        f"this task's prompts stand in a template, {shown(record.template)}, and token ids do not: send "
        "the prompt as text, or 'add_template': true to have it put around the ids, or 'raw_prompt': true if "
        "it is in them already or not wanted",
        param="prompt",
        code="template_not_applied",
    )


def chat_template(record: AdapterRecord | None, *, raw: bool) -> Template:
    if record is not None and not raw:
        return "task"
    return "chat" if record is None or record.chat_template else "none"


def _weight(prompt: PromptInput) -> int:
    return len(prompt) if isinstance(prompt, str) else ID_CHARACTERS * len(prompt)


class Detokeniser(Protocol):
    """`prad.lm.TextStream`."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class StopScanner:
    """Finds the stop text that is completed first; of two completed by the same character, the longer one.
    `kept`: it stays in the text.

    Only the held-back tail (shorter than the longest stop text) is looked at again with new text.
    """

    def __init__(self, stops: tuple[str, ...], *, kept: bool = False) -> None:
        self._stops = stops
        self._kept = kept
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that is settled now, and whether a stop text ended it."""
        if not self._stops:
            return text, False
        held = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self._held, (end, at, self.found) = "", min(found)
            return held[: end if self._kept else at], True
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
    in the text of all but the first `min_tokens` tokens; `keep_stop`: what ends the text stays in it.
    `length` counts the characters so far, held-back ones included: where the next token's text begins.
    """

    def __init__(
        self,
        stream: Detokeniser,
        stops: tuple[str, ...],
        *,
        strip_space: bool,
        min_tokens: int = 0,
        keep_stop: bool = False,
    ) -> None:
        self._stream = stream
        self.scanner = StopScanner(stops, kept=keep_stop)
        self._keep_stop = keep_stop
        self._strip_space = strip_space
        self._unscanned = min_tokens
        self.length = 0

    def settle(self, event: TokenEvent) -> tuple[str, str | None]:
        """The text that is settled with this token, and why the choice ends with it, if it does."""
        settled = ""
        if event.finish_reason != "stop" or self._keep_stop:  # a stop id counts, but has no text
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
        return piece if piece.stopped else Piece(piece.text + self.scanner.release())

    def _scanned(self, text: str) -> Piece:
        return Piece(*self.scanner.feed(text)) if text else Piece("")

    def _stripped(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            text = text.removeprefix(" ")
        self.length += len(text)
        return text


class TokenName(NamedTuple):
    """A token by its text, or as in bytes:\\xe2\\x98 for a part of a character, and its bytes."""

    text: str
    raw: bytes


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token. `top`: the likeliest alternatives, best first; `offset`: characters before it."""

    token: TokenName
    logprob: float | None
    top: tuple[tuple[TokenName, float], ...]
    offset: int


class TokenScorer:
    """Puts names to the engine's numbers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._name = lru_cache(REMEMBERED_TOKENS)(
            lambda token: TokenName(tokenizer.token_text(token), tokenizer.token_bytes(token))
        )

    def score(self, token: Token, offset: int) -> TokenScore:
        assert token.logprob is not None
        top = tuple((self._name(other), max(logprob, LOWEST)) for other, logprob in token.top)
        return TokenScore(self._name(token.id), max(token.logprob, LOWEST), top, offset)


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one choice. `scores`, `ids`: of the tokens that came since its last delta, if they were asked
    for."""

    index: int
    text: str
    scores: tuple[TokenScore, ...] = ()
    finish_reason: str | None = None
    ids: tuple[int, ...] = ()
