"""A grammar of calls in tags: parameters in their order, and each as its schema says, or a refusal.

A text has no quotes and ends where its tag does: only lists of texts, and texts of any kind, can be kept to.
Whoever reads the call takes what looks like JSON for that where the schema has a place for it (`as_json`): so
where JSON is bound to more than a type, no text begins like it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prad.core.rules import MOST_GRAMMAR
from prefill_service.api.messages import Json, Tool
from prefill_service.api.tool_schemas import Case, Schemas, UnkeptError, kinds_of
from prefill_service.api.tool_tags import END, FUNCTION, LONGEST_TAG, PARAMETER, VALUE_END
from prefill_service.errors import InvalidRequestError

_ANYTHING = f"/(?s:.*)/ {json.dumps(VALUE_END)}"
_UNKEPT = ("pattern", "format", "minLength", "maxLength", "contentEncoding", "not", "if", "allOf")
"""Of a text."""
_UNKEPT_CALLS = (
    "patternProperties",
    "propertyNames",
    "minProperties",
    "maxProperties",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "not",
    "if",
    "allOf",
    "enum",
)
_ALWAYS = ("not", "if", "allOf")
_BOUND: Mapping[str, tuple[str, ...]] = {
    "string": ("pattern", "minLength", "maxLength", *_ALWAYS),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", *_ALWAYS),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains", *_ALWAYS),
    "object": ("properties", "additionalProperties", "required", *_UNKEPT_CALLS),
}
"""What values of a type are bound to more by."""
_BEGIN = {
    "object": "{",
    "array": r"\[",
    "integer": r"0-9\-",
    "number": r"0-9\-",
    "boolean": "tfTF",
    "null": "",
}
"""In a class of characters of a regular expression: how JSON of a type begins, and what is read as that."""
_SPACE = r"\s\x1c-\x1f"


@dataclass(frozen=True, slots=True)
class _Arguments:
    """`extra`: of what has no schema of its own; None: none of that is written."""

    properties: Mapping[str, object]
    required: Sequence[str]
    extra: object | None


def tagged_calls(tools: Sequence[Tool], *, loose: bool, places: Sequence[str] = ()) -> Iterator[str]:
    """Rules `call` of a grammar in llguidance's Lark. loose: arguments of tools that are not strict are any.
    places: of the tools in the request. Raises InvalidRequestError for what cannot be kept to, or takes too
    much."""
    taken = 0
    for rule in _rules(tools, places or [f"tools.{at}" for at in range(len(tools))], loose=loose):
        taken += len(rule)
        if taken > MOST_GRAMMAR:
            raise _refused(
                f"'tools': the grammar of these calls takes more than {MOST_GRAMMAR} characters: send fewer "
                "tools or parameters, or less in '$defs'",
                "tools",
            )
        yield rule


def _rules(tools: Sequence[Tool], places: Sequence[str], *, loose: bool) -> Iterator[str]:
    yield f"call: {' | '.join(f'call{at}' for at in range(len(tools)))}"
    for at, (tool, place) in enumerate(zip(tools, places, strict=True)):
        given = tool.function.parameters
        if given is None:
            arguments = [_Arguments({}, (), None)]
        elif loose and not tool.function.strict:
            arguments = [_Arguments({}, (), True)]
        else:
            arguments = _arguments(tool.function.name, given, f"{place}.function.parameters")
        begin, schemas = json.dumps(f"{FUNCTION}{tool.function.name}>\n"), Schemas(given or {})
        bodies = list[str]()
        for case, told in enumerate(arguments):
            parts = list[str]()
            for n, (key, schema) in enumerate(told.properties.items()):
                name, path = f"value{at}_{case}_{n}", f"{place}.function.parameters.properties.{key}"
                try:
                    if key not in told.required and not schemas.cases(schema):
                        continue  # it must not come
                    yield from _value(name, schemas, schema)
                except UnkeptError as error:
                    where = f"'tools': {tool.function.name!r}, parameter {key!r}: {error}"
                    raise _refused(f"{where}; leave that out, or 'strict' and 'tool_choice'", path) from error
                tag = json.dumps(f"{PARAMETER}{key}>")
                parts.append(f'({tag} {name} "\\n"){"" if key in told.required else "?"}')
            if told.extra is not None:
                yield from _extra(f"extra{at}_{case}", schemas, told.extra, tool, place)
                parts.append(f"extra{at}_{case}*")
            bodies.append(" ".join(parts))
        yield f"call{at}: " + " | ".join(f"{begin} {body} {json.dumps(END)}" for body in bodies)


def _extra(name: str, schemas: Schemas, schema: object, tool: Tool, place: str) -> Iterator[str]:
    path = f"{place}.function.parameters.additionalProperties"
    try:
        yield from _value(f"{name}_value", schemas, schema)
    except UnkeptError as error:
        where = f"'tools': {tool.function.name!r}, 'additionalProperties': {error}"
        raise _refused(f"{where}; leave that out, or 'strict' and 'tool_choice'", path) from error
    yield f'{name}: "{PARAMETER}" /[^>\\n]+/ ">" {name}_value "\\n"'


def _arguments(function: str, schema: Json, path: str) -> list[_Arguments]:
    """The ways to call it."""
    try:
        cases = Schemas(schema).cases(schema)
        found = [_of(case) for case in cases if "object" in case.get("type", ["object"])]
        if not found:
            raise UnkeptError("no object is as it says")
    except UnkeptError as error:
        raise _refused(f"'tools': the schema of {function!r} cannot be kept to: {error}", path) from error
    return found


def _of(case: Case) -> _Arguments:
    unkept = next((word for word in _UNKEPT_CALLS if word in case), None)
    if unkept is not None or not isinstance(case.get("unevaluatedProperties", True), bool):
        raise UnkeptError(
            f"{unkept or 'unevaluatedProperties'!r} is not known of parameters in tags; leave it out"
        )
    extra = case.get("unevaluatedProperties", True) and case.get("additionalProperties", True)
    properties, required = case.get("properties", {}), case.get("required", [])
    named = {**properties, **{key: extra for key in required if key not in properties}}
    if extra is False and len(named) > len(properties):
        raise UnkeptError(f"'required' has names that no property has: {[*named][len(properties)]!r}")
    for key in named:
        if ">" in key or "\n" in key or key != key.strip() or not 0 < len(key) < LONGEST_TAG // 2:
            raise UnkeptError(
                "expected 'properties' by names without > and line ends, and without spaces around, not "
                f"{key!r}"
            )
    return _Arguments(named, required, None if properties or extra is False else extra)


def _value(name: str, schemas: Schemas, schema: object) -> Iterator[str]:
    """The rules of a parameter's value, with the tag that ends it. Raises UnkeptError."""
    texts, values, parts, is_text, barred = list[str](), list[str](), list[Case](), False, ""
    for case in schemas.cases(schema):
        if "enum" in case:
            _require_plain(case)
            texts += (each for each in case["enum"] if isinstance(each, str))
            values += (
                json.dumps(each, ensure_ascii=False) for each in case["enum"] if not isinstance(each, str)
            )
            barred += "".join(_BEGIN.get(kinds_of(each)[-1], "") for each in case["enum"])
            continue
        kinds = case.get("type", ("string", *_BEGIN))
        others = [kind for kind in kinds if kind != "string"]
        if "string" in kinds:
            is_text = True
            if unkept := next((word for word in _UNKEPT if word in case), None):
                raise UnkeptError(
                    f"{unkept!r} cannot be kept to: this model writes texts without quotes, so that none is "
                    "known to end but by its tag"
                )
        if others:
            parts.append({**case, "type": others})
            barred += "".join(_BEGIN.get(kind, "") for kind in others if _bound(case, kind))
    end = json.dumps(f"\n{VALUE_END}")
    if is_text and not barred:  # what else may come is read as that, too
        yield f"{name}[lazy]: {_ANYTHING}"
        return
    written = values if is_text else [*texts, *values]
    if any(VALUE_END in f"{each}\n" for each in written):
        raise UnkeptError(f"{VALUE_END} cannot stand in a value")
    options = [json.dumps(each) for each in dict.fromkeys(written)]
    if parts:
        whole = isinstance(schema, dict) and not is_text and not options
        either = schema if whole and isinstance(schema, dict) else {"anyOf": parts}
        options.append(f"%json {json.dumps(schemas.alone(either))}")
    if not options:
        raise UnkeptError("no value is as it says")
    rule = f'{name}: "\\n" ({" | ".join(options)}) {end}'
    if is_text:
        yield f'{rule} | "\\n" {name}_text'
        begin = f"[{_SPACE}]*([^{_SPACE}{barred}](?s:.*))?"
        yield f"{name}_text[lazy]: /{begin}/ {json.dumps(VALUE_END)}"
    else:
        yield rule


def _require_plain(case: Case) -> None:
    """Of a list of values: that nothing else chooses among them."""
    for value in case["enum"]:
        word = _bound({key: case[key] for key in case if key != "enum"}, kinds_of(value)[-1])
        most = case.get("maxLength")
        short = isinstance(value, str) and isinstance(most, int) and len(value) <= most
        if word is not None and not (word == "maxLength" and short):
            raise UnkeptError(f"{word!r} beside a list of values cannot be kept to: list those that may come")


def _bound(case: Case, kind: str) -> str | None:
    """What says more of values of that type."""
    return next(
        (word for word in _BOUND.get("number" if kind == "integer" else kind, _ALWAYS) if word in case), None
    )


def _refused(why: str, path: str) -> InvalidRequestError:
    return InvalidRequestError(why, param=path, code="invalid_grammar")
