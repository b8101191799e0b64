"""How a model writes calls of tools: found from its chat template, and what a grammar of it is.

    hermes    <tool_call>{"name": …, "arguments": {…}}</tool_call>, any number of them, text around (Hermes,
              Qwen 2.5 and 3)
    mistral   [TOOL_CALLS] [{"name": …, "arguments": {…}}, …]
    llama     {"name": …, "parameters": {…}} as the whole answer, several with ; between (Llama 3.1 to 3.3)

A template that writes them in another way (Qwen3-Coder's tags, Mistral's newer [ARGS]) is known by none.
"""

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefill_service.api.messages import Json, Tool


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls.

    `opening`: what begins them; empty: the answer itself does. `closing`: what ends them. `between`:
    characters that stand between calls. `arguments`: their key in the template. `skipped`: what may stand in
    front of the first call. `special`: those of these texts that may be special tokens of the vocabulary.
    """

    name: str
    opening: str
    closing: str
    between: str
    arguments: str
    skipped: str = ""

    @property
    def special(self) -> tuple[str, ...]:
        return tuple(text for text in (self.opening, self.closing, self.skipped) if len(text) > 1)

    def new_id(self) -> str:
        """Of a call; Mistral's templates want nine letters and digits."""
        return secrets.token_hex(5)[:9] if self is MISTRAL else f"call_{secrets.token_hex(12)}"


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", "", "arguments")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "]", "[,", "arguments")
LLAMA = ToolFormat("llama", "", "", ";,", "parameters", skipped="<|python_tag|>")


def tool_format(template: str) -> ToolFormat | None:
    """By the source of a chat template that takes tools."""
    if HERMES.opening in template:
        return None if "<function=" in template else HERMES
    if MISTRAL.opening in template:
        return None if "[ARGS]" in template else MISTRAL
    return LLAMA if "ipython" in template and '"parameters"' in template else None


def call_grammar(
    form: ToolFormat,
    tools: Sequence[Tool],
    token_id: Callable[[str], int | None],
    *,
    parallel: bool,
    loose: bool = False,
) -> str:
    """A grammar, in llguidance's Lark, of an answer that is a call of one of `tools` with arguments as its
    schema says, or several calls if `parallel`: for a `tool_choice` of `required`, or of the only tool given.

    `loose`: arguments are any object, for calls that the model may also leave.
    `token_id`: of a text that is one token of the vocabulary, which a model writes as that.
    """

    def written(text: str) -> str:
        known = token_id(text)
        return json.dumps(text) if known is None else f"<[{known}]>"

    call = f"call: %json {json.dumps(_any_call(form, tools, loose=loose))}"
    if form is MISTRAL:
        more = ' (", " call)*' if parallel else ""
        start = f'start: {written(form.opening)} "[" call{more} "]"'
    elif form is HERMES:
        one = f'{written(form.opening)} "\\n" call "\\n" {written(form.closing)}'
        more = f' ("\\n" {one})*' if parallel else ""
        start = f"start: {one}{more}"
    else:
        more = ' ("; " call)*' if parallel else ""
        start = f"start: call{more}"
    return f"{start}\n{call}\n"


_SPACING: Json = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As templates write calls, in llguidance's words: a model that may put spaces anywhere may never stop."""


def _any_call(form: ToolFormat, tools: Sequence[Tool], *, loose: bool) -> Json:
    places = [f"#/anyOf/{at}" for at in range(len(tools))] if len(tools) > 1 else ["#"]
    schemas = [_call(form, tool, place, loose=loose) for tool, place in zip(tools, places, strict=True)]
    any_of = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"x-guidance": _SPACING, **any_of}


def _call(form: ToolFormat, tool: Tool, place: str, *, loose: bool) -> Json:
    """`place`: of the schema in the whole."""
    given = tool.function.parameters
    if given is None:
        arguments: object = {"type": "object", "additionalProperties": False}
    else:
        arguments = {"type": "object"} if loose else _moved(given, f"{place}/properties/{form.arguments}")
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, form.arguments: arguments},
        "required": ["name", form.arguments],
        "additionalProperties": False,
    }


_DATA = ("const", "enum", "default", "examples")
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
"""Keywords of JSON schemas whose values are no schemas, or schemas by names."""


def _moved(schema: object, to: str) -> object:
    """A schema that stands at `to` within another: what it refers to from its root is found there."""
    if isinstance(schema, list):
        return [_moved(each, to) for each in schema]
    if not isinstance(schema, dict) or isinstance(schema.get("$id"), str):  # which is a root by itself
        return schema
    moved = dict[str, object]()
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[key] = to + value[1:]
        elif key in _NAMED and isinstance(value, dict):
            moved[key] = {name: _moved(child, to) for name, child in value.items()}
        else:
            moved[key] = value if key in _DATA else _moved(value, to)
    return moved
