"""The model list, and what operators ask."""

import re
from typing import Any

import httpx
import pytest


async def test_models_are_the_base_and_every_task(client: httpx.AsyncClient) -> None:
    models = (await client.get("/v1/models")).json()
    assert models["object"] == "list"
    base, *tasks = models["data"]
    assert (base["id"], base["parent"], base["max_model_len"]) == ("tiny/model", None, 128)
    assert [task["id"] for task in tasks] == ["e2e", "plain", "talk", "virtual", "wary"]
    e2e = tasks[0]
    assert (e2e["root"], e2e["parent"]) == ("e2e-2-digest", "tiny/model")
    assert (e2e["prad"]["version"], e2e["prad"]["versions"]) == (2, [1, 2])
    assert set(e2e["prad"]["generation"]) == {"temperature", "top_p", "top_k", "min_p", "max_tokens", "stop"}


async def test_what_there_is_not_is_refused_with_what_was_meant(client: httpx.AsyncClient) -> None:
    asked = {"prompt": "x", "temprature": 1, "qqq": 1}
    told = (await client.post("/v1/completions", json=asked)).json()["error"]["message"]
    assert "unknown field 'temprature': did you mean 'temperature'?" in told
    assert "unknown field 'qqq': /docs lists those that there are" in told
    told = (await client.post("/v1/completion", json={})).json()["error"]["message"]
    assert told == ("there is no /v1/completion: did you mean /v1/completions? GET / says where things are")
    told = (await client.post("/v1/chat/completions", json={"prompt": "x"})).json()["error"]["message"]
    assert "unknown field 'prompt': 'prompt' is for /v1/completions, here it is 'messages'" in told
    told = (await client.post("/v1/completions", json={"messages": []})).json()["error"]["message"]
    assert "'messages' is for /v1/chat/completions, here it is 'prompt'" in told
    told = (await client.post("/v1/completions", content="{}")).json()["error"]["message"]
    assert told.endswith("(curl: -H 'content-type: application/json')")


async def test_one_model_is_found_by_any_of_its_names(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models/tiny/model")).json()["id"] == "tiny/model"
    assert (await client.get("/v1/models/e2e")).json()["root"] == "e2e-2-digest"
    assert (await client.get("/v1/models/e2e@1")).json()["root"] == "e2e-1-digest"
    missing = await client.get("/v1/models/nope")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_health_readiness_and_version(client: httpx.AsyncClient, engine: Any) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await client.get("/ready")).status_code == 200
    engine.trouble = "no decode service"
    refused = await client.get("/ready")
    assert (refused.status_code, refused.json()["reasons"]) == (503, ["no decode service"])
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/version")).json()["model_fingerprint"] == "0123456789abcdef"


async def test_metrics_count_by_task_and_not_by_what_clients_write(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "a", "task": "e2e", "max_tokens": 3})
    await client.post("/v1/completions", json={"prompt": "a", "task": "made-up"})
    await client.get("/made-up")
    usage = answer.json()["usage"]
    text = (await client.get("/metrics")).text
    assert f'prad_completion_tokens_total{{task="e2e",version="2"}} {usage["completion_tokens"]}.0' in text
    assert f'prad_prompt_tokens_total{{task="e2e",version="2"}} {usage["prompt_tokens"]}.0' in text
    assert 'prad_http_requests_total{route="/v1/completions",status="404",task="",version=""} 1.0' in text
    assert 'prad_time_to_first_token_seconds_count{route="/v1/completions"} 1.0' in text
    assert 'prad_task_first_token_seconds_count{task="e2e"} 1.0' in text
    assert 'prad_task_token_interval_seconds_count{task="e2e"} 1.0' in text
    assert "made-up" not in text
    assert 'prad_task_routing_revision{task="e2e"} 41.0' in text
    assert 'prad_task_version_weight{digest="e2e-2-digest",task="e2e",version="2"} 100.0' in text


async def test_what_is_asked_with_get_can_be_asked_with_head(client: httpx.AsyncClient, engine: Any) -> None:
    for path in ("/health", "/ready", "/v1/models", "/v1/models/e2e"):
        assert (await client.head(path)).status_code == 200
    engine.trouble = "no decode service"
    assert (await client.head("/ready")).status_code == 503


async def test_the_api_describes_itself(client: httpx.AsyncClient) -> None:
    described = (await client.get("/openapi.json")).json()
    schemas = described["components"]["schemas"]
    assert "truncate_prompt_tokens" in schemas["CompletionRequest"]["properties"]
    assert "messages" in schemas["ChatRequest"]["properties"]
    told = ("CompletionRequest", "ChatRequest", "Message", "StreamOptions", "Tool", "Function", "ToolCall")
    told += ("FunctionCall", "TokenizePrompt", "TokenizeChat", "TokenizeAnswer", "Detokenize")
    told += ("MessagesRequest", "TokensRequest", "ResponsesRequest", "NewBatch")
    for model in told:
        assert all(field["description"] for field in schemas[model]["properties"].values())
    for operations in described["paths"].values():
        for operation in operations.values():
            assert operation["description"]
            assert all(each["description"] for each in operation.get("parameters", ()))
    for path in ("/v1/completions", "/v1/chat/completions"):
        responses = described["paths"][path]["post"]["responses"]
        assert {"200", "400", "404", "408", "413", "415", "429", "503", "504"} <= set(responses)
        assert "text/event-stream" in responses["200"]["content"]
    assert set(described["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
    assert '"422"' not in (await client.get("/openapi.json")).text
    assert {"400", "404"} <= set(described["paths"]["/v1/models/{name}"]["get"]["responses"])
    assert "503" in described["paths"]["/ready"]["get"]["responses"]


@pytest.mark.parametrize("path", ["files", "batches"])
async def test_what_a_list_takes_is_described(client: httpx.AsyncClient, path: str) -> None:
    described = (await client.get("/openapi.json")).json()["paths"][f"/v1/{path}"]
    names = [each["name"] for each in described["get"]["parameters"]]
    assert names == ["limit", "after", "order", *(["purpose"] if path == "files" else [])]
    assert len(described["post"]["requestBody"]["content"]) == 1


async def test_every_body_has_an_example_that_is_taken(client: httpx.AsyncClient) -> None:
    """As far as it is here: a batch's file is not."""
    paths = (await client.get("/openapi.json")).json()["paths"]
    tried = set[str]()
    for path, operations in paths.items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {})
        if "application/json" in content:
            answer = await client.post(path, json=content["application/json"]["example"])
            assert answer.status_code == (404 if path == "/v1/batches" else 200), answer.text
            tried.add(path)
    assert tried == {
        *("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/batches"),
        *("/v1/messages", "/v1/messages/count_tokens", "/v1/responses"),
    }


async def test_the_documentation_needs_no_other_server(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs")).text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(sources) >= 2
    for source in sources:
        assert source.startswith("/"), source
        assert (await client.get(source)).status_code == 200


async def test_the_root_says_where_things_are(client: httpx.AsyncClient) -> None:
    places = (await client.get("/")).json()
    assert (await client.head("/")).status_code == 200
    for name in ("docs", "openapi", "models", "health", "ready", "metrics"):
        assert (await client.get(places[name])).status_code == 200
