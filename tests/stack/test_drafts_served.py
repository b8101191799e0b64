"""Drafts from outside: one client at a time gets the answers of a stack that guesses nothing, whatever its
prompt's way to decode, and again after a decode service was lost amid an answer."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from local_stack.stack import answers
from prad.lm import LanguageModel
from tests.conftest import RunningStack, StackMaker, random_artefact

TEXT = [(11 * i + 3 * i * i) % 119 for i in range(200)]
CHUNKED = {"pass_tokens": 40, "chunked_kv_mib": 2, "prefix_cache_mib": 2}
BODY = {"max_tokens": 90, "ignore_eos": True, "raw_prompt": True, "temperature": 0}
SEEDED = {"temperature": 0.4, "top_p": 0.95, "seed": 11}
ASKED: tuple[dict[str, Any], ...] = (
    BODY | {"prompt": TEXT[:9]},
    BODY | {"prompt": TEXT[:150], "task": "red"},
    BODY | SEEDED | {"prompt": TEXT[20:60], "task": "red"},
    BODY | SEEDED | {"prompt": TEXT[30:180], "n": 2},
)
LONG = BODY | {"prompt": TEXT[5:60], "task": "red", "max_tokens": 400}


def texts(running: RunningStack, body: dict[str, Any]) -> list[str]:
    """Of all choices, streamed."""
    said = [""] * body.get("n", 1)
    with running.api.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    said[choice["index"]] += choice["text"]
    whole = running.api.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in whole["choices"]] == said
    assert whole["usage"]["completion_tokens"] == body["max_tokens"] * len(said)
    return said


def accepted(port: int) -> float:
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("prad_decode_accepted_tokens_total "))
    return float(value)


def kill_decode_amid(running: RunningStack, body: dict[str, Any]) -> str:
    """What had come of the answer."""
    (decode,) = (each for each in running.stack.services if each.name == "decode")
    said = ""
    with running.api.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
            for choice in event.get("choices", ()):
                said += choice["text"]
            if len(said.split()) > 20:
                decode.process.kill()
    decode.process.wait()
    return said


def test_drafts_change_no_answer(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    running_stack: StackMaker,
    unused_tcp_port_factory: Callable[[], int],
) -> None:
    random_artefact(tmp_path / "adapters" / "red", load_tiny("llama"), 1)
    stacks = [tmp_path / name for name in ("plain", "drafting")]
    for root in stacks:
        root.mkdir()
    where = tiny_model("llama"), tmp_path / "adapters"
    with running_stack(*where, stacks[0], prefill=CHUNKED, speculate=0) as plain:
        expected = [texts(plain, body) for body in (*ASKED, LONG)]
    port = unused_tcp_port_factory()
    with running_stack(*where, stacks[1], prefill=CHUNKED, speculate=8, metrics_port=port) as drafting:

        def ask_until_drafts_are_right() -> None:
            """When one pays depends on the machine; that one does in the end is certain."""
            while True:
                assert [texts(drafting, body) for body in (*ASKED, LONG)] == expected
                if accepted(port) > 0:
                    return

        ask_until_drafts_are_right()
        said = kill_decode_amid(drafting, LONG)
        assert expected[-1][0].startswith(said)
        drafting.stack.restart("decode")
        while not answers(f"{drafting.api.base_url}/ready"):
            time.sleep(0.02)
        ask_until_drafts_are_right()
