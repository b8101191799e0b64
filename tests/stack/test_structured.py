"""Structured output and penalties through the real processes, adapted and plain, beside free answers; and on
when decode is killed amid one."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

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


LONG = SCHEMA | {
    "properties": {"name": {"type": "string", "minLength": 120, "maxLength": 160}},
    "required": ["name"],
}
LOST: tuple[dict[str, Any], ...] = (
    PLAIN | {"guided_json": LONG, "task": "red"},
    PLAIN | DRAWN | {"guided_json": LONG, "task": "red", "presence_penalty": 1, "n": 2},
)


@pytest.mark.parametrize("body", LOST, ids=["one", "two"])
def test_answers_go_on_when_decode_is_killed_amid_them(running: RunningStack, body: dict[str, Any]) -> None:
    """Token for token, one of a task and two that are drawn with penalties: its client sees a pause."""
    (decode,) = (each for each in running.stack.services if each.name == "decode")
    expected = ask(running, body)
    said, killed = [""] * len(expected), False
    with running.api.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            for choice in event["choices"]:
                said[choice["index"]] += choice["text"]
            if not killed and all(said):
                killed = True
                decode.process.kill()
                decode.process.wait()
                running.stack.restart("decode")
    assert killed
    assert said == expected
