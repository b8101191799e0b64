"""Whatever JSON comes to the other protocols, the answer is 200 or names what is wrong: never a 5xx."""

from collections.abc import Callable
from typing import Any

import httpx
import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefill_service.api.requests import ChatRequest
from prefill_service.protocols.messages.requests import MessagesRequest
from prefill_service.protocols.responses.requests import ResponsesRequest
from tests.prefill_api.test_any_fields import EXAMPLES, JSON, LIKELY

KINDS = (ChatRequest, MessagesRequest, ResponsesRequest)
NAMES = sorted({name for kind in KINDS for name in (*kind.model_fields, *kind.unsupported, *kind.ignored)})
FIELDS = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), LIKELY | JSON, max_size=3)
TEXT = st.sampled_from(["text", "input_text", "tool_use", "tool_result", "function_call", "message", "image"])
BLOCK = st.fixed_dictionaries(
    {"type": TEXT | JSON},
    optional={
        "text": st.text() | JSON,
        "id": st.text(),
        "name": st.text(),
        "input": JSON,
        "tool_use_id": st.text(),
        "content": JSON,
        "call_id": st.text(),
        "output": JSON,
        "arguments": st.text(),
    },
)
ROLE = st.sampled_from(["user", "assistant", "system", "tool"])
TURN = st.fixed_dictionaries({"role": ROLE, "content": st.text() | st.lists(BLOCK, max_size=2) | JSON})


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=FIELDS, turns=st.lists(TURN, max_size=2), items=st.lists(BLOCK, max_size=2), whole=st.none() | JSON
)
async def test_no_request_is_a_fault_of_ours(
    app_of: Any,
    scripted: Callable[[str], Any],
    fields: dict[str, Any],
    turns: list[Any],
    items: list[Any],
    whole: Any,
) -> None:
    transport = httpx.ASGITransport(app_of(scripted("one two")), raise_app_exceptions=False)
    user = {"role": "user", "content": "hi"}
    messages = {"model": "talk", "max_tokens": 3, "messages": [*turns, user]}
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path, body in (
            ("/v1/messages", whole),
            ("/v1/messages", messages),
            ("/v1/messages", {"model": "talk", "max_tokens": 3, "messages": [user], **fields}),
            ("/v1/messages/count_tokens", {"model": "talk", "messages": [user], **fields}),
            ("/v1/responses", whole),
            ("/v1/responses", {"model": "talk", "input": "hi", **fields}),
            ("/v1/responses", {"model": "talk", "input": [*turns, *items, user]}),
        ):
            sent = {"content": orjson.dumps(body), "headers": {"content-type": "application/json"}}
            response = await client.post(path, **sent)
            assert response.status_code in (200, 400, 404), response.text
            if response.status_code != 200:
                error = response.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert len(error["message"]) < 1100
