"""Calls in tags: which values are texts, which are JSON; and what a grammar of them keeps to."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from prad.lm import Grammars, Tokenizer
from prefill_service.api.messages import Tool
from prefill_service.api.tool_formats import TAGS, call_grammar
from prefill_service.api.tool_tags import as_json, tagged_calls
from prefill_service.errors import InvalidRequestError
from tests.prefill_api.test_strict_tools import Held

ROOT: dict[str, Any] = {"$defs": {"Size": {"type": "integer"}, "Loop": {"$ref": "#/$defs/Loop"}}}


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
        ("02134", {}, '"02134"'),
        ("NaN", {"type": "number"}, '"NaN"'),
        ('"quoted"', {}, '"\\"quoted\\""'),
        ("7", {"type": [{}]}, "7"),
        ("7", {"type": [{}, "string"]}, '"7"'),
        ("7", {"const": "x", "enum": 5}, '"7"'),
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
def held(tool_tokenizer: Tokenizer) -> Iterator[Held]:
    grammars = Grammars(lambda: tool_tokenizer, len(tool_tokenizer))
    made = Held(TAGS, grammars, tool_tokenizer)
    tool = Tool.model_validate({"type": "function", "function": {"name": "plan", "parameters": PLAN}})
    source = call_grammar(TAGS, [tool], tool_tokenizer.token_id, parallel=False)
    made.grammar = grammars.begin_written("grammar", source, spaced=False)
    yield made
    grammars.close()


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


@pytest.mark.parametrize(
    ("properties", "says"),
    [
        ({"a": {"type": "string", "pattern": "x+"}}, "'pattern' of 'f', parameter 'a', cannot be kept to"),
        ({"a": {"type": "string", "maxLength": 4}}, "'maxLength' of 'f'"),
        ({"a>b": {"type": "string"}}, "names without >"),
        ([1], "expected 'properties'"),
    ],
)
def test_what_cannot_be_kept_to_is_refused(properties: Any, says: str) -> None:
    function = {"name": "f", "parameters": {"properties": properties}, "strict": True}
    tool = Tool.model_validate({"type": "function", "function": function})
    with pytest.raises(InvalidRequestError, match=says) as refused:
        list(tagged_calls([tool], loose=True))
    assert (refused.value.param, refused.value.code) == ("tools", "invalid_grammar")
    loose = Tool.model_validate({"type": "function", "function": function | {"strict": False}})
    assert list(tagged_calls([loose], loose=True))


def seconds(parameters: dict[str, Any]) -> float:
    function = {"name": "f", "parameters": parameters, "strict": True}
    tool = Tool.model_validate({"type": "function", "function": function})
    begun = time.process_time()
    list(tagged_calls([tool], loose=True))
    for schema in parameters["properties"].values():
        as_json("7", schema, parameters)
    return time.process_time() - begun


def test_what_is_referred_to_often_is_looked_at_once() -> None:
    """Each of them took minutes, or would have."""
    a = {"$ref": "#/properties/a"}
    assert seconds({"properties": {"a": {"anyOf": [a] * 8}}}) < 1
    steps = {f"s{n}": {"anyOf": [{"$ref": f"#/properties/s{n + 1}"}] * 16} for n in range(7)}
    assert seconds({"properties": steps | {"s7": {"type": "integer"}}}) < 1
    many = {f"p{n}": {"$ref": "#/x"} for n in range(300)}
    assert seconds({"properties": many, "x": {"enum": ["a"] * 10_000}}) < 2
    assert seconds({"properties": {f"p{n}": {} for n in range(3000)}, "required": [""] * 6000}) < 2


def test_a_grammar_stays_in_bounds_while_it_is_written() -> None:
    schema = {
        "properties": {f"p{n}": {"type": "integer"} for n in range(1000)},
        "$defs": {"x": {"enum": ["a"] * 5_000}},
    }
    function = {"name": "f", "parameters": schema, "strict": True}
    tool = Tool.model_validate({"type": "function", "function": function})
    with pytest.raises(InvalidRequestError, match=r"takes more than .* send fewer tools"):
        list(tagged_calls([tool], loose=True))
