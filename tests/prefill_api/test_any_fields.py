"""Whatever JSON comes, the answer is 200 or names what is wrong, in few words: never a 5xx."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prad.lm import Tokenizer
from prefill_service.api import ModelInfo, create_app
from prefill_service.api.messages import Tool
from prefill_service.api.requests import ChatRequest, CompletionRequest
from prefill_service.api.tokens import Detokenize, TokenizePrompt
from prefill_service.api.tool_formats import ARGS, HERMES, LLAMA, MISTRAL, TAGS, call_grammar
from prefill_service.api.tool_tags import as_json
from prefill_service.errors import InvalidRequestError
from tests.prefill_api.conftest import ScriptedEngine, catalogue_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
LIKELY = st.sampled_from(
    [0, 1, 2, -1, 0.5, True, False, "text", "e2e", "talk@1", [], {}, ["x"], [1, 2], [[1], [2, 3]], "x" * 3000]
)
NAMES = sorted(
    {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    | {*TokenizePrompt.model_fields, *Detokenize.model_fields}
    | {*CompletionRequest.unsupported, *ChatRequest.unsupported}
)
FIELDS = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), LIKELY | JSON, max_size=4)
TOOL = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": st.just("f"), "parameters": JSON}),
    }
)
SCHEMA = st.recursive(
    st.dictionaries(
        st.sampled_from(["type", "const", "enum", "$ref", "required", "properties", "anyOf", "$defs"]),
        st.sampled_from([[{}], ["string", []], "string", "integer", 5, "#/properties/a", [[]], {}, None])
        | JSON,
        max_size=3,
    ),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "properties": st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
            "anyOf": st.lists(inner, max_size=2),
            "$defs": st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
            "required": st.lists(JSON, max_size=2),
        },
    ),
    max_leaves=4,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": JSON},
    optional={
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {"id": st.text(), "function": st.fixed_dictionaries({"name": st.text(), "arguments": JSON})}
            ),
            max_size=2,
        ),
        "tool_call_id": LIKELY,
    },
)

EXAMPLES = settings().max_examples // 2
"""An app is made for each, and asked many times."""


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=FIELDS, messages=st.lists(MESSAGE, max_size=2), whole=st.none() | JSON)
async def test_no_request_is_a_fault_of_ours(
    app_of: Any, scripted: Callable[[str], Any], fields: dict[str, Any], messages: list[Any], whole: Any
) -> None:
    transport = httpx.ASGITransport(app_of(scripted("one two")), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        user = {"role": "user", "content": "hi"}
        for path, body in (
            ("/v1/completions", whole),
            ("/v1/completions", {"prompt": "x", **fields}),
            ("/v1/completions", {"prompt": [5, 6], "task": "e2e", "add_template": True, **fields}),
            ("/v1/completions", {"prompt": [[7]], "task": "talk", "raw_prompt": True, **fields}),
            ("/v1/chat/completions", {"messages": [user], "task": "talk", **fields}),
            ("/v1/chat/completions", {"messages": [*messages, user], **fields}),
            ("/tokenize", {"messages": [user, *messages], **fields}),
            ("/tokenize", whole),
            ("/detokenize", {"tokens": [5, 6], **fields}),
        ):
            sent = {"content": orjson.dumps(body), "headers": {"content-type": "application/json"}}
            response = await client.post(path, **sent)
            assert response.status_code in (200, 400, 404), response.text
            if response.status_code != 200:
                error = response.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert len(error["message"]) < 1100


async def test_deep_nesting_and_long_numbers_are_refused(client: httpx.AsyncClient) -> None:
    for value in (b"[" * 945 + b"]" * 945, b'{"a":' * 900 + b"0" + b"}" * 900, b"9" * 4300, b"1e5"):
        for field in (b"max_tokens", b"stop", b"logit_bias", b"prompt", b"metadata", b"x"):
            body = b'{"prompt": "x", "%s": %s}' % (field, value)
            sent = {"content": body, "headers": {"content-type": "application/json"}}
            response = await client.post("/v1/completions", **sent)
            assert response.status_code == (200 if field == b"metadata" and value != b"9" * 4300 else 400)
            assert len(response.content) < 3000 or response.status_code == 200


async def test_what_is_repeated_in_an_error_is_cut(client: httpx.AsyncClient) -> None:
    long = "e" * 15_000
    for body in ({"task": long}, {"model": long}, {"task": f"{long}@x"}, {"model": long, "task": "e2e"}):
        response = await client.post("/v1/completions", json={"prompt": "x", **body})
        assert response.status_code in (400, 404)
        assert len(response.content) < 1300
    assert len((await client.get(f"/{long}")).content) < 1300


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tools=st.lists(TOOL, max_size=2), messages=st.lists(MESSAGE, max_size=2), values=JSON, said=st.text())
async def test_no_tool_is_a_fault_of_ours(
    tool_tokenizer: Tokenizer, tools: list[Any], messages: list[Any], values: Any, said: str
) -> None:
    """Data reach the template as they come: it may stumble, and that is told."""
    engine = ScriptedEngine(script=tool_tokenizer.encode_continuation(said), eos=tool_tokenizer.eos_id)
    info = ModelInfo("0123456789abcdef", 2048, len(tool_tokenizer), frozenset())
    app = create_app(engine, catalogue_of({}), tool_tokenizer, info)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        sent = {"messages": [*messages, {"role": "user", "content": "hi"}], "tools": tools, "max_tokens": 50}
        for more in ({}, {"chat_template_kwargs": {"enable_thinking": values}}):
            body = {
                "content": orjson.dumps({**sent, **more}),
                "headers": {"content-type": "application/json"},
            }
            response = await client.post("/v1/chat/completions", **body)
            assert response.status_code in (200, 400), response.text


@given(schema=SCHEMA, value=st.sampled_from(["7", "x", "null", "[1]"]))
def test_no_schema_of_a_tool_is_a_fault_of_ours(schema: dict[str, Any], value: str) -> None:
    """However a model writes calls."""
    function = {"name": "f", "parameters": schema, "strict": True}
    tool = Tool.model_validate({"type": "function", "function": function})
    for form in (HERMES, MISTRAL, ARGS, TAGS, LLAMA):
        with suppress(InvalidRequestError):
            call_grammar(form, [tool], lambda _: None, parallel=True)
    properties = schema.get("properties")
    for each in [schema, *(properties.values() if isinstance(properties, dict) else ())]:
        orjson.loads(as_json(value, each, schema))
