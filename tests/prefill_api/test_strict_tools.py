"""Strict tools where the model may also answer in words: any text that is no call, and calls as their schemas
say; in each of the ways that models write calls."""

import json
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import openai
import pydantic
import pytest

from prad.core.sampling import Token
from prad.lm import Grammar, Grammars, LanguageModel, Tokenizer
from prad.lm.grammar import Walk
from prefill_service.api import ModelInfo, create_app
from prefill_service.api.messages import Tool
from prefill_service.api.tool_calls import CallParser
from prefill_service.api.tool_formats import ARGS, HERMES, LLAMA, MISTRAL, TAGS, ToolFormat, call_grammar
from prefill_service.prompt import PromptRequest
from tests.prefill_api.conftest import (
    STARS,
    TOOL_TEMPLATE,
    USER,
    ModelEngine,
    catalogue_of,
    record,
    tokenizer_of,
)
from tests.prefill_api.serving import listening

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "stars", "parameters": STARS, "strict": True}},
    {"type": "function", "function": {"name": "note", "parameters": {"type": "object", "required": ["x"]}}},
]
FORMS = {form.name: form for form in (HERMES, MISTRAL, ARGS, TAGS, LLAMA)}
MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
THINKING = ("[THINK]", "[/THINK]")


def tagged(arguments: str) -> str:
    given = json.loads(arguments)
    if not isinstance(given, dict):
        return arguments
    return "".join(f"<parameter={k}>\n{json.dumps(v)}\n</parameter>\n" for k, v in given.items())


def call(form: ToolFormat, name: str, arguments: str) -> str:
    """As a model writes one."""
    if form is TAGS:
        return f"<tool_call>\n<function={name}>\n{tagged(arguments)}</function>\n</tool_call>"
    if form is ARGS:
        return f"[TOOL_CALLS]{name}[ARGS]{arguments}"
    written = f'{{"name": "{name}", "{form.arguments}": {arguments}}}'
    return {
        "hermes": f"<tool_call>\n{written}\n</tool_call>",
        "mistral": f"[TOOL_CALLS][{written}]",
        "llama": written,
    }[form.name]


