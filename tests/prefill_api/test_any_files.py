"""Whatever comes to the endpoints of files and batches, the answer is one that the API's document has."""

from typing import Any

import httpx
import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.prefill_api.batching import COMPLETIONS, Serving, jsonl, line
from tests.prefill_api.test_any_fields import JSON

EXAMPLES = settings().max_examples * 2 // 5
FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after")
QUERY = st.dictionaries(
    st.sampled_from(["limit", "after", "order", "purpose", "x"]),
    st.sampled_from(["0", "1", "-1", "9" * 30, "asc", "desc", "batch", "\u0661", ""]) | st.text(max_size=6),
    max_size=3,
)
NAME = st.sampled_from(["file-x", "batch_x", "%2e%2e", "a%00b", "\u00e9"])
LINES = st.lists(JSON.map(orjson.dumps) | st.binary(max_size=30), max_size=3).map(b"\n".join)


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), JSON, max_size=3),
    whole=st.none() | JSON,
    query=QUERY,
    name=NAME,
    content=LINES,
    form=st.dictionaries(
        st.sampled_from(["purpose", "expires_after[seconds]", "x"]), st.text(max_size=6), max_size=2
    ),
)
async def test_no_file_and_no_batch_is_a_fault_of_ours(
    serving: Serving,
    fields: dict[str, Any],
    whole: Any,
    query: dict[str, str],
    name: str,
    content: bytes,
    form: dict[str, str],
) -> None:
    async with serving() as service:
        client: httpx.AsyncClient = service.client
        paths = (await client.get("/openapi.json")).json()["paths"]

        async def sent(method: str, path: str, place: str, **more: Any) -> httpx.Response:
            answer = await client.request(method, path, **more)
            documented = paths[place][method]["responses"]
            assert str(answer.status_code) in documented, (method, path, answer.text)
            assert answer.status_code < 500, answer.text
            if answer.is_error:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            return answer

        for kind in ("files", "batches"):
            await sent("get", f"/v1/{kind}", f"/v1/{kind}", params=query)
            await sent("get", f"/v1/{kind}/{name}", f"/v1/{kind}/{{name}}")
        await sent("delete", f"/v1/files/{name}", "/v1/files/{name}")
        await sent("get", f"/v1/files/{name}/content", "/v1/files/{name}/content")
        await sent("post", f"/v1/batches/{name}/cancel", "/v1/batches/{name}/cancel")
        await sent("post", "/v1/files", "/v1/files", data=form, files={"file": ("in.jsonl", content)})
        good = {"purpose": "batch"}
        kept = await sent("post", "/v1/files", "/v1/files", data=good, files={"file": ("a", content)})
        given_file = await sent("post", "/v1/files", "/v1/files", data=good, files={"file": jsonl(line("a"))})
        asked = {"endpoint": COMPLETIONS, "completion_window": "24h"}
        for body in (
            whole,
            asked | {"input_file_id": given_file.json()["id"]} | fields,
            asked | {"input_file_id": kept.json().get("id", "none")},
        ):
            headers = {"content-type": "application/json"}
            await sent("post", "/v1/batches", "/v1/batches", content=orjson.dumps(body), headers=headers)
