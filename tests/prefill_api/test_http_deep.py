"""Bodies that are nested deeper than what writes JSON follows: they are refused by the field, on any path."""

from typing import Any

import httpx
import orjson
import pytest

USER = {"role": "user", "content": "hi"}
DEEP = orjson.loads('{"a":' * 300 + "1" + "}" * 300)
DEEPER = orjson.loads("[" * 900 + "]" * 900)
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


def turn(**block: Any) -> dict[str, Any]:
    role = "assistant" if block["type"] == "tool_use" else "user"
    return {"max_tokens": 2, "messages": [USER, {"role": role, "content": [block]}, USER]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [USER], "guided_json": DEEP}, "guided_json"),
        (CHAT, {"messages": [USER], "structured_outputs": {"json": DEEP}}, "structured_outputs.json"),
        (
            CHAT,
            {
                "messages": [USER],
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": DEEP}},
            },
            "response_format.json_schema.schema",
        ),
        (MESSAGES, turn(type="tool_use", id="a", name="b", input=DEEP), "messages.1.content.0.input"),
        (MESSAGES, turn(type="tool_result", tool_use_id="a", content=5), "messages.1.content.0.content"),
        (MESSAGES, turn(type="tool_result", tool_use_id="a", content=[{"type": DEEPER}]), None),
        (RESPONSES, {"input": "hi", "text": {"format": {"type": "text", "schema": DEEP}}}, "text.format"),
        (RESPONSES, {"input": "hi", "text": {"format": {"type": "json_schema", "schema": DEEP}}}, None),
        (RESPONSES, {"input": [{"type": DEEPER}]}, "input.0"),
    ],
)
async def test_what_is_too_deep_is_refused(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str | None
) -> None:
    answer = await client.post(path, json={"model": "talk", **body})
    assert answer.status_code == 400, answer.text
    assert param in (None, answer.json()["error"]["param"]), answer.text
