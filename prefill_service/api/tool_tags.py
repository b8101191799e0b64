"""Calls that a model writes in tags, as Qwen3-Coder does: read by character, told as JSON; and their grammar.

    <tool_call>
    <function=weather>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>

A value has no quotes: whether it is a text or JSON, the parameter's schema says.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import orjson

from prad.core.rules import MOST_GRAMMAR
from prefill_service.api.messages import Json, Tool
from prefill_service.errors import InvalidRequestError

_FUNCTION, _PARAMETER = "<function=", "<parameter="
_END, _VALUE_END = "</function>", "</parameter>"
_LONGEST_TAG = 512
_WORDS = {"True": "true", "False": "false", "None": "null"}
"""As the template writes them, by Python's rules."""
_UNKEPT = ("pattern", "format", "minLength", "maxLength", "contentEncoding")
"""Of a text whose end is a tag: that cannot be held to as well."""
_MOST_REFERENCES = 8
"""One behind another."""
_KINDS: Mapping[type, tuple[str, ...]] = {
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    type(None): ("null",),
    str: ("string",),
    list: ("array",),
    dict: ("object",),
}


class TaggedCall:
    """One call in tags. `fresh`: of its arguments as JSON, not taken yet: a parameter comes once it is whole.
    `schemas`: of functions' arguments."""

    def __init__(self, schemas: Mapping[str, Json]) -> None:
        self.name: str | None = None
        self.over = False
        self.fresh = ""
        self.written: list[str] = []
        self._schemas = schemas
        self._tag = ""
        self._key: str | None = None
        self._value: list[str] = []
        self._parameters = 0

    def take(self, char: str) -> None:
        self.written.append(char)
        if self._key is not None:
            self._value.append(char)
            if char == ">" and "".join(self._value[-len(_VALUE_END) :]) == _VALUE_END:
                self._end_value(self._key)
        elif char != ">":
            self._tag += char
            self.over = len(self._tag) > _LONGEST_TAG
        else:
            tag, self._tag = self._tag.strip() + char, ""
            self._take_tag(tag)

    def rest(self) -> str:
        """What of its arguments is not told yet, at its end."""
        return self.fresh

    def _take_tag(self, tag: str) -> None:
        if self.name is None and tag.startswith(_FUNCTION):
            self.name = tag[len(_FUNCTION) : -1].strip()
        elif self.name is not None and tag.startswith(_PARAMETER):
            self._key = tag[len(_PARAMETER) : -1].strip()
        else:  # its end, or nothing that is known
            self.over = True
            if tag == _END:
                self.fresh += "}" if self._parameters else "{}"

    def _end_value(self, key: str) -> None:
        text = "".join(self._value)[: -len(_VALUE_END)].removeprefix("\n").removesuffix("\n")
        self._key, self._value = None, []
        schema = self._schemas.get(self.name or "", {})
        properties = schema.get("properties")
        told = properties.get(key, {}) if isinstance(properties, dict) else {}
        self.fresh += ", " if self._parameters else "{"
        self.fresh += f"{json.dumps(key, ensure_ascii=False)}: {as_json(text, told, schema)}"
        self._parameters += 1


def as_json(text: str, schema: object, root: Json) -> str:
    """A parameter's value: JSON where its schema, a part of `root`, has a place for that, else a text."""
    kinds = _Kinds(root).of(schema)
    if kinds != {"string"}:
        written = _WORDS.get(text.strip(), text.strip())
        try:
            value = orjson.loads(written)
        except orjson.JSONDecodeError:
            value = ""
        if not isinstance(value, str) and (not kinds or not kinds.isdisjoint(_kinds_of([value]))):
            return written
    return json.dumps(text, ensure_ascii=False)


def tagged_calls(tools: Sequence[Tool], *, loose: bool) -> Iterator[str]:
    """Rules `call` of a grammar in llguidance's Lark. loose: arguments of tools that are not strict are any.
    Raises InvalidRequestError for what cannot be kept to, or takes too much."""
    taken = 0
    for rule in _rules(tools, loose=loose):
        taken += len(rule)
        if taken > MOST_GRAMMAR:  # each parameter has all of $defs for itself
            raise _unkept(
                f"the grammar of these calls takes more than {MOST_GRAMMAR} characters: send fewer tools or "
                "parameters, or less in '$defs'"
            )
        yield rule


