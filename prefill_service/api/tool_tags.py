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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

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
    kinds = _kinds(schema, root)
    if kinds != {"string"}:
        written = _WORDS.get(text.strip(), text.strip())
        try:
            value = orjson.loads(written)
        except orjson.JSONDecodeError:
            value = ""
        if not isinstance(value, str) and (not kinds or not kinds.isdisjoint(_kinds_of(value))):
            return written
    return json.dumps(text, ensure_ascii=False)


def tagged_calls(tools: Sequence[Tool], *, loose: bool) -> Iterator[str]:
    """Rules `call` of a grammar in llguidance's Lark. loose: arguments of tools that are not strict are any.
    Raises InvalidRequestError for what cannot be kept to."""
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
        for name, key in names:
            yield _value(name, properties[key], schema, f"{tool.function.name!r}, parameter {key!r}")
    yield f'parameter: "{_PARAMETER}" /[^>\\n]+/ ">" anything "\\n"'
    yield f"anything[lazy]: /(?s:.*)/ {json.dumps(_VALUE_END)}"


def _parameters(function: str, schema: Json) -> tuple[Mapping[str, object], Sequence[object]]:
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    named = isinstance(properties, dict) and not any(">" in key or "\n" in key for key in properties)
    if not named or not isinstance(required, list):
        raise InvalidRequestError(
            f"'tools': the schema of {function!r} cannot be kept to: expected 'properties' by names without "
            "> and line ends, and 'required', a list of such",
            param="tools",
            code="invalid_grammar",
        )
    assert isinstance(properties, dict)
    return properties, required


def _value(name: str, schema: object, root: Json, where: str) -> str:
    """The rule of a parameter's value, with the tag that ends it."""
    kinds = _kinds(schema, root)
    told = schema if isinstance(schema, dict) else {}
    if texts := _texts(told):
        return f'{name}: "\\n" ({" | ".join(map(json.dumps, texts))}) "\\n{_VALUE_END}"'
    if "string" not in kinds and kinds:
        shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
        return f'{name}: "\\n" %json {json.dumps({**shared, **told})} "\\n{_VALUE_END}"'
    if unkept := next((word for word in _UNKEPT if word in told), None):
        raise InvalidRequestError(
            f"'tools': {unkept!r} of {where}, cannot be kept to: this model writes texts without quotes, so "
            "that none is known to end but by its tag; leave it out, or 'strict'",
            param="tools",
            code="invalid_grammar",
        )
    return f"{name}[lazy]: /(?s:.*)/ {json.dumps(_VALUE_END)}"


def _texts(schema: Json) -> list[str]:
    """Of a schema that is one of some texts."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    listed = isinstance(values, list) and all(isinstance(value, str) and value for value in values)
    return list(values) if listed and isinstance(values, list) else []


def _kinds(schema: object, root: Json, references: int = 0) -> set[str]:
    """JSON types that a schema has a place for; none: whatever it is."""
    if not isinstance(schema, dict):
        return set()
    if isinstance(named := schema.get("type"), str | list):
        return {named} if isinstance(named, str) else set(named)
    if "const" in schema or isinstance(schema.get("enum"), list):
        return {kind for value in schema.get("enum", [schema.get("const")]) for kind in _kinds_of(value)}
    for word in ("anyOf", "oneOf", "allOf"):
        if isinstance(several := schema.get(word), list):
            each = [_kinds(one, root, references) for one in several]
            return set().union(*each) if all(each) else set()
    if isinstance(to := schema.get("$ref"), str) and to.startswith("#/") and references < _MOST_REFERENCES:
        found: Any = root
        for step in to[2:].split("/"):
            found = found.get(step) if isinstance(found, dict) else None
        return _kinds(found, root, references + 1)
    return set()


def _kinds_of(value: object) -> set[str]:
    match value:
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number"}
        case None:
            return {"null"}
        case str():
            return {"string"}
    return {"array"} if isinstance(value, list) else {"object"}
