"""Calls that a model writes in tags, as Qwen3-Coder does: read by character, told as JSON.

    <tool_call>
    <function=weather>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>

A value has no quotes: whether it is a text or JSON, the parameter's schema says. `tool_tag_rules` has their
grammar.
"""

import json
from collections.abc import Mapping
from typing import Any

from prefill_service.api.messages import Json
from prefill_service.api.tool_schemas import Schemas, UnkeptError, holds, kinds_of

FUNCTION, PARAMETER = "<function=", "<parameter="
END, VALUE_END = "</function>", "</parameter>"
LONGEST_TAG = 512
_WORDS = {"True": "true", "False": "false", "None": "null"}
"""As the template writes them, by Python's rules."""
_MOST_REFERENCES = 8
"""One behind another."""


class TaggedCall:
    """One call in tags. `fresh`: of its arguments as JSON, not taken yet: a parameter comes once it is whole.
    `schemas`: of functions' arguments. `back`: what came where a call left out its end."""

    def __init__(self, schemas: Mapping[str, Json]) -> None:
        self.name: str | None = None
        self.over = False
        self.fresh = self.back = ""
        self.written: list[str] = []
        self._schemas = schemas
        self._tag = ""
        self._key: str | None = None
        self._value: list[str] = []
        self._keys = set[str]()

    def take(self, char: str) -> None:
        self.written.append(char)
        if self._key is not None:
            self._value.append(char)
            if char == ">" and "".join(self._value[-len(VALUE_END) :]) == VALUE_END:
                self._end_value(self._key)
        else:
            self._tag += char
            if char == ">" or len(self._tag) > LONGEST_TAG:
                tag, self._tag = self._tag, ""
                self._take_tag(tag)

    def rest(self) -> str:
        """What of its arguments is not told yet, at its end."""
        return self.fresh

    def _take_tag(self, read: str) -> None:
        tag = read.strip()
        if self.name is None and tag.startswith(FUNCTION):
            self.name = tag[len(FUNCTION) : -1].strip()
        elif self.name is not None and tag.startswith(PARAMETER):
            self._key = tag[len(PARAMETER) : -1].strip()
        else:
            self.over = True
            if self.name is not None:
                self.fresh += "}" if self._keys else "{}"
                self.back = "" if tag == END else read

    def _end_value(self, key: str) -> None:
        text = "".join(self._value)[: -len(VALUE_END)].removeprefix("\n").removesuffix("\n")
        self._key, self._value = None, []
        if key in self._keys:  # told already
            return
        schema = self._schemas.get(self.name or "", {})
        try:
            told = Schemas(schema).property_of(key)
        except UnkeptError:
            properties = schema.get("properties")
            told = properties.get(key, {}) if isinstance(properties, dict) else {}
        self.fresh += ", " if self._keys else "{"
        self.fresh += f"{json.dumps(key, ensure_ascii=False)}: {as_json(text, told, schema)}"
        self._keys.add(key)


def as_json(text: str, schema: object, root: Json) -> str:
    """A parameter's value: JSON where its schema, a part of `root`, has a place for that, else a text."""
    kinds, values = _places(schema, root)
    if kinds != {"string"} and text not in values:
        written = _WORDS.get(text.strip(), text.strip())
        try:
            value = json.loads(written, parse_constant=_refuse)
        except (ValueError, RecursionError):
            value = ""
        if isinstance(value, str):
            pass
        elif not kinds or not kinds.isdisjoint(kinds_of(value)) or holds(values, value):
            return written
    return json.dumps(text, ensure_ascii=False)


def _places(schema: object, root: Json) -> tuple[set[str], list[object]]:
    """The types that a schema has a place for, or none where it has for all; and the values that it lists."""
    try:
        cases = Schemas(root).cases(schema)
    except UnkeptError:
        return _Kinds(root).of(schema), []
    values = [value for case in cases for value in case.get("enum", ())]
    named = [case.get("type", ()) for case in cases if "enum" not in case]
    kinds = {kind for value in values for kind in kinds_of(value)}.union(*named)
    return (kinds if all(named) else set()), values


def _refuse(constant: str) -> None:
    """NaN, which is no JSON."""
    raise ValueError(constant)


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
            return {*kinds_of(schema["const"])}
        if isinstance(values := schema.get("enum"), list):
            return {kind for value in values for kind in kinds_of(value)}
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
