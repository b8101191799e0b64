"""From a conversation to the ids that are computed: what a task, or the model, takes of it.

    task                     template(the user message), as such an adapter has only ever seen single prompts.
                             Texts of system messages go in front of the user's, an empty line between;
                             earlier turns, tools and the chat template's variables are refused
    task trained on          the model's chat template over all messages, the last user message inside the
    the chat template        artefact's template
    plain model              the model's chat template over all messages

A task whose artefact says `"system": "refuse"` gets no system message at all. Nothing is left out in silence:
what has no place is refused by name.

An answer that goes on (`continue_final_message`) is for a task what training made of it, " " + text without
the adapter, behind the prompt; for the plain model it is the last turn of the chat template, left open.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

import orjson

from prad.artefact import AdapterRecord
from prad.lm import TextStream, Tokenizer
from prefill_service.api.messages import Conversation, Forced, Json, Message
from prefill_service.api.problems import shown
from prefill_service.api.rules import Constraint
from prefill_service.api.text import ID_CHARACTERS, PromptEncoder, Template
from prefill_service.api.tool_formats import ToolFormat, call_grammar, tool_format
from prefill_service.errors import InvalidRequestError

TOKENS_BEHIND = 8
"""That a text is decoded behind, at most."""

Ids = tuple[int, ...]
ChatT = TypeVar("ChatT", bound=Conversation)


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """`continuation`: of what stands behind the prompt, without the adapter."""

    prompt: Ids
    continuation: Ids = ()


class ChatEncoder(PromptEncoder):
    """Tokenises conversations, too."""

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes calls; None if it was told of no tools, or in no way that is known here."""
        if not self._tokenizer.has_chat_template or not self._tokenizer.chat_template.takes_tools:
            return None
        return tool_format(self._tokenizer.chat_template.source)

    def held_to_calls(self, chat: ChatT, said: Constraint | None) -> ChatT:
        """With the grammar of a call, where its `tool_choice` makes the model call. Where it may: with one of
        text and calls if tools are strict, or of calls beside what the request has `said` the text is.
        Raises InvalidRequestError."""
        form, forced = self.tool_format, chat.forced
        strict = {at: tool for at, tool in enumerate(chat.offered) if tool in forced or tool.function.strict}
        if form is None or not (strict or (said is not None and chat.offered)):
            return chat
        several = chat.parallel_tool_calls is not False and not isinstance(chat.tool_choice, Forced)
        grammar = partial(call_grammar, form, token_id=self._tokenizer.token_id, parallel=several)
        schemas = [
            (f"tools.{at}.function.parameters", tool.function.parameters or {}) for at, tool in strict.items()
        ]
        if not forced and said is not None:
            beside = replace(said, calls=grammar(chat.offered, loose=True), schemas=schemas)
            return chat.model_copy(update={said.field: beside})
        if said is not None:
            raise InvalidRequestError(
                f"'{said.field}' says what the answer's text is, and 'tool_choice' makes it a call: send one "
                "of them",
                param="tool_choice",
            )
        places = [f"tools.{at}" for at, tool in enumerate(chat.offered) if tool in forced]
        if forced:
            source = grammar(forced, places=places)
        else:
            marks = self._tokenizer.special_ids - self._tokenizer.end_ids - self.shown_in_calls(chat)
            source = grammar(chat.offered, loose=True, free=True, marks=marks)
        held = Constraint("grammar", source, "tool_choice" if forced else "tools", schemas=schemas)
        return chat.model_copy(update={"guided_grammar": held})

    def shown_in_calls(self, chat: Conversation) -> frozenset[int]:
        """Special tokens that calls of its tools are known by, and that must not be left out of the text."""
        form = self.tool_format if chat.offered else None
        ids = () if form is None else map(self._tokenizer.token_id, form.special)
        return frozenset(token for token in ids if token is not None) & self._tokenizer.special_ids

    async def text_of(self, ids: Sequence[int]) -> str:
        """Of the vocabulary's ids, special tokens included. Raises InvalidRequestError, OverloadedError."""
        self._require_known(ids, "tokens")
        weight = ID_CHARACTERS * len(ids)
        with self._room(weight):
            work = partial(self._tokenizer.decode, ids, self._tokenizer.special_ids)
            return await self._computed(weight, work)

    async def chat(
        self, record: AdapterRecord | None, chat: Conversation, template: Template, *, cut: bool
    ) -> EncodedChat:
        """`record` None: the plain model; `template`: of `chat_template`; `cut`: what does not fit will be.
        Raises InvalidRequestError, OverloadedError."""
        given = chat.messages[-1].content if chat.continue_final_message else None
        messages = chat.messages if given is None else chat.messages[:-1]
        _require_turn(messages)
        chars = sum(_size(message) for message in chat.messages)
        chars += sum(len(orjson.dumps(tool.as_data())) for tool in chat.offered)
        if not cut:
            self._require_short(chars, "messages")
        if record is not None:
            _require_taken(record, messages)
        if record is not None and not record.chat_template:
            _require_single(chat, messages)
            encode = self._single(record if template == "task" else None, chat, messages)
        else:
            self._require_taken_by_template(chat)
            encode = self._turns(record, chat, messages, wrap=template == "task")
        with self._room(chars):
            prompt = await self._encoded(chars, encode)
            if given is None or record is None:
                return EncodedChat(prompt)
            behind = " " + self._tokenizer.as_text(given)
            return EncodedChat(
                prompt,
                await self._encoded(len(behind), lambda: self._tokenizer.encode_continuation(behind)),
            )

    def _single(
        self, record: AdapterRecord | None, chat: Conversation, messages: Sequence[Message]
    ) -> Callable[[], list[int]]:
        texts = [message.content for message in messages if message.content]

        def encode() -> list[int]:
            text = self._tokenizer.as_text("\n\n".join(texts))
            return self._wrapped(record, text, "messages", chat.add_special_tokens)

        return encode

    def _turns(
        self,
        record: AdapterRecord | None,
        chat: Conversation,
        messages: Sequence[Message],
        *,
        wrap: bool,
    ) -> Callable[[], list[int]]:
        """`messages`: of the chat but for what goes on."""
        last_user = max((at for at, m in enumerate(messages) if m.role == "user"), default=None)
        if record is not None and wrap and last_user is None:
            raise InvalidRequestError("this task needs a user message, and none came", param="messages")
        goes_on = bool(chat.continue_final_message)
        open_turn = record is None and goes_on

        def encode() -> list[int]:
            turns = [self._turn(message) for message in (chat.messages if open_turn else messages)]
            if record is not None and wrap and last_user is not None:
                turns[last_user]["content"] = record.wrap(str(turns[last_user]["content"]))
            data = self._tokenizer.as_data
            return self._in_chat_template(
                "messages",
                lambda: self._tokenizer.encode_chat(
                    turns,
                    [_as_object(data(tool.as_data())) for tool in chat.offered],
                    add_generation_prompt=chat.add_generation_prompt is not False or goes_on,
                    continued=open_turn,
                    variables=_as_object(data(chat.chat_template_kwargs or {})),
                    add_special_tokens=bool(chat.add_special_tokens),
                ),
            )

        return encode

    def _turn(self, message: Message) -> Json:
        """As chat templates take it; what a message does not have is no key."""
        text = self._tokenizer.as_text
        turn: Json = {"role": message.template_role, "content": text(message.content)}
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": text(call.id),
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": self._tokenizer.as_data(call.function.arguments),
                    },
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = text(message.tool_call_id)
        if message.name is not None:
            turn["name"] = text(message.name)
        return turn

    def _require_taken_by_template(self, chat: Conversation) -> None:
        """That the chat template takes what it is given, and that calls in an answer would be seen."""
        if not self._tokenizer.has_chat_template:
            return  # refused where it is used
        template = self._tokenizer.chat_template
        if (chat.offered or any(m.about_tools for m in chat.messages)) and not template.takes_tools:
            raise InvalidRequestError(
                "this model's chat template takes no tools, so it would never see them: leave out 'tools', "
                "'tool_calls' and messages of role 'tool', or serve a model whose template has them",
                param="tools" if chat.offered else "messages",
                code="tools_not_supported",
            )
        if chat.offered and self.tool_format is None:
            raise InvalidRequestError(
                "how this model writes calls of tools is not known here, so that none would be found in its "
                'answer: send "tool_choice": "none", or serve a model that writes them as Qwen, Hermes, '
                "Llama 3 or Mistral do",
                param="tools",
                code="tools_not_supported",
            )
        if unknown := sorted((chat.chat_template_kwargs or {}).keys() - template.variables):
            known = ", ".join(sorted(template.variables)) or "none"
            raise InvalidRequestError(
                f"this model's chat template does not read {shown(unknown[0])}: it reads {known}",
                param="chat_template_kwargs",
            )


