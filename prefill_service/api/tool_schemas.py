"""Schemas of tools' arguments without what combines and refers: for what a grammar of JSON has no words."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import unquote

from prad.core.errors import PradError
from prefill_service.api.messages import Json

_DATA = ("const", "enum", "default", "examples")
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
"""Keywords of JSON schemas whose values are no schemas, or schemas by names."""
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf", "$defs", "definitions", "$id", "$schema")
_NOTES = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment")
_MOST_CASES, _DEEPEST, _MOST_VALUES = 256, 64, 1 << 16


Case = dict[str, Any]
"""A schema without what combines and refers."""


class UnkeptError(PradError):
    """A schema that cannot be kept to; why, as a sentence about it."""


class Schemas:
    """Schemas within one `root`. What is referred to is looked at once, and of values that are listed only so
    many altogether: whoever asks waits meanwhile."""

    def __init__(self, root: Json) -> None:
        self._root = root
        self._looked = 0
        self._referred: dict[str, list[Case] | None] = {}

    def cases(self, schema: object, depth: int = 0) -> list[Case]:
        """Schemas one of which holds where `schema` does: in each `type` is a list, `const` an `enum`, of
        those values that its `type` has a place for, and nothing combines or refers, but for an `allOf` of
        what could not be merged. Raises UnkeptError."""
        if isinstance(schema, bool):
            return [{}] if schema else []
        if not isinstance(schema, dict):
            raise UnkeptError("expected an object")
        if depth > _DEEPEST:
            raise UnkeptError("it refers on too often")
        own = _plain({key: value for key, value in schema.items() if key not in _COMBINING})
        found = [] if own is None else [own]
        if "$ref" in schema:
            found = _each(found, self._referred_by(schema["$ref"], depth + 1))
        for one in _listed(schema, "allOf"):
            found = _each(found, self.cases(one, depth + 1))
        for word in ("anyOf", "oneOf"):
            if word in schema:
                options = (self.cases(one, depth + 1) for one in _listed(schema, word))
                found = _each(found, [case for option in options for case in option])
        self._looked += sum(len(case.get("enum", ())) for case in found)
        if self._looked > _MOST_VALUES:
            raise UnkeptError(
                f"it lists more than {_MOST_VALUES} values, counted wherever they are referred to"
            )
        return found

    def property_of(self, key: str) -> object:
        """The schema of that property of what the root is of. Raises UnkeptError."""
        found = list[object]()
        for case in self.cases(self._root):
            told = case.get("properties", {}).get(key, case.get("additionalProperties", True))
            if told not in found:
                found.append(told)
        return found[0] if len(found) == 1 else {"anyOf": found}

    def alone(self, schema: Json) -> Json:
        """With all that it refers to in itself. Raises UnkeptError."""
        names = dict[str, str]()

        def named(to: str) -> str:
            return "#/$defs/" + names.setdefault(to, f"r{len(names)}")

        def moved(part: object) -> object:
            left_out = ("$defs", "definitions", "$id", "$schema")
            if isinstance(part, dict):
                part = {key: value for key, value in part.items() if key not in left_out}
            return referring(part, named)

        whole: Any = moved(schema)
        due, defs = [*names], dict[str, object]()
        while due:
            to = due.pop()
            defs[names[to]] = moved(self._found(to))
            due += [new for new in names if names[new] not in defs and new not in due]
        return {**whole, "$defs": defs} if defs else whole

    def _referred_by(self, to: object, depth: int) -> list[Case]:
        if not isinstance(to, str):
            raise UnkeptError("'$ref' is no text")
        if to not in self._referred:
            self._referred[to] = None
            self._referred[to] = self.cases(self._found(to), depth)
        if (known := self._referred[to]) is None:
            raise UnkeptError(f"{to!r} refers to itself")
        return known

    def _found(self, to: str) -> object:
        place: Any = self._root
        for step in unquote(to).split("/"):
            name = step.replace("~1", "/").replace("~0", "~")
            if step == "#" and place is self._root:
                continue
            if isinstance(place, list) and name.isascii() and name.isdigit() and int(name) < len(place):
                place = place[int(name)]
            elif isinstance(place, dict) and name in place:
                place = place[name]
            else:
                raise UnkeptError(f"{to!r} is nothing within it")
        return place


def referring(schema: object, named: Callable[[str], str]) -> object:
    """With other names for what it refers to within its root."""
    if isinstance(schema, list):
        return [referring(each, named) for each in schema]
    if not isinstance(schema, dict) or isinstance(schema.get("$id"), str):  # which is a root by itself
        return schema
    moved = dict[str, object]()
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[key] = named(value)
        elif key in _NAMED and isinstance(value, dict):
            moved[key] = {name: referring(child, named) for name, child in value.items()}
        else:
            moved[key] = value if key in _DATA else referring(value, named)
    return moved


def kinds_of(value: object) -> tuple[str, ...]:
    """JSON types that it is of."""
    match value:
        case bool():
            return ("boolean",)
        case int():
            return ("integer", "number")
        case float():
            return ("integer", "number") if value.is_integer() else ("number",)
        case None:
            return ("null",)
        case str():
            return ("string",)
    return ("array",) if isinstance(value, list) else ("object",)


def holds(values: Iterable[object], value: object) -> bool:
    """Whether one of them is that, as JSON has it: 1 is 1.0, and no true."""
    return any(each == value and isinstance(each, bool) == isinstance(value, bool) for each in values)


def _listed(schema: Json, word: str) -> Sequence[object]:
    several = schema.get(word, [])
    if not isinstance(several, list):
        raise UnkeptError(f"{word!r} is no list")
    return several


def _plain(case: Case) -> Case | None:
    """None: nothing is as it says."""
    named = _listed({"type": [kind] if isinstance(kind := case.get("type", []), str) else kind}, "type")
    if not all(isinstance(each, str) for each in (*named, *_listed(case, "required"))):
        raise UnkeptError("'type' and 'required' are texts")
    if not isinstance(case.get("properties", {}), dict):
        raise UnkeptError("expected 'properties' by their names")
    plain = {**case, "type": named} if "type" in case else dict(case)
    if "const" in plain:
        value = plain.pop("const")
        plain["enum"] = [value] if "enum" not in case or holds(_listed(case, "enum"), value) else []
    if "enum" not in plain:
        return plain
    values = _listed(plain, "enum")
    plain["enum"] = [each for each in values if "type" not in plain or {*named} & {*kinds_of(each)}]
    return plain if plain["enum"] else None


def _each(some: Sequence[Case], others: Sequence[Case]) -> list[Case]:
    if len(some) * len(others) > _MOST_CASES:
        raise UnkeptError(f"it comes to more than {_MOST_CASES} cases")
    both = (_both(one, other) for one in some for other in others)
    return [case for case in both if case is not None]


def _both(one: Case, other: Case) -> Case | None:
    """What holds where both do, as far as it can be said in one; None if nothing."""
    merged, left = {**other, **one}, [*one.get("allOf", ()), *other.get("allOf", ())]
    for key in (key for key in one if key in other and (key == "enum" or one[key] != other[key])):
        mine, its = one[key], other[key]
        if key == "type":
            wider = [*its, "integer"] if "number" in its else its
            shared = [kind for kind in mine if kind in wider]
            shared += ["integer"] if "number" in mine and "integer" in its and "number" not in its else []
            if not shared:
                return None
            merged[key] = list(dict.fromkeys(shared))
        elif key == "enum":
            known = set(map(_known_by, its))
            merged[key] = [value for value in mine if _known_by(value) in known]
        elif key == "required":
            merged[key] = list(dict.fromkeys([*mine, *its]))
        elif key not in ("properties", "additionalProperties", "allOf", *_NOTES):
            left.append({key: its})
    if _closing(one) and _closing(other):
        if "patternProperties" in merged:
            raise UnkeptError("'patternProperties' beside other properties")
        mine, its = one.get("properties", {}), other.get("properties", {})
        extra, its_extra = one.get("additionalProperties", True), other.get("additionalProperties", True)
        merged["additionalProperties"] = _all(extra, its_extra)
        merged["properties"] = {
            key: _all(mine.get(key, extra), its.get(key, its_extra)) for key in {**mine, **its}
        }
    return _plain({**merged, "allOf": left} if left else merged)


def _known_by(value: object) -> object:
    """The same of what `holds` calls the same."""
    if isinstance(value, list | dict):
        return json.dumps(value, sort_keys=True), None
    return value, isinstance(value, bool)


def _closing(case: Case) -> bool:
    return "properties" in case or "additionalProperties" in case


def _all(one: object, other: object) -> object:
    if one is False or other is False:
        return False
    if one is True or one == other:
        return other
    return one if other is True else {"allOf": [one, other]}
