"""How a model writes calls of tools: found from its chat template, and what a grammar of it is.

    hermes    <tool_call>{"name": …, "arguments": {…}}</tool_call>, any number of them, text around (Hermes,
              Qwen 2.5 and 3)
    mistral   [TOOL_CALLS] [{"name": …, "arguments": {…}}, …]
    args      [TOOL_CALLS]name[ARGS]{…}, any number of them, text in front (Mistral since 2025)
    tags      <tool_call><function=…><parameter=…>…</parameter></function></tool_call> (Qwen3-Coder)
    llama     {"name": …, "parameters": {…}} as the whole answer, several with ; between (Llama 3.1 to 3.3)

A template that writes them in another way is known by none.
"""

import json
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from prefill_service.api.messages import Json, Tool
from prefill_service.api.tool_schemas import referring
from prefill_service.api.tool_tag_rules import tagged_calls


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls.

    `opening`: what begins them; empty: the answer itself does. `closing`: what ends them. `between`:
    characters that stand between calls. `arguments`: their key in the template. `skipped`: what may stand in
    front of the first call. `middle`: what stands between a name and its arguments, where that is all of a
    call. `special`: those of these texts that may be special tokens of the vocabulary.
    """

    name: str
    opening: str
    closing: str
    between: str
    arguments: str
    skipped: str = ""
    middle: str = ""

    @property
    def special(self) -> tuple[str, ...]:
        texts = (self.opening, self.closing, self.skipped, self.middle)
        return tuple(text for text in texts if len(text) > 1)

    def new_id(self) -> str:
        """Of a call; Mistral's templates want nine letters and digits."""
        return (
            secrets.token_hex(5)[:9] if self.opening == MISTRAL.opening else f"call_{secrets.token_hex(12)}"
        )


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", "", "arguments")
TAGS = ToolFormat("tags", HERMES.opening, HERMES.closing, "", "")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "]", "[,", "arguments")
ARGS = ToolFormat("args", MISTRAL.opening, "", "", "arguments", middle="[ARGS]")
LLAMA = ToolFormat("llama", "", "", ";,", "parameters", skipped="<|python_tag|>")


def tool_format(template: str) -> ToolFormat | None:
    """By the source of a chat template that takes tools."""
    if HERMES.opening in template:
        return TAGS if "<function=" in template else HERMES
    if MISTRAL.opening in template:
        return ARGS if ARGS.middle in template else MISTRAL
    return LLAMA if "ipython" in template and '"parameters"' in template else None


def call_grammar(
    form: ToolFormat,
    tools: Sequence[Tool],
    token_id: Callable[[str], int | None],
    *,
    parallel: bool,
    loose: bool = False,
    free: bool = False,
    places: Sequence[str] = (),
    marks: Collection[int] = (),
) -> str:
    """A grammar, in llguidance's Lark, of an answer that is a call of one of `tools` with arguments as its
    schema says, or several calls if `parallel`: for a `tool_choice` of `required`, or of the only tool given.

    `loose`: arguments of tools that are not strict are any object, for calls that the model may also leave.
    `free`: it may leave them for any text that is read as none, or go on to them behind such a text.
    `places`: of the tools in the request, as in `tools.0`. `token_id`: of a text that is one token of the
    vocabulary, which a model writes as that. `marks`: special tokens that may stand in text around calls, as
    those that thinking begins and ends with.
    """

    def written(text: str) -> str:
        known = token_id(text)
        return json.dumps(text) if known is None else f"<[{known}]>"

    opening = "opened" if free and form.opening else written(form.opening)
    if form.middle:
        name = f"call: {' | '.join(f'call{at}' for at in range(len(tools)))}"
        rules = [name, *_named_calls(tools, written(form.middle), loose=loose)]
    elif form is TAGS:
        rules = list(tagged_calls(tools, loose=loose, places=places))
    else:
        rules = [f"call: %json {json.dumps(_any_call(form, tools, loose=loose))}"]
    if form is MISTRAL:
        more = ' (", " call)*' if parallel else ""
        calls = f'{opening} "[" call{more} "]"'
        start = f"words | {calls}" if free else calls
    elif form.opening:
        one = f'{opening} "\\n" call "\\n" {written(form.closing)}' if form.closing else f"{opening} call"
        between = '"\\n" ' if form.closing else ""
        start = f"{one} ({between}{one})*" if parallel else one
        if free:
            start = f"({one})* words" if parallel else f"words | {one}"
    else:
        start = 'call ("; " call)*' if parallel else "call"
        if free:
            start = f"TEXT | ({written(form.skipped)})? {start}"
    if free:
        rules += _free_text(form, token_id(form.opening), marks)
    return "\n".join([f"start: {start}", *rules, ""])


def _free_text(form: ToolFormat, opening_id: int | None, marks: Collection[int]) -> list[str]:
    """What is read as no call; what opens one ends it, however that is spelt. Where the answer itself may be
    a call, one that begins like an object, or like what is skipped, has to be one."""
    if not form.opening:
        space = r"\s\x1c-\x1f;,"
        return [rf"TEXT: /[{space}]*(([^{space}{{<]|<[^|])(?s:.*)|<)?/"]
    spelt = f"spelt[lazy]: TEXT {json.dumps(form.opening)}"
    opened = "spelt" if opening_id is None else f"(spelt | TEXT <[{opening_id}]>)"
    marked = f"(TEXT <[{','.join(map(str, sorted(marks)))}]>)* " if marks else ""
    return [f"opened: {marked}{opened}", spelt, f"words: {marked}TEXT", "TEXT: /(?s:.*)/"]


_SPACING: Json = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As templates write calls, in llguidance's words: a model that may put spaces anywhere may never stop."""


def _any_call(form: ToolFormat, tools: Sequence[Tool], *, loose: bool) -> Json:
    places = [f"#/anyOf/{at}" for at in range(len(tools))] if len(tools) > 1 else ["#"]
    schemas = [_call(form, tool, place, loose=loose) for tool, place in zip(tools, places, strict=True)]
    any_of = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"x-guidance": _SPACING, **any_of}


def _named_calls(tools: Sequence[Tool], middle: str, *, loose: bool) -> Iterator[str]:
    for at, tool in enumerate(tools):
        schema = {"x-guidance": _SPACING, **_arguments(tool, loose=loose)}
        yield f"call{at}: {json.dumps(tool.function.name)} {middle} %json {json.dumps(schema)}"


def _call(form: ToolFormat, tool: Tool, place: str, *, loose: bool) -> Json:
    """`place`: of the schema in the whole."""
    to = f"{place}/properties/{form.arguments}"
    arguments = referring(_arguments(tool, loose=loose), lambda name: to + name[1:])
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, form.arguments: arguments},
        "required": ["name", form.arguments],
        "additionalProperties": False,
    }


def _arguments(tool: Tool, *, loose: bool) -> Json:
    given = tool.function.parameters
    if given is None:
        return {"type": "object", "additionalProperties": False}
    return {"type": "object"} if loose and not tool.function.strict else given