@pytest.fixture(scope="module", params=["letters", "marks"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """What marks calls is spelt, or is special tokens."""
    marks = (*MARKS, *THINKING) if request.param == "marks" else ()
    return tokenizer_of(tmp_path_factory.mktemp("strict"), TOOL_TEMPLATE, *marks)


@pytest.fixture(scope="module")
def grammars(vocabulary: Tokenizer) -> Iterator[Grammars]:
    made = Grammars(lambda: vocabulary, len(vocabulary))
    yield made
    made.close()


@dataclass
class Held:
    """The grammar of answers to a request with TOOLS."""

    form: ToolFormat
    grammars: Grammars
    tokenizer: Tokenizer
    parallel: bool = True
    spaced: bool = False
    grammar: "Future[Grammar]" = field(init=False)

    def __post_init__(self) -> None:
        tools = [Tool.model_validate(tool) for tool in TOOLS]
        calls = {self.tokenizer.token_id(text) for text in self.form.special}
        marks = self.tokenizer.special_ids - self.tokenizer.end_ids - calls
        source = call_grammar(
            self.form,
            tools,
            self.tokenizer.token_id,
            parallel=self.parallel,
            loose=True,
            free=True,
            marks=marks,
        )
        self.grammar = self.grammars.begin_written("grammar", source, spaced=self.spaced)

    def goes_on(self, ids: Sequence[int], seed: int | None = None) -> str | None:
        """An answer that begins so, drawn to its end; without a seed it has to end there. None if not."""
        eos, output, draw = self.tokenizer.eos_id, list[int](), random.Random(seed)
        walk = Walk(self.grammar, {eos}, [])
        while len(output) < 400:
            (mask,) = self.grammars.masks([walk])
            assert walk.trouble is None
            mask.forbid(row := np.zeros(len(self.tokenizer), np.float32))
            banned = np.isneginf(row)
            if len(output) < len(ids):
                token = ids[len(output)]
                if banned[token]:
                    return None
            elif not banned[eos]:
                return self.tokenizer.decode(output, self.tokenizer.special_ids)
            elif seed is None:
                return None
            else:
                token = draw.choice(np.flatnonzero(~banned).tolist())
            output.append(token)
            walk.push(token)
        raise AssertionError("no end")

    def takes(self, text: str) -> bool:
        return self.goes_on(self.tokenizer.encode_continuation(text)) == text

    def spelt(self, text: str) -> list[int]:
        """Without special tokens, whatever it says."""
        return self.tokenizer.encode_continuation(self.tokenizer.as_text(text))


@pytest.fixture(params=FORMS)
def held(request: pytest.FixtureRequest, grammars: Grammars, vocabulary: Tokenizer) -> Held:
    return Held(FORMS[request.param], grammars, vocabulary)


def test_any_text_may_come_and_calls_as_their_schemas_say(held: Held) -> None:
    good, free = call(held.form, "stars", '{"n": 3}'), call(held.form, "note", '{"any": [1, {"x": null}]}')
    for text in ("", "the food", " \n", "a < b, {so} [1]", "<", "It is\n\n<tool> [TOOL", good, free):
        assert held.takes(text), text
    for wrong in (
        call(held.form, "stars", '{"n": 30}'),
        call(held.form, "stars", '{"m": 3}'),
        call(held.form, "stars", "{}"),
        call(held.form, "other", "{}"),
        call(held.form, "note", "[1]"),
    ):
        assert not held.takes(wrong), wrong


def test_a_text_may_stand_in_front_of_calls(held: Held) -> None:
    good, wrong = (call(held.form, "stars", arguments) for arguments in ('{"n": 3}', '{"n": 30}'))
    text = "I look, {and} see.\n"
    assert held.takes(text + good)
    assert held.takes(text + wrong) == (held.form is LLAMA), "there it is no call, but text"
    both = {ARGS: good + good, LLAMA: f"{good}; {good}"}
    both |= dict.fromkeys((HERMES, TAGS), f"{good}\nSo\n{good} done.")
    if held.form in both:
        assert held.takes(both[held.form])
        alone = Held(held.form, held.grammars, held.tokenizer, parallel=False)
        assert alone.takes(good)
        assert not alone.takes(both[held.form])


def test_a_model_thinks_between_special_tokens(held: Held) -> None:
    good, wrong = (call(held.form, "stars", arguments) for arguments in ('{"n": 3}', '{"n": 30}'))
    thought = "[THINK]I {see}[/THINK]"
    takes = held.form is not LLAMA or held.tokenizer.token_id("[THINK]") is None
    for text in (thought, f"{thought}\nSo it is.", f"{thought}\n{good}", "[THINK]"):
        assert held.takes(text) == takes, text
    assert held.takes(thought + wrong) == (held.form is LLAMA and takes)
    assert held.goes_on([*held.spelt(thought), *held.tokenizer.encode_continuation(good)]) == thought + good


@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_has_begun_is_written_to_its_end(held: Held, seed: int) -> None:
    alone = Held(held.form, held.grammars, held.tokenizer, parallel=False)
    begun, _, _ = call(held.form, "stars", "{}").rpartition("stars")
    said = alone.goes_on(held.tokenizer.encode_continuation(f"{begun}st"), seed)
    assert said is not None
    parser = CallParser(held.form, ["stars", "note"], schemas={"stars": STARS})
    news = parser.feed(said)
    assert news.content + parser.close() == ""
    assert [called.name for called in news.calls] == ["stars"]
    assert 1 <= json.loads(news.calls[0].arguments)["n"] <= 9


def test_what_opens_calls_does_so_however_it_is_spelt(held: Held) -> None:
    """For whoever reads the text a call is one, whichever tokens it is made of."""
    opening = held.form.opening or held.form.skipped
    for text in (opening + "so", f"I look. {opening}so"):
        expected = None if held.form.opening or text.startswith(opening) else text
        assert held.goes_on(held.spelt(text)) == expected, text


def test_an_answer_of_a_task_may_begin_with_a_space(
    held: Held, grammars: Grammars, vocabulary: Tokenizer
) -> None:
    spaced = Held(held.form, grammars, vocabulary, spaced=True)
    for text in (
        " the food",
        " " + call(held.form, "stars", '{"n": 3}'),
        call(held.form, "stars", '{"n": 3}'),
    ):
        assert spaced.takes(text), text
    assert not spaced.takes(" " + call(held.form, "stars", '{"n": 30}'))


@pytest.mark.parametrize(
    "text",
    ['{"answer": 42}', ' \n{"answer": 42}', "<|python_tag|>so", '\x1c{"name": "stars", "parameters": {}}'],
)
def test_an_answer_that_begins_as_llama_s_calls_do_is_one(
    grammars: Grammars, vocabulary: Tokenizer, text: str
) -> None:
    held = Held(LLAMA, grammars, vocabulary)
    assert not held.takes(text)
    assert held.takes("<|python_tag|>" + call(LLAMA, "stars", '{"n": 3}'))


@dataclass
class LedEngine(ModelEngine):
    """Begins as it is told to, then draws."""

    script: Sequence[int] = ()

    def next_tokens(self, request: PromptRequest, outputs: Sequence[list[int]], step: int) -> list[Token]:
        if step < len(self.script):
            return [Token(self.script[step], -0.5)] * request.choices
        return super().next_tokens(request, outputs, step)


@pytest.fixture
async def led(
    tool_tokenizer: Tokenizer, language_model: LanguageModel
) -> AsyncIterator[tuple[httpx.AsyncClient, LedEngine, Any]]:
    info = ModelInfo("0123456789abcdef", 1024, len(tool_tokenizer), frozenset())
    tasks = catalogue_of({"talk": record(template="{prompt}", chat_template=True)})
    engine = LedEngine(model=language_model)
    app = create_app(engine, tasks, tool_tokenizer, info)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client, engine, app


ASKED: dict[str, Any] = {
    "messages": [USER],
    "parallel_tool_calls": False,
    "temperature": 1.0,
    "max_tokens": 120,
}
BEGUN = 'I look.\n<tool_call>\n{"name": "stars", "arg'


@pytest.mark.parametrize("task", [None, "talk"])
@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}])
async def test_arguments_keep_to_the_schema_once_the_model_calls(
    led: tuple[httpx.AsyncClient, LedEngine, Any], tool_tokenizer: Tokenizer, task: str | None, choice: Any
) -> None:
    client, engine, _ = led
    engine.script = tool_tokenizer.encode_continuation(BEGUN)
    for seed in range(3):
        body = ASKED | choice | {"tools": TOOLS, "task": task, "seed": seed}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        (choice_,) = answer.json()["choices"]
        assert (choice_["message"]["content"], choice_["finish_reason"]) == ("I look.", "tool_calls")
        (called,) = choice_["message"]["tool_calls"]
        assert 1 <= json.loads(called["function"]["arguments"])["n"] <= 9


