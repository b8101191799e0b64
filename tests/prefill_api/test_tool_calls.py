"""Calls of tools in a model's text, however it is cut; which template writes which; what a grammar says."""

import json
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_service.api.messages import Tool
from prefill_service.api.tool_calls import CallParser
from prefill_service.api.tool_formats import (
    ARGS,
    HERMES,
    LLAMA,
    MISTRAL,
    TAGS,
    ToolFormat,
    call_grammar,
    tool_format,
)

NAMES = ("get_weather", "add")
PARIS = '{"city": "Par{is}\\" \\u00e9"}'


def hermes(arguments: str, name: str = "get_weather") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def read(
    form: ToolFormat, pieces: list[str], *, only_first: bool = False
) -> tuple[str, list[tuple[str | None, str]]]:
    """The content, and each call's name and arguments, put together as a client does."""
    parser = CallParser(form, NAMES, only_first=only_first)
    content, calls, ids = "", list[tuple[str | None, str]](), set[str]()
    for said in map(parser.feed, pieces):
        content += said.content
        for news in said.calls:
            if news.name is not None:
                assert news.index == len(calls)
                assert news.id is not None
                assert news.id not in ids
                ids.add(news.id)
                calls.append((news.name, news.arguments))
            else:
                name, arguments = calls[news.index]
                calls[news.index] = name, arguments + news.arguments
    assert parser.calls == len(calls)
    return content + parser.close(), calls