def _rules(tools: Sequence[Tool], *, loose: bool) -> Iterator[str]:
    yield f"call: {' | '.join(f'call{at}' for at in range(len(tools)))}"
    for at, tool in enumerate(tools):
        begin = json.dumps(f"{_FUNCTION}{tool.function.name}>\n")
        if loose and not tool.function.strict and tool.function.parameters is not None:
            yield f"call{at}: {begin} parameter* {json.dumps(_END)}"
            continue
        schema = tool.function.parameters or {}
        properties, required = _parameters(tool.function.name, schema)
        names = [(f"value{at}_{n}", key) for n, key in enumerate(properties)]
        parts = [
            f'({json.dumps(f"{_PARAMETER}{key}>")} {name} "\\n"){"" if key in required else "?"}'
            for name, key in names
        ]
        yield f"call{at}: {begin} {' '.join(parts)} {json.dumps(_END)}"
        kinds = _Kinds(schema)
        shared: Json = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        for name, key in names:
            told, where = properties[key], f"{tool.function.name!r}, parameter {key!r}"
            yield _value(name, told, kinds.of(told), shared, where)
    yield f'parameter: "{_PARAMETER}" /[^>\\n]+/ ">" anything "\\n"'
    yield f"anything[lazy]: /(?s:.*)/ {json.dumps(_VALUE_END)}"


def _parameters(function: str, schema: Json) -> tuple[Mapping[str, object], set[str]]:
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    named = isinstance(properties, dict) and not any(">" in key or "\n" in key for key in properties)
    if not named or not isinstance(required, list):
        raise _unkept(
            f"the schema of {function!r} cannot be kept to: expected 'properties' by names without > and "
            "line ends, and 'required', a list of such"
        )
    assert isinstance(properties, dict)
    return properties, {key for key in required if isinstance(key, str)}


def _value(name: str, schema: object, kinds: set[str], shared: Json, where: str) -> str:
    """The rule of a parameter's value, with the tag that ends it. shared: what it may refer to."""
    told = schema if isinstance(schema, dict) else {}
    if texts := _texts(told):
        return f'{name}: "\\n" ({" | ".join(map(json.dumps, texts))}) "\\n{_VALUE_END}"'
    if "string" not in kinds and kinds:
        return f'{name}: "\\n" %json {json.dumps({**shared, **told})} "\\n{_VALUE_END}"'
    if unkept := next((word for word in _UNKEPT if word in told), None):
        raise _unkept(
            f"{unkept!r} of {where}, cannot be kept to: this model writes texts without quotes, so that none "
            "is known to end but by its tag; leave it out, or 'strict'"
        )
    return f"{name}[lazy]: /(?s:.*)/ {json.dumps(_VALUE_END)}"


def _unkept(why: str) -> InvalidRequestError:
    return InvalidRequestError(f"'tools': {why}", param="tools", code="invalid_grammar")


def _texts(schema: Json) -> list[str]:
    """Of a schema that is one of some texts."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    listed = isinstance(values, list) and all(isinstance(value, str) and value for value in values)
    return list(values) if listed and isinstance(values, list) else []


class _Kinds:
    """JSON types that schemas of one `root` have a place for; none: whatever it is. So are a type that is no
    text, and references that lead back to themselves. What is referred to is looked at once."""

    def __init__(self, root: Json) -> None:
        self._root = root
        self._referred: dict[str, set[str]] = {}

    def of(self, schema: object, references: int = 0) -> set[str]:
        """references: that led to it."""
        if not isinstance(schema, dict):
            return set()
        if isinstance(named := schema.get("type"), str | list):
            return {each for each in ([named] if isinstance(named, str) else named) if isinstance(each, str)}
        if "const" in schema:
            return _kinds_of([schema["const"]])
        if isinstance(values := schema.get("enum"), list):
            return _kinds_of(values)
        for word in ("anyOf", "oneOf", "allOf"):
            if isinstance(several := schema.get(word), list):
                each = [self.of(one, references) for one in several]
                return set().union(*each) if all(each) else set()
        if (
            isinstance(to := schema.get("$ref"), str)
            and to.startswith("#/")
            and references < _MOST_REFERENCES
        ):
            if to not in self._referred:
                self._referred[to] = set()  # until it is known
                self._referred[to] = self.of(self._found(to), references + 1)
            return self._referred[to]
        return set()

    def _found(self, to: str) -> object:
        found: Any = self._root
        for step in to[2:].split("/"):
            found = found.get(step) if isinstance(found, dict) else None
        return found


def _kinds_of(values: Iterable[object]) -> set[str]:
    return {kind for type_ in set(map(type, values)) for kind in _KINDS.get(type_, ())}