async def test_words_are_as_free_as_without_tools(
    led: tuple[httpx.AsyncClient, LedEngine, Any], tool_tokenizer: Tokenizer
) -> None:
    client, engine, _ = led
    engine.script = tool_tokenizer.encode_continuation("the food {is} good<|end|>")
    (choice,) = (await client.post("/v1/chat/completions", json=ASKED | {"tools": TOOLS})).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("the food {is} good", "stop")
    assert engine.requests[-1].sampling.rules is not None
    loose = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": False}}]
    for tools, tool_choice in ((loose, "auto"), (TOOLS, "none")):
        body = ASKED | {"tools": tools, "tool_choice": tool_choice}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        assert engine.requests[-1].sampling.rules is None, "nothing is held to anything"


async def test_beside_a_format_strict_tools_are_strict_too(
    led: tuple[httpx.AsyncClient, LedEngine, Any], tool_tokenizer: Tokenizer
) -> None:
    client, engine, _ = led
    engine.script = tool_tokenizer.encode_continuation(BEGUN.removeprefix("I look.\n"))
    body = ASKED | {"tools": TOOLS, "response_format": {"type": "json_object"}, "seed": 4}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    (called,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert 1 <= json.loads(called["function"]["arguments"])["n"] <= 9


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"ignore_eos": True}, "ignore_eos"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"use_beam_search": True, "n": 2, "temperature": 0}, "tools"),
        ({"use_beam_search": True, "n": 2, "temperature": 0, "tool_choice": "required"}, "tool_choice"),
    ],
)
async def test_what_does_not_go_together_with_them(
    led: tuple[httpx.AsyncClient, LedEngine, Any], body: dict[str, Any], param: str
) -> None:
    answer = await led[0].post("/v1/chat/completions", json=ASKED | {"tools": TOOLS} | body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_schema_that_cannot_be_kept_to_is_named(
    led: tuple[httpx.AsyncClient, LedEngine, Any], choice: str
) -> None:
    wrong = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"pattern": "(x"}}}
    function = {"name": "wrong", "parameters": wrong, "strict": True}
    forms = (None, {"type": "json_object"}) if choice == "auto" else (None,)
    for form in forms:
        body = ASKED | {"tools": [*TOOLS, {"type": "function", "function": function}], "tool_choice": choice}
        answer = await led[0].post("/v1/chat/completions", json=body | {"response_format": form})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "invalid_grammar")
        assert error["param"] == "tools.2.function.parameters.properties.b"


class Stars(pydantic.BaseModel):
    """How good it was."""

    n: int = pydantic.Field(ge=1, le=9)


async def test_openai_s_client_parses_the_arguments(
    led: tuple[httpx.AsyncClient, LedEngine, Any], tool_tokenizer: Tokenizer
) -> None:
    """Its function tools are strict, and its model may choose."""
    _, engine, app = led
    engine.script = tool_tokenizer.encode_continuation('<tool_call>\n{"name": "Stars", "arg')
    async with (
        listening(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked: Any = ASKED | {"model": "tiny/model", "tools": [openai.pydantic_function_tool(Stars)]}
        answer = await client.chat.completions.parse(**asked)
        (called,) = answer.choices[0].message.tool_calls or ()
        assert isinstance(called.function.parsed_arguments, Stars)
        tool: Any = {"type": "function", "name": "Stars", "parameters": STARS, "strict": True}
        more: Any = {"temperature": 1.0, "parallel_tool_calls": False, "max_output_tokens": 120}
        response = await client.responses.create(model="tiny/model", input="hi", tools=[tool], **more)
        (said,) = (item for item in response.output if item.type == "function_call")
        assert 1 <= json.loads(said.arguments)["n"] <= 9