def stream_behind(tokenizer: Tokenizer, ids: Sequence[int], shown: frozenset[int]) -> TextStream:
    """For an answer that goes on with a text, which ends with these ids: its first space belongs to it."""
    stream = tokenizer.stream(shown)
    for token in ids[-TOKENS_BEHIND:]:
        if token >= 0:
            stream.push(token)
    stream.flush()
    return stream


def _as_object(data: object) -> Json:
    assert isinstance(data, dict)
    return data


def _size(message: Message) -> int:
    calls = message.tool_calls or ()
    return len(message.content) + sum(len(orjson.dumps(call.function.arguments)) for call in calls)


def _require_turn(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidRequestError(
            "'continue_final_message' needs the message that is answered before the last one",
            param="messages",
        )
    if (role := messages[-1].role) not in ("user", "tool"):
        raise InvalidRequestError(
            f"the last message must be the user's or a tool's, got role {role!r}: to go on with an "
            "assistant's, send 'continue_final_message': true",
            param="messages",
        )


def _require_taken(record: AdapterRecord, messages: Sequence[Message]) -> None:
    if record.system == "refuse" and any(message.template_role == "system" for message in messages):
        raise InvalidRequestError(
            "this task takes no system message, as its artefact says: leave it out, or send its text in the "
            "user message",
            param="messages",
            code="system_not_supported",
        )


def _require_single(chat: Conversation, messages: Sequence[Message]) -> None:
    """That there is a place for all of it in a single prompt."""
    *before, last = messages
    if last.role != "user" or any(message.template_role != "system" for message in before):
        roles = ", ".join(message.role for message in messages[:8]) + (", …" if len(messages) > 8 else "")
        raise InvalidRequestError(
            "this task's adapter was trained on single prompts and cannot see a conversation: expected one "
            f"user message, and system messages before it, got {len(messages)} messages ({roles}); a task "
            "that is trained on the chat template takes them",
            param="messages",
            code="conversation_not_supported",
        )
    if not last.content:
        raise InvalidRequestError("the message is empty", param="messages")
    wanted = {
        "tools": bool(chat.offered),
        "chat_template_kwargs": bool(chat.chat_template_kwargs),
        "add_generation_prompt": chat.add_generation_prompt is False and not chat.continue_final_message,
    }
    if name := next((name for name, is_wanted in wanted.items() if is_wanted), None):
        raise InvalidRequestError(
            f"this task was not trained on the chat template: there is no place for '{name}', leave it out",
            param=name,
            code="tools_not_supported" if name == "tools" else None,
        )
