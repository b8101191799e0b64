"""From text or messages to the ids that are computed: the same that training saw, as many as fit.

    completion, task         template(text), or the ids as given; `raw_prompt` leaves the template out
    completion, plain model  text
    chat, task               template(the user message): such an adapter has only ever seen single prompts, so
                             other messages are refused rather than silently left out
    chat, task trained on    the model's chat template over all messages, the last user message inside the
    the chat template        artefact's template
    chat, plain model        the model's chat template over all messages

A completion of a task that was trained on the chat template is a conversation of one user message.

Task tokens and the model's special tokens come from templates alone: a prompt's text that looks like one is
text (`Tokenizer.as_text`). Of ids, those outside the vocabulary are refused.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from prad.artefact import AdapterRecord
from prad.lm import Tokenizer
from prefill_service.api.fields import PromptInput
from prefill_service.api.requests import Message
from prefill_service.errors import InvalidRequestError, PromptTooLongError

ChatTurns = list[dict[str, str]]

FIT = -1
"""truncate_prompt_tokens that keeps as much of the prompt as fits."""


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
        if raw or record is None:
            return await self._text(self.tokenizer.as_text(prompt))
        text = self.tokenizer.as_text(prompt)
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
