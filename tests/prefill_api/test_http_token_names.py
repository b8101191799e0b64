"""Log-probabilities of tokens that are parts of characters: their own bytes, and names that stay apart."""

from collections.abc import Callable
from typing import Any

import httpx

from prad.lm import Tokenizer

FACE = "🙂"


async def test_parts_of_a_character_have_their_bytes(
    app_of: Callable[[Any], Any], scripted: Callable[[str], Any], tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode_continuation(FACE)
    assert len(ids) == 4, "a byte each"
    transport = httpx.ASGITransport(app_of(scripted(f"a{FACE}")))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        user = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}
        chat = (await client.post("/v1/chat/completions", json=user)).json()["choices"][0]
        entries = chat["logprobs"]["content"][:-1]
        assert [entry["bytes"] for entry in entries] == [[97], *([byte] for byte in FACE.encode())]
        assert [entry["token"] for entry in entries[:2]] == ["a", "bytes:\\xf0"]
        assert all(entry["top_logprobs"][0]["bytes"] == entry["bytes"] for entry in entries)
        assert chat["message"]["content"] == f"a{FACE}"
        legacy = (await client.post("/v1/completions", json={"prompt": "x", "logprobs": 1})).json()
        logprobs = legacy["choices"][0]["logprobs"]
        names = ["a", *(f"bytes:\\x{byte:02x}" for byte in FACE.encode())]
        assert logprobs["tokens"][:-1] == names
        assert [list(top) for top in logprobs["top_logprobs"][:-1]] == [[name] for name in names]


def test_no_two_tokens_share_a_name(tokenizer: Tokenizer) -> None:
    names = [tokenizer.token_text(token) for token in range(len(tokenizer))]
    assert len(set(names)) == len(names)
    for token, name in enumerate(names):
        raw = tokenizer.token_bytes(token)
        assert raw == name.encode() or name == "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    assert {bytes([byte]) for byte in range(256)} <= {tokenizer.token_bytes(t) for t in range(len(tokenizer))}
