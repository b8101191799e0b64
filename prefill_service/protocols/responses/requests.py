"""What a client may send to `/v1/responses`, and the chat that it means."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema

from prefill_service.api.intake import Neutral, StrictModel, TokenCount, expected
from prefill_service.api.messages import MAX_MESSAGES
from prefill_service.api.problems import shown
from prefill_service.api.requests import ChatRequest
from prefill_service.errors import InvalidRequestError
from prefill_service.protocols.chat import OTHER_ANSWERS, Json, Origin, chat_request, passed

_NAMES = {"max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
_TAKEN = OTHER_ANSWERS | {"max_tokens", "max_completion_tokens", "response_format"}


def _items(value: Any) -> str | list[Json]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise expected("a text or a list of items", value)
    if len(value) > MAX_MESSAGES:
        raise expected(f"up to {MAX_MESSAGES} items", len(value))
    return value


Items = Annotated[
    str | list[Json],
    PlainValidator(_items),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]


class TextFormat(StrictModel):
    place: ClassVar[str] = "text.format."

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None
    strict: bool | None = None

    def as_chat(self) -> Json:
        more = {
            "name": self.name,
            "description": self.description,
            "schema": self.schema_,
            "strict": self.strict,
        }
        sent = {name: value for name, value in more.items() if value is not None}
        return {"type": self.type} | ({"json_schema": sent} if sent or self.type == "json_schema" else {})


class Text(StrictModel):
    place: ClassVar[str] = "text."
    unsupported: ClassVar[Neutral] = {"verbosity": ("medium",)}

    format: TextFormat | None = None
    """What the text must be: anything, JSON, or JSON of a schema."""


class ResponsesTool(StrictModel):
    place: ClassVar[str] = "tools."

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None

    def as_chat(self) -> Json:
        function = self.model_dump(exclude={"type"}, exclude_none=True)
        return {"type": "function", "function": function}


class ResponsesRequest(StrictModel):
    """The body of `/v1/responses`. Beside these it may hold fields of a chat by their names, as `seed`."""

    model_config = ConfigDict(extra="allow")
    unsupported: ClassVar[Neutral] = {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "prompt": (),
        "reasoning": ({}, {"effort": None}, {"effort": None, "summary": None}),
        "service_tier": ("auto", "default"),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"safety_identifier", "prompt_cache_key", "prompt_cache_retention", "stream_options"}
    )

    model: str | None = None
    """The plain model's id, or a task, which may name a version as in `e2e@3`, or an alias, `e2e@canary`; the
    plain model if absent."""
    input: Items
    """What the user says, or items: messages, calls of functions and their outputs."""
    instructions: str | None = None
    """A system message before all; not carried over by `previous_response_id`."""
    previous_response_id: str | None = None
    """The answer that the conversation goes on from, if it is still kept."""
    store: bool | None = None
    """Keep the answer for `previous_response_id`, in memory, as long as there is room. Absent: yes."""
    max_output_tokens: TokenCount | None = None
    """The longest output. Absent: the task's own, else 1024, or what fits."""
    stream: bool | None = None
    """Send the answer as events while it is made. Absent: no."""
    text: Text | None = None
    """What the text must be."""
    tools: list[ResponsesTool] | None = None
    """Functions that the model may ask for."""
    tool_choice: Literal["auto", "none", "required"] | Json | None = None
    """Whether it must, and which."""
    parallel_tool_calls: bool | None = None
    """Whether it may ask for several at once."""
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    """Up to 16 texts of the client's own, which the answer repeats."""

    def as_chat(self, earlier: Sequence[Json], noted: set[str] | None = None) -> ChatRequest:
        """`earlier`: the conversation that it goes on from; `noted`: where unknown fields are; None: they are
        refused. Raises InvalidRequestError."""
        fields: Json = {"model": self.model, "stream": bool(self.stream)}
        fields |= passed(self.model_extra, _TAKEN, noted)
        if self.max_output_tokens is not None:
            fields["max_completion_tokens"] = self.max_output_tokens
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = self.text.format.as_chat()
        if self.tools or self.tool_choice not in (None, "auto", "none"):  # without tools the chat refuses it
            more = {"tool_choice": self._tool_choice(), "parallel_tool_calls": self.parallel_tool_calls}
            fields |= {"tools": [tool.as_chat() for tool in self.tools or ()]}
            fields |= {name: value for name, value in more.items() if value is not None}
        return chat_request(self._turns(earlier), fields, _NAMES, noted)

    def said(self) -> list[Json]:
        """The messages that it adds to the conversation."""
        return [message for _, message in self._new_turns()]

    def _turns(self, earlier: Sequence[Json]) -> Iterator[tuple[Origin, Json]]:
        if self.instructions:
            yield ("instructions",), {"role": "system", "content": self.instructions}
        for message in earlier:
            yield ("previous_response_id",), message
        yield from self._new_turns()

    def _new_turns(self) -> Iterator[tuple[Origin, Json]]:
        if isinstance(self.input, str):
            yield ("input",), {"role": "user", "content": self.input}
            return
        calls: list[Json] = []
        for number, item in enumerate(self.input):
            place: Origin = ("input", number)
            if item.get("type") == "function_call":
                calls.append(_call(item, place))
                continue
            if calls:
                yield ("input", number - 1), {"role": "assistant", "content": None, "tool_calls": calls}
                calls = []
            yield place, _message(item, place)
        if calls:
            yield ("input", len(self.input) - 1), {"role": "assistant", "content": None, "tool_calls": calls}

    def _tool_choice(self) -> str | Json | None:
        if not isinstance(self.tool_choice, dict):
            return self.tool_choice
        match self.tool_choice:
            case {"type": "function", "name": str(name), **more} if not more:
                return {"type": "function", "function": {"name": name}}
        raise InvalidRequestError(
            '\'tool_choice\': expected auto, none, required, or {"type": "function", "name": …}',
            param="tool_choice",
        )


def _call(item: Json, place: Origin) -> Json:
    match item:
        case {"call_id": str(name), "name": str(function), "arguments": str(arguments)}:
            return {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}
    raise _wrong("a function_call with call_id, name and arguments, all texts", item, place)


def _message(item: Json, place: Origin) -> Json:
    match item:
        case {"type": "function_call_output", "call_id": str(name), "output": output}:
            return {"role": "tool", "tool_call_id": name, "content": _text(output, (*place, "output"))}
        case {"role": "user" | "assistant" | "system" | "developer" as role, "content": content}:
            if item.get("type", "message") == "message":
                return {"role": role, "content": _text(content, (*place, "content"))}
    raise _wrong("a message with role and content, a function_call or a function_call_output", item, place)


def _text(content: Any, place: Origin) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content if isinstance(content, list) else [content]):
        match part:
            case {"type": "input_text" | "output_text", "text": str(text)}:
                texts.append(text)
            case _:
                raise _wrong("a text, or parts of type input_text or output_text", part, (*place, number))
    return "".join(texts)


def _wrong(what: str, got: Any, place: Origin) -> InvalidRequestError:
    kind, where = got.get("type") if isinstance(got, dict) else got, ".".join(map(str, place))
    return InvalidRequestError(f"'{where}': expected {what}, got one of type {shown(kind)}", param=where)
