"""What a client may say to a chat: messages, tools, and where the model goes on.

Templates and a grammar take tools' schemas as they come, so what is bounded here is how many there are, how
large and how deep.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import orjson
from pydantic import FailFast, Field, PlainValidator, WithJsonSchema, model_validator

from prefill_service.api.intake import Neutral, StrictModel, deeper, expected, refused

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_TOOL_CALLS = 128
MAX_SCHEMA_BYTES = 2**16
"""Of one tool's parameters, or of all variables for the chat template, as JSON."""
MAX_DEPTH = 32
"""Of objects and lists in each other, in such a value or in a call's arguments."""
MAX_VARIABLES = 16

Json = dict[str, object]

_NAME = r"^[A-Za-z0-9_.-]{1,128}$"
FunctionName = Annotated[str, Field(pattern=_NAME)]
CallId = Annotated[str, Field(min_length=1, max_length=256)]


class Forced(NamedTuple):
    """A `tool_choice` that names a function."""

    name: str


def _content(value: Any) -> str:
    """A message's text; text parts are joined as they stand, and `cache_control` changes no result."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise expected("a text or a list of text parts", value)
    texts = []
    for part in value:
        match part:
            case {"type": "text", "text": str(text), **more} if more.keys() <= {"cache_control"}:
                texts.append(text)
            case _:
                raise expected('{"type": "text", "text": …}, as only text is supported yet', part)
    return "".join(texts)


def _object(value: Any) -> Json:
    """An object of JSON within the bounds of what is passed on as it is."""
    if not isinstance(value, dict):
        raise expected("an object", value)
    if deeper(value, MAX_DEPTH):
        raise expected(f"up to {MAX_DEPTH} objects and lists in each other", value)
    if (size := len(orjson.dumps(value))) > MAX_SCHEMA_BYTES:
        raise expected(f"an object of up to {MAX_SCHEMA_BYTES} bytes of JSON", size)
    return value


def written_arguments(text: str) -> Json:
    """Of a call, as a model wrote them: a text of JSON. What was cut, is no object or too deep, is an empty
    one: templates and other protocols want an object."""
    try:
        parsed = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) and not deeper(parsed, MAX_DEPTH) else {}


def _arguments(value: Any) -> Json:
    """Whatever an answer had is taken back."""
    if not isinstance(value, str):
        raise expected("an object as a text of JSON", value)
    return written_arguments(value)


def _tool_choice(value: Any) -> str | Forced | None:
    match value:
        case None | "none" | "auto" | "required":
            return value
        case {"type": "function", "function": {"name": str(name), **more}, **beside} if not more | beside:
            return Forced(name)
    raise expected('"none", "auto", "required" or {"type": "function", "function": {"name": …}}', value)


Content = Annotated[
    str,
    PlainValidator(_content),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
    ),
]
Schema = Annotated[Json, PlainValidator(_object), WithJsonSchema({"type": "object"})]
Arguments = Annotated[Json, PlainValidator(_arguments), WithJsonSchema({"type": "string"})]
ToolChoice = Annotated[
    str | Forced | None,
    PlainValidator(_tool_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": ["none", "auto", "required"]},
                {"type": "object"},
                {"type": "null"},
            ]
        }
    ),
]


class Addressed(Protocol):
    """Whatever names a task, or the plain model."""

    @property
    def model(self) -> str | None: ...

    @property
    def task(self) -> str | None: ...

    @property
    def user(self) -> str | None: ...


class FunctionCall(StrictModel):
    place: ClassVar[str] = "messages.tool_calls.function."

    name: FunctionName
    """Of the function that was called."""
    arguments: Arguments
    """An object as a text of JSON, as the answer had it; what is none, or over 32 deep, the model sees as an
    empty one."""


class ToolCall(StrictModel):
    place: ClassVar[str] = "messages.tool_calls."
    ignored: ClassVar[frozenset[str]] = frozenset({"index"})

    id: CallId
    """As the answer had it; the tool's message names it."""
    type: Literal["function"] | None = None
    """`function`, and nothing else."""
    function: FunctionCall
    """What was called, and with what."""