CALL = ("get_weather", PARIS)
WEATHER = '<tool_call>\n<function=get_weather>\n<parameter=city>\nPar{is}"\n</parameter>\n'
ANSWERS = [
    (HERMES, "just text <tool", "just text <tool", []),
    (HERMES, hermes(PARIS), "", [CALL]),
    (HERMES, f"I look.\n{hermes(PARIS)}\n{hermes('{}', 'add')}\n", "I look.", [CALL, ("add", "{}")]),
    (HERMES, f"{hermes(PARIS)}\nDone.", "\nDone.", [CALL]),
    (HERMES, f"{hermes(PARIS)}<tool", "<tool", [CALL]),
    (HERMES, hermes(PARIS).removesuffix("_call>"), "", [CALL]),
    (HERMES, hermes("{}", "other"), hermes("{}", "other"), []),
    (HERMES, "<tool_call>\nno call</tool_call>", "<tool_call>\nno call</tool_call>", []),
    (HERMES, '<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
    (HERMES, hermes('{"a": [1, {"b": 2}', "add").partition("}\n")[0], "", [("add", '{"a": [1, {"b": 2}')]),
    (HERMES, '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    (HERMES, hermes("null", "add"), "", [("add", "{}")]),
    (HERMES, hermes(json.dumps('{"a": 1}'), "add"), "", [("add", '{"a": 1}')]),
    (HERMES, '<tool_call>{"arguments": {"a": 1} , "name": "add"}</tool_call>', "", [("add", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"name": ":,"}}', "", [("add", '{"name": ":,"}')]),
    (MISTRAL, f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}]', "", [CALL]),
    (
        MISTRAL,
        f'Ok [TOOL_CALLS][{{"name":"add","arguments":{{}}}}, {{"name":"get_weather","arguments":{PARIS}}}]',
        "Ok",
        [("add", "{}"), CALL],
    ),
    (MISTRAL, "[1, 2]", "[1, 2]", []),
    (LLAMA, f'{{"name": "get_weather", "parameters": {PARIS}}}', "", [CALL]),
    (LLAMA, f' <|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}', "", [CALL]),
    (
        LLAMA,
        f'{{"name": "add", "parameters": {{}}}}; {{"name": "get_weather", "parameters": {PARIS}}}',
        "",
        [("add", "{}"), CALL],
    ),
    (LLAMA, 'He said {"name": "add", "parameters": {}}', 'He said {"name": "add", "parameters": {}}', []),
    (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
    (LLAMA, '{"name": "add", "parameters": {}} then', " then", [("add", "{}")]),
    (LLAMA, "<|pyth", "<|pyth", []),
    (LLAMA, '< {"name": "add", "parameters": {}}', '< {"name": "add", "parameters": {}}', []),
    (LLAMA, '<{"name": "add", "parameters": {}}', '<{"name": "add", "parameters": {}}', []),
    (LLAMA, "", "", []),
    (ARGS, f"[TOOL_CALLS]get_weather[ARGS]{PARIS}", "", [CALL]),
    (
        ARGS,
        f"Ok [TOOL_CALLS]add[ARGS]{{}}[TOOL_CALLS] get_weather[CALL_ID]abc123def[ARGS] {PARIS} so",
        "Ok so",
        [("add", "{}"), CALL],
    ),
    (ARGS, '[TOOL_CALLS]add[ARGS]{"a": [1, {"b"', "", [("add", '{"a": [1, {"b"')]),
    (ARGS, "[TOOL_CALLS]other[ARGS]{}", "[TOOL_CALLS]other[ARGS]{}", []),
    (ARGS, "[TOOL_CALLS]add[ARGS]no {}", "[TOOL_CALLS]add[ARGS]no {}", []),
    (ARGS, "[TOOL_CALLS]add[AR", "[TOOL_CALLS]add[AR", []),
    (ARGS, '[TOOL_CALLS] [{"name": "add"}]', '[TOOL_CALLS] [{"name": "add"}]', []),
    (TAGS, f"{WEATHER}</function>\n</tool_call>", "", [("get_weather", '{"city": "Par{is}\\""}')]),
    (
        TAGS,
        "I add.\n<tool_call><function=add></function></tool_call>\nand\n<tool_call>\n<function=add>\n"
        '<parameter=a>\n{"b": [1]}\n</parameter>\n<parameter=c>\n<p>\nx</p>\n\n</parameter>\n</function>',
        "I add.\nand",
        [("add", "{}"), ("add", '{"a": {"b": [1]}, "c": "<p>\\nx</p>\\n"}')],
    ),
    (TAGS, f"{WEATHER}<parameter=days>3", "", [("get_weather", '{"city": "Par{is}\\""')]),
    (TAGS, "<tool_call><function=other></function>", "<tool_call><function=other></function>", []),
    (TAGS, "<tool_call><function=ad", "<tool_call><function=ad", []),
    (TAGS, '<tool_call>{"name": "add"}', '<tool_call>{"name": "add"}', []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), ANSWERS)
def test_calls_are_found_whole_and_by_character(
    form: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert read(form, [text]) == (content, calls)
    assert read(form, list(text)) == (content, calls)


@given(st.data())
def test_it_does_not_matter_how_a_text_is_cut(data: st.DataObject) -> None:
    form, text, content, calls = data.draw(st.sampled_from(ANSWERS))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(form, pieces) == (content, calls)


@given(
    st.sampled_from([HERMES, MISTRAL, ARGS, TAGS, LLAMA]),
    st.text('<tool_cal>/[TOOL_CALLS]{}",:\\ \n;abn', max_size=60),
)
def test_a_text_without_calls_stays_as_it_is(form: ToolFormat, text: str) -> None:
    content, calls = read(form, list(text))
    assert calls or content == text


@pytest.mark.parametrize("form", [HERMES, MISTRAL, ARGS, TAGS, LLAMA])
def test_each_character_costs_the_same_however_much_is_held(form: ToolFormat) -> None:
    """It runs on the event loop: with a cost that grows, this takes many minutes."""
    spaces = " " * 100_000
    for text in (spaces, form.opening + spaces, f"a{spaces}<"):
        assert read(form, [text]) == (text, [])


def test_only_the_first_call_if_asked() -> None:
    text = f"{hermes(PARIS)}\n{hermes('{}', 'add')} and text"
    assert read(HERMES, list(text), only_first=True) == ("", [CALL])


def test_arguments_come_while_they_are_written() -> None:
    parser = CallParser(HERMES, NAMES)
    parser.feed('<tool_call>{"name": "add", "arguments": {"a"')
    (news,) = parser.feed(": 12").calls
    assert (news.index, news.name, news.arguments) == (0, None, ": 12")


def test_formats_are_known_by_what_a_template_writes() -> None:
    for source, form in [
        ("{{ '<tool_call>\n{\"name\": ' }}", HERMES),
        ("<tool_call>\n<function={{ name }}>", TAGS),
        ("{{ '[TOOL_CALLS] [' }}", MISTRAL),
        ("[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}", ARGS),
        ('{"name": function name, "parameters": {}} {{ "<|start_header_id|>ipython" }}', LLAMA),
        ("{{ tools | tojson }}", None),
    ]:
        assert tool_format(source) is form
    for form in (MISTRAL, ARGS):
        assert re.fullmatch("[a-z0-9]{9}", form.new_id())
    assert HERMES.new_id().startswith("call_")


TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}),
    Tool.model_validate({"type": "function", "function": {"name": "now"}}),
]


def schemas(grammar: str) -> Iterator[dict[str, object]]:
    schema = json.loads(grammar.partition("call: %json ")[2].partition("\n")[0])
    assert schema.pop("x-guidance")["whitespace_flexible"] is False
    yield from schema.get("anyOf", [schema])


@pytest.mark.parametrize(
    ("form", "parallel", "start"),
    [
        (HERMES, False, r'start: <[7]> "\n" call "\n" "</tool_call>"'),
        (
            HERMES,
            True,
            r'start: <[7]> "\n" call "\n" "</tool_call>" ("\n" <[7]> "\n" call "\n" "</tool_call>")*',
        ),
        (MISTRAL, True, 'start: "[TOOL_CALLS]" "[" call (", " call)* "]"'),
        (LLAMA, False, "start: call"),
        (LLAMA, True, 'start: call ("; " call)*'),
    ],
)
def test_a_grammar_has_the_tags_and_a_schema_for_each_tool(
    form: ToolFormat, parallel: bool, start: str
) -> None:
    grammar = call_grammar(form, TOOLS, {"<tool_call>": 7}.get, parallel=parallel)
    assert grammar.splitlines()[0] == start
    add, now = schemas(grammar)
    assert add["required"] == now["required"] == ["name", form.arguments]
    assert add["properties"] == {"name": {"const": "add"}, form.arguments: {"type": "object"}}
    (only,) = schemas(call_grammar(form, TOOLS[1:], lambda _: None, parallel=parallel))
    assert only == now


@pytest.mark.parametrize("parallel", [False, True])
def test_where_a_name_stands_before_the_arguments_each_has_a_rule(parallel: bool) -> None:
    grammar = call_grammar(ARGS, TOOLS, {"[TOOL_CALLS]": 7, "[ARGS]": 8}.get, parallel=parallel)
    start, call, add, now, _ = grammar.split("\n")
    assert start == ("start: <[7]> call (<[7]> call)*" if parallel else "start: <[7]> call")
    assert call == "call: call0 | call1"
    assert add.startswith('call0: "add" <[8]> %json {"x-guidance": ')
    assert add.endswith('"type": "object"}')
    assert now.endswith('"type": "object", "additionalProperties": false}')
