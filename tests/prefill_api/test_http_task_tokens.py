"""Task tokens over HTTP: a chat message and a completion get the same ids, and streams count them."""

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from prad.artefact import AdapterRecord, BaseModelRef
from prad.lm import Tokenizer
from prefill_service.api import ApiLimits, ModelInfo, create_app
from tests.prefill_api.conftest import ScriptedEngine, catalogue_of

TEMPLATE = "<|topic|>Q: {prompt}<|answer|>"


@pytest.fixture
def engine(tokenizer: Tokenizer) -> ScriptedEngine:
    return ScriptedEngine(script=tokenizer.encode_continuation(" food"), eos=tokenizer.eos_id)


@pytest.fixture
async def client(engine: ScriptedEngine, tokenizer: Tokenizer) -> AsyncIterator[httpx.AsyncClient]:
    record = AdapterRecord(
        method="prad-pa",
        config={},
        base=BaseModelRef(name="tiny", architecture="llama", weights="tiny"),
        template=TEMPLATE,
        task_tokens=("<|topic|>", "<|answer|>"),
    )
    info = ModelInfo("0123456789abcdef", 128, len(tokenizer), frozenset())
    limits = ApiLimits(thread_chars=30)
    app: FastAPI = create_app(engine, catalogue_of({"named": record}), tokenizer, info, limits)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as opened:
        yield opened


@pytest.mark.parametrize("text", ["the food", "the <|topic|> food", "the food " * 4])
async def test_the_template_brings_them(
    client: httpx.AsyncClient, engine: ScriptedEngine, tokenizer: Tokenizer, text: str
) -> None:
    """The longest text is tokenised in a thread."""
    expected = (-1, *tokenizer.encode_continuation(f"Q: {text}"), -2)
    message = {"role": "user", "content": text}
    for path, given in (("completions", {"prompt": text}), ("chat/completions", {"messages": [message]})):
        response = await client.post(f"/v1/{path}", json={"task": "named", "max_tokens": 3, **given})
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["prompt_tokens"] == len(expected)
        assert engine.requests[-1].prompt_ids == expected
        raw = await client.post(f"/v1/{path}", json={"task": "named", "raw_prompt": True, **given})
        assert raw.status_code == 200, raw.text
        assert engine.requests[-1].prompt_ids == tuple(tokenizer.encode_prompt(text))


async def test_truncation_keeps_the_last(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = {"task": "named", "prompt": "the food", "max_tokens": 1, "truncate_prompt_tokens": 2}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    kept = engine.requests[-1].prompt_ids
    assert len(kept) == 2
    assert kept[-1] == -2