class Message(StrictModel):
    """One turn. Fields that assistants' answers carry are accepted empty, as clients send answers back."""

    place: ClassVar[str] = "messages."
    unsupported: ClassVar[Neutral] = {
        "refusal": (),
        "function_call": (),
        "audio": (),
        "annotations": ([],),
        "reasoning_content": (),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """`developer` is a newer name of `system`; `tool` says what a called tool answered."""
    content: Content
    """A text, or text parts, which are joined as they stand; null for an assistant's empty turn."""
    tool_calls: Annotated[list[ToolCall] | None, FailFast(), Field(max_length=MAX_TOOL_CALLS)] = None
    """Of an assistant's turn: the calls that it was, up to 128."""
    tool_call_id: CallId | None = None
    """Of a tool's turn: the call that it answers."""
    name: Annotated[str, Field(max_length=128)] | None = None
    """Of a tool's turn: the function that was called."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_said(cls, data: Any) -> Any:
        """An assistant's turn may have no content, as it may have been all tool calls."""
        silent = isinstance(data, dict) and data.get("role") == "assistant" and data.get("content") is None
        return {**data, "content": ""} if silent else data

    @model_validator(mode="after")
    def _of_its_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise refused(
                "tool_calls", f"'tool_calls' are an assistant's, and this message is of {self.role!r}"
            )
        if self.tool_call_id is not None and self.role != "tool":
            raise refused("tool_call_id", f"'tool_call_id' is a tool's, and this message is of {self.role!r}")
        if self.name is not None and self.role != "tool":
            raise refused("name", f"'name' is not supported yet in a message of {self.role!r}")
        return self

    @property
    def template_role(self) -> str:
        """The role as chat templates know it."""
        return "system" if self.role == "developer" else self.role

    @property
    def about_tools(self) -> bool:
        return self.role == "tool" or bool(self.tool_calls)


class Function(StrictModel):
    place: ClassVar[str] = "tools.function."

    name: FunctionName
    """Letters, digits, `_`, `.` and `-`, up to 128 of them."""
    description: str | None = None
    """What it does, for the model."""
    parameters: Schema | None = None
    """A JSON schema of its arguments, up to 64 KiB and 32 deep. Absent: it takes none."""
    strict: bool | None = None
    """Whether a call's arguments must be as `parameters` says, also where the model chooses to call; they are
    where `tool_choice` makes it. Absent: no."""


class Tool(StrictModel):
    place: ClassVar[str] = "tools."

    type: Literal["function"]
    """`function`, and nothing else."""
    function: Function
    """What the model may call."""

    def as_data(self) -> Json:
        """As chat templates take it."""
        function = self.function
        named = {
            "name": function.name,
            "description": function.description,
            "parameters": function.parameters,
        }
        return {
            "type": "function",
            "function": {name: each for name, each in named.items() if each is not None},
        }


class Conversation(StrictModel):
    """What becomes a chat's prompt: of a request to answer it, or to tokenise it."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    """The conversation, up to 4096 messages; the user or a tool speaks last, or the assistant whose answer
    goes on (`continue_final_message`). Of a task that was not trained on the chat template: one user message,
    and system messages before it, whose texts are put in front of it, an empty line between, unless the task
    takes none."""
    tools: Annotated[list[Tool] | None, FailFast(), Field(max_length=MAX_TOOLS)] = None
    """Up to 128 functions that the model may call, if its chat template takes tools."""
    tool_choice: ToolChoice = None
    """`auto`: the model may call tools. `none`: it is told of none. `required`: the answer is a call of some;
    a function's name: of that. Absent: `auto`."""
    parallel_tool_calls: bool | None = None
    """False: of several calls in an answer only the first is given. Absent: true."""
    add_generation_prompt: bool | None = None
    """False: the chat template does not begin the assistant's turn. Absent: it does, unless that goes on."""
    continue_final_message: bool | None = None
    """Go on with the last message, which is the assistant's and has a text: the answer begins behind that. Of
    a task it follows the prompt without the adapter, as everything that is generated. Absent: no."""
    chat_template_kwargs: Schema | None = None
    """Values for variables that the model's chat template reads, as in `{"enable_thinking": false}`, up to
    16; others are refused by name. Absent: none."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's special tokens in front. Absent: as the model and the task were trained, so not
    around a chat template, which writes its own."""

    @property
    def offered(self) -> Sequence[Tool]:
        """What the model may call."""
        return () if self.tool_choice == "none" else self.tools or ()

    @property
    def forced(self) -> Sequence[Tool]:
        """Of these the answer must be a call; none if the model chooses."""
        if isinstance(self.tool_choice, Forced):
            return [tool for tool in self.offered if tool.function.name == self.tool_choice.name]
        return self.offered if self.tool_choice == "required" else ()

    @model_validator(mode="after")
    def _tools_agree(self) -> "Conversation":
        names = [tool.function.name for tool in self.tools or ()]
        if twice := next((name for at, name in enumerate(names) if name in names[:at]), None):
            raise refused("tools", f"'tools' has {twice!r} twice: give each function a name of its own")
        if self.tool_choice in (None, "none", "auto"):
            return self
        if not names:
            raise refused("tool_choice", "'tool_choice' needs 'tools': send some, or leave it out")
        if isinstance(self.tool_choice, Forced) and self.tool_choice.name not in names:
            raise refused(
                "tool_choice", f"'tool_choice' names {self.tool_choice.name!r}: expected one of 'tools'"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_go_on(self) -> "Conversation":
        if self.chat_template_kwargs and len(self.chat_template_kwargs) > MAX_VARIABLES:
            raise refused(
                "chat_template_kwargs", f"'chat_template_kwargs': expected up to {MAX_VARIABLES} names"
            )
        if not self.continue_final_message:
            return self
        if self.add_generation_prompt:
            raise refused(
                "add_generation_prompt",
                "'add_generation_prompt' begins a turn and 'continue_final_message' goes on with the last: "
                "send one of them",
            )
        last = self.messages[-1]
        if last.role != "assistant" or last.tool_calls or not last.content:
            raise refused(
                "messages",
                "'continue_final_message' goes on with the last message: expected a text of the assistant's",
            )
        return self
