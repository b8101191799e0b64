"""Drafts from outside: one client at a time gets the answers of a stack that guesses nothing, whatever its
prompt's way to decode, and again after a decode service was lost amid an answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from prad.lm import LanguageModel
from tests.conftest import RunningStack, StackMaker, random_artefact

TEXT = [(11 * i + 3 * i * i) % 119 for i in range(200)]
CHUNKED = {"pass_tokens": 40, "chunked_kv_mib": 2, "prefix_cache_mib": 2}
BODY = {"max_tokens": 40, "ignore_eos": True, "raw_prompt": True, "temperature": 0}
SEEDED = {"temperature": 0.4, "top_p": 0.95, "seed": 11}
LONG = BODY | {"prompt": TEXT[5:60], "task": "red", "max_tokens": 200}
ASKED: tuple[dict[str, Any], ...] = (
    LONG,
    BODY | {"prompt": TEXT[:9]},
    BODY | {"prompt": TEXT[:150], "task": "red"},
    BODY | SEEDED | {"prompt": TEXT[20:60], "task": "red"},
    BODY | SEEDED | {"prompt": TEXT[30:180], "n": 2},
)


def whole(running: RunningStack, body: dict[str, Any]) -> list[str]:
    """The texts of all choices."""
    answer = running.api.post("/v1/completions", json=body).json()
    return [choice["text"] for choice in answer["choices"]]


def streamed(running: RunningStack, body: dict[str, Any]) -> list[str]:
    """The same, of the pieces that came."""
    said = [""] * body.get("n", 1)
    with running.api.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    said[choice["index"]] += choice["text"]
    return said


def accepted(port: int) -> float:
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("prad_decode_accepted_tokens_total "))
    return float(value)


def kill_decode_amid(running: RunningStack, body: dict[str, Any]) -> str:
    """The answer, which goes on when decode is back."""
    (decode,) = (each for each in running.stack.services if each.name == "decode")
    said, killed = "", False
    with running.api.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
            for choice in event.get("choices", ()):
                said += choice["text"]
            if len(said.split()) > 20 and not killed:
                killed = True
                decode.process.kill()
                decode.process.wait()
                running.stack.restart("decode")
    assert killed
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
        expected = [whole(plain, body) for body in ASKED]
    port = unused_tcp_port_factory()
    with running_stack(*where, stacks[1], prefill=CHUNKED, speculate=8, metrics_port=port) as drafting:

        def until_drafts_are_right(ask: Callable[[RunningStack, dict[str, Any]], list[str]]) -> None:
            """When one pays depends on the machine; that one does in the end is certain."""
            before = accepted(port)
            while True:
                assert [ask(drafting, body) for body in ASKED] == expected
                if accepted(port) > before:
                    return

        until_drafts_are_right(streamed)
        until_drafts_are_right(whole)
        assert kill_decode_amid(drafting, LONG) == expected[0][0]
        until_drafts_are_right(streamed)
