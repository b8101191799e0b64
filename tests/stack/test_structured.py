"""Structured output and penalties through the real processes, adapted and plain, beside free answers; and
again after decode was killed amid one."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from local_stack.stack import answers
from prad.lm import LanguageModel
from tests.conftest import RunningStack, StackMaker, random_artefact
from tests.lettered import lettered

SCHEMA = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "name": {"type": "string", "minLength": 4, "maxLength": 8},
        "at": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["ok", "name", "at"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
PLAIN = {"prompt": "the restaurant by the river", "max_tokens": 300, "temperature": 0}
DRAWN = {"temperature": 1.1, "seed": 5}
CONSTRAINED: tuple[dict[str, Any], ...] = (
    PLAIN | {"response_format": FORMAT},
    PLAIN | {"response_format": FORMAT, "task": "red"},
    PLAIN | DRAWN | {"guided_json": SCHEMA, "task": "red", "presence_penalty": 1, "n": 2},
)
OTHERS: tuple[dict[str, Any], ...] = (
    PLAIN | {"max_tokens": 30, "ignore_eos": True},
    PLAIN | DRAWN | {"max_tokens": 30, "ignore_eos": True, "task": "red"},
    PLAIN
    | {"max_tokens": 30, "ignore_eos": True, "repetition_penalty": 1.5, "bad_words": ["e"], "task": "red"},
)


@pytest.fixture(scope="module")
def running(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
    running_stack: StackMaker,
) -> Iterator[RunningStack]:
    root = tmp_path_factory.mktemp("structured")
    model = lettered(tiny_model("llama"), root / "model")
    random_artefact(root / "adapters" / "red", load_tiny("llama"), 3, template="{prompt}")
    (root / "stack").mkdir()
    with running_stack(model, root / "adapters", root / "stack") as stack:
        yield stack


def ask(running: RunningStack, body: dict[str, Any]) -> list[str]:
    """The texts of all choices."""
    response = running.api.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


def test_in_a_mix_as_alone(running: RunningStack) -> None:
    asked = [*CONSTRAINED, *OTHERS]
    alone = [ask(running, body) for body in asked]
    for texts in alone[: len(CONSTRAINED)]:
        for text in texts:
            assert list(json.loads(text)) == ["ok", "name", "at"]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(lambda body: ask(running, body), asked)) == alone


def test_again_after_decode_was_killed_amid_an_answer(running: RunningStack) -> None:
    (decode,) = (each for each in running.stack.services if each.name == "decode")
    body = CONSTRAINED[1]
    (expected,), said = ask(running, body), ""
    with running.api.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
            for choice in event.get("choices", ()):
                said += choice["text"]
                decode.process.kill()
    decode.process.wait()
    assert expected.startswith(said)
    ready = f"{running.api.base_url}/ready"
    while answers(ready):
        time.sleep(0.02)
    running.stack.restart("decode")
    while not answers(ready):
        time.sleep(0.02)
    assert ask(running, body) == [expected]
