"""Calls in tags: which values are texts, which are JSON; and what a grammar of them keeps to."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from prad.lm import Grammars, Tokenizer
from prefill_service.api.messages import Tool
from prefill_service.api.tool_calls import CallParser
from prefill_service.api.tool_formats import TAGS, call_grammar
from prefill_service.api.tool_tag_rules import tagged_calls
from prefill_service.api.tool_tags import as_json
from prefill_service.errors import InvalidRequestError
from tests.prefill_api.test_strict_tools import Held

ROOT: dict[str, Any] = {"$defs": {"Size": {"type": "integer"}, "Loop": {"$ref": "#/$defs/Loop"}}}
ROOT["$defs"]["~x/y"] = {"type": "string"}


@pytest.mark.parametrize(
    ("text", "schema", "told"),
    [
        ("Oslo", {"type": "string"}, '"Oslo"'),
        ("3", {"type": "string"}, '"3"'),
        ('say "hi"\n', {"type": "string"}, '"say \\"hi\\"\\n"'),
        ("3", {"type": "integer"}, "3"),
        ("3.5", {"type": "number"}, "3.5"),
        ("3", {"type": ["string", "integer"]}, "3"),
        ("three", {"type": "integer"}, '"three"'),
        ("True", {"type": "boolean"}, "true"),
        ("None", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "null"),
        ("true", {"anyOf": [{"type": "string"}, {"type": "null"}]}, '"true"'),
        (' {"a": [1]} ', {"type": "object"}, '{"a": [1]}'),
        ("[1, 2]", {"enum": ["[1, 2]"]}, '"[1, 2]"'),
        ("2", {"const": 2}, "2"),
        ("7", {"$ref": "#/$defs/Size"}, "7"),
        ("7", {"$ref": "#/$defs/Loop"}, "7"),
        ("7", {"$ref": "#/$defs/None"}, "7"),
        ("7", {"$ref": "#/$defs/~0x~1y"}, '"7"'),
        ("123456789012345678901234567890", {"type": "integer"}, "123456789012345678901234567890"),
        ("2.0", {"type": "integer"}, "2.0"),
        ("2.5", {"type": "integer"}, '"2.5"'),
        ("1", {"type": ["string", "integer"], "enum": ["1", "2"]}, '"1"'),
        ("1", {"enum": ["1", 2]}, '"1"'),
        ("2", {"enum": ["1", 2]}, "2"),
        ("[" * 100_000, {}, json.dumps("[" * 100_000)),
        ("9" * 5000, {"type": "integer"}, json.dumps("9" * 5000)),
        ("02134", {}, '"02134"'),
        ("NaN", {"type": "number"}, '"NaN"'),
        ('"quoted"', {}, '"\\"quoted\\""'),
        ("7", {"type": [{}]}, "7"),
        ("7", {"type": [{}, "string"]}, '"7"'),
    ],
)
def test_a_value_is_what_its_schema_has_a_place_for(text: str, schema: dict[str, Any], told: str) -> None:
    assert as_json(text, schema, ROOT) == told


PLAN: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "days": {"$ref": "#/$defs/Days"},
        "note": {"type": ["string", "null"]},
    },
    "required": ["city", "days"],
    "$defs": {"Days": {"type": "integer", "minimum": 1, "maximum": 9}},
}


def written(**values: str) -> str:
    told = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function=plan>\n{told}</function>\n</tool_call>"


@pytest.fixture(scope="module")
def grammars(tool_tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = Grammars(lambda: tool_tokenizer, len(tool_tokenizer))
    yield made
    made.close()


def held_to(grammars: Grammars, tokenizer: Tokenizer, parameters: dict[str, Any]) -> Held:
    """To a call of `plan`."""
    made = Held(TAGS, grammars, tokenizer)
    tool = Tool.model_validate({"type": "function", "function": {"name": "plan", "parameters": parameters}})
    source = call_grammar(TAGS, [tool], tokenizer.token_id, parallel=False)
    made.grammar = grammars.begin_written("grammar", source, spaced=False)
    return made


@pytest.fixture(scope="module")
def held(grammars: Grammars, tool_tokenizer: Tokenizer) -> Held:
    return held_to(grammars, tool_tokenizer, PLAN)


def test_parameters_come_in_their_order_and_as_their_schemas_say(held: Held) -> None:
    text = 'a <b>, {"c"}\nd'
    for good in (
        written(city="Oslo", days="3"),
        written(city=text, unit="C", days="3", note=text),
        written(city="", days="9", note=""),
    ):
        assert held.takes(good), good
    for wrong in (
        written(city="Oslo"),
        written(city="Oslo", days="30"),
        written(city="Oslo", unit="K", days="3"),
        written(days="3", city="Oslo"),
        written(city="Oslo", days="3", more="x"),
        "words",
    ):
        assert not held.takes(wrong), wrong


WITH = "function.parameters"
OF_A, OF_MORE = f"{WITH}.properties.a", f"{WITH}.additionalProperties"


@pytest.mark.parametrize(
    ("parameters", "says", "path"),
    [
        (
            {"properties": {"a": {"type": "string", "pattern": "x+"}}},
            "'f', parameter 'a': 'pattern' cannot be kept to",
            OF_A,
        ),
        ({"properties": {"a": {"maxLength": 4}}}, "'maxLength' cannot", OF_A),
        (
            {"properties": {"a": {"anyOf": [{"type": "string", "pattern": "x"}, {"type": "null"}]}}},
            "'pattern' cannot",
            OF_A,
        ),
        (
            {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "string", "pattern": "x"}}},
            "'pattern' cannot",
            OF_A,
        ),
        ({"properties": {"a": {"type": "null", "enum": [1]}}, "required": ["a"]}, "no", OF_A),
        ({"properties": {"a": {"enum": ["x"], "maxLength": "1"}}}, "beside a list", OF_A),
        ({"properties": {"a": {"enum": ["</parameter>"]}}}, "cannot stand in", OF_A),
        ({"properties": {"a": {"$ref": "#/$defs/A"}}}, "nothing within it", OF_A),
        ({"properties": {"a>b": {"type": "string"}}}, "names without >", WITH),
        ({"properties": [1]}, "expected 'properties'", WITH),
        ({"properties": {"a": {}}, "minProperties": 1}, "'minProperties' is not known", WITH),
        ({"properties": {"a": {}}, "required": ["b"], "additionalProperties": False}, "no property", WITH),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}, "refers to itself", WITH),
        ({"type": "array"}, "no object", WITH),
        ({"additionalProperties": {"type": "string", "format": "x"}}, "format", OF_MORE),
    ],
)
def test_what_cannot_be_kept_to_is_refused(parameters: Any, says: str, path: str) -> None:
    function = {"name": "f", "parameters": parameters, "strict": True}
    tool = Tool.model_validate({"type": "function", "function": function})
    with pytest.raises(InvalidRequestError, match=says) as refused:
        list(tagged_calls([tool], loose=True, places=["tools.7"]))
    assert (refused.value.param, refused.value.code) == (f"tools.7.{path}", "invalid_grammar")
    loose = Tool.model_validate({"type": "function", "function": function | {"strict": False}})
    assert list(tagged_calls([loose], loose=True))


def written_and_read(parameters: dict[str, Any]) -> None:
    function = {"name": "f", "parameters": parameters, "strict": True}
    tool = Tool.model_validate({"type": "function", "function": function})
    with suppress(InvalidRequestError):
        list(tagged_calls([tool], loose=True))
    for schema in parameters["properties"].values():
        as_json("7", schema, parameters)


def test_what_is_referred_to_often_is_looked_at_once() -> None:
    """Each of them took minutes, or would have."""
    a = {"$ref": "#/properties/a"}
    written_and_read({"properties": {"a": {"anyOf": [a] * 8}}})
    steps = {f"s{n}": {"anyOf": [{"$ref": f"#/properties/s{n + 1}"}] * 16} for n in range(7)}
    written_and_read({"properties": steps | {"s7": {"type": "integer"}}})
    many = {f"p{n}": {"$ref": "#/x"} for n in range(300)}
    written_and_read({"properties": many, "x": {"enum": ["a"] * 10_000}})
    written_and_read({"properties": {f"p{n}": {} for n in range(3000)}, "required": [""] * 6000})


def test_a_grammar_stays_in_bounds_while_it_is_written() -> None:
    properties = {f"p{n}": {"$ref": "#/$defs/x"} for n in range(200)}
    schema = {"properties": properties, "$defs": {"x": {"enum": ["x" * 10_000]}}}
    function = {"name": "f", "parameters": schema, "strict": True}
    tool = Tool.model_validate({"type": "function", "function": function})
    with pytest.raises(InvalidRequestError, match=r"takes more than .* send fewer tools"):
        list(tagged_calls([tool], loose=True))


SIZE = {"enum": ["C", "F"], "type": "string"}


@pytest.mark.parametrize(
    ("schema", "good", "wrong"),
    [
        ({"$ref": "#/$defs/Size"}, ["C"], ["K", "", "CF"]),
        ({"anyOf": [SIZE, {"type": "null"}]}, ["C", "null"], ["K", "nul"]),
        ({"type": ["string", "null"], "enum": ["C", "F", None]}, ["C", "null"], ["K"]),
        ({"enum": ["", "C"], "maxLength": 1}, ["", "C"], ["K"]),
        ({"allOf": [{"enum": [1, [2], "C"]}, {"enum": [True, [2], "C"]}]}, ["[2]", "C"], ["1", "true"]),
        ({"enum": ["C", 1, "ü😀", True]}, ["C", "1", "ü😀", "true"], ["2", "D"]),
        ({"allOf": [{"$ref": "#/$defs/Size"}, {"enum": ["F", "K"]}]}, ["F"], ["C", "K"]),
        ({"$ref": "#/properties/b"}, ["3"], ["30", "x"]),
        ({"anyOf": [{"$ref": "#/properties/b"}, {"type": "null"}]}, ["3", "null"], ["30", "x"]),
        ({"anyOf": [{"$ref": "#/properties/b"}, {"type": "string"}]}, ["3", "x y", ""], ["30", " 30"]),
        ({"type": ["string", "array"], "items": {"type": "integer"}}, ["[1]", "a"], ["[a]"]),
        ({"$ref": "#/$defs/Tree"}, ['{"of":[{"of":[]}]}'], ['{"of":[1]}', "x"]),
        ({"oneOf": [{"const": "a"}, {"const": "b"}]}, ["a", "b"], ["c"]),
    ],
)  # fmt: skip
def test_a_value_is_one_that_its_schema_has(
    grammars: Grammars, tool_tokenizer: Tokenizer, schema: Any, good: list[str], wrong: list[str]
) -> None:
    made = held_to(grammars, tool_tokenizer, {
        "properties": {"a": schema, "b": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["a"],
        "$defs": {
            "Size": SIZE,
            "Tree": {
                "type": "object",
                "properties": {"of": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}},
                "required": ["of"],
                "additionalProperties": False,
            },
        },
    })  # fmt: skip
    assert [value for value in (*good, *wrong) if made.takes(written(a=value))] == good


NODE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("parameters", "good", "wrong"),
    [
        ({"type": "object"}, [{}, {"x": "any", "y": "1"}], []),
        ({}, [{}, {"x": "any"}], []),
        ({"additionalProperties": {"type": "integer"}}, [{}, {"x": "1"}], [{"x": "any"}]),
        ({"type": "object", "required": ["x"]}, [{"x": "any"}, {"x": "1", "y": ""}], [{}, {"y": ""}]),
        ({"type": "object", "additionalProperties": False}, [{}], [{"x": "1"}]),
        ({"$ref": "#/$defs/N", "$defs": {"N": NODE}}, [{"a": "1"}], [{}, {"a": "x"}]),
        (
            {"allOf": [NODE, {"properties": {"b": SIZE}, "required": ["b"]}]},
            [{"a": "1", "b": "C"}],
            [{"a": "1"}, {"a": "1", "b": "K"}],
        ),
        ({"anyOf": [NODE, {"properties": {"b": SIZE}, "required": ["b"]}]}, [{"a": "1"}, {"b": "C"}], [{}]),
    ],
)
def test_arguments_are_as_a_schema_s_root_says(
    grammars: Grammars, tool_tokenizer: Tokenizer, parameters: Any, good: list[Any], wrong: list[Any]
) -> None:
    made = held_to(grammars, tool_tokenizer, parameters)
    assert [values for values in (*good, *wrong) if made.takes(written(**values))] == good


def test_what_a_schema_refers_to_is_looked_at_once() -> None:
    """Each of these refers to the next twice."""
    for word in ("allOf", "anyOf"):
        defs: dict[str, object] = {f"d{n}": {word: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(25)}
        root = {"$defs": defs | {"d25": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/d0"}}}
        function = {"name": "f", "parameters": root, "strict": True}
        tool = Tool.model_validate({"type": "function", "function": function})
        if word == "allOf":
            assert len(list(tagged_calls([tool], loose=False))) > 1
        else:
            with pytest.raises(InvalidRequestError, match="more than 256 cases"):
                list(tagged_calls([tool], loose=False))
        assert as_json("3", {"$ref": "#/$defs/d0"}, root) == "3"


CALLED = "<tool_call>\n<function=plan>\n<parameter=days>\n3\n</parameter>\n"


@pytest.mark.parametrize(
    ("text", "calls", "content"),
    [
        (CALLED + "</tool_call>\nDone", ['{"days": 3}'], "Done"),
        ((CALLED + "</tool_call>\n") * 2, ['{"days": 3}'] * 2, ""),
        (CALLED * 2, ['{"days": 3}', '{"days": 3'], ""),
        (CALLED + "So <b>it</b> is", ['{"days": 3}'], "So <b>it</b> is"),
        (CALLED + "</tool_call>" + CALLED + "</function>\n</tool_call>", ['{"days": 3}'] * 2, ""),
        ("<tool_call>\n<function=plan></tool_call>", ["{}"], ""),
        (CALLED + "<parameter=days>\n4\n</parameter>\n</function>\n</tool_call>", ['{"days": 3}'], ""),
    ],
)
def test_a_call_without_its_end_ends_where_others_would(text: str, calls: list[str], content: str) -> None:
    """And a parameter that comes again is told once."""
    for size in (1, 7, len(text)):
        parser, told, said = CallParser(TAGS, ["plan"], schemas={"plan": PLAN}), dict[int, str](), ""
        for at in range(0, len(text), size):
            news = parser.feed(text[at : at + size])
            said += news.content
            for call in news.calls:
                told[call.index] = told.get(call.index, "") + call.arguments
        assert [*told.values()] == calls
        assert (said + parser.close()).strip() == content
