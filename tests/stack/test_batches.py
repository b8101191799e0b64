"""Batches on the real stack: prefill, decode and `prad batch` are killed in the middle and started again;
every line is answered once, as it is without."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from local_stack.stack import answers
from prad.lm import LanguageModel
from tests.conftest import RunningStack, StackMaker, random_artefact

COMPLETIONS = "/v1/completions"
TASKS = ("red", "green")
LINES = 60


def until(true: Callable[[], Any]) -> None:
    """The test's own time-out ends a wait in vain."""
    while not true():
        time.sleep(0.01)


@pytest.fixture(scope="module")
def stack(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    running_stack: StackMaker,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningStack]:
    root = tmp_path_factory.mktemp("batches")
    for seed, name in enumerate(TASKS, start=1):
        random_artefact(root / "adapters" / name, load_tiny("llama"), seed)
    settings = {"files_dir": root / "files", "batch_at_once": 4}
    with running_stack(tiny_model("llama"), root / "adapters", root, prefill=settings) as running:
        yield running


def requests(tokens: int) -> list[dict[str, Any]]:
    body = {"max_tokens": tokens, "ignore_eos": True, "raw_prompt": True, "temperature": 0.7}
    return [
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": COMPLETIONS,
            "body": {"model": TASKS[number % 2], "prompt": [1 + number, 2, 3], "seed": number, **body},
        }
        for number in range(LINES)
    ]


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def texts(content: str) -> dict[str, str]:
    """What was answered to each line, of which there is one each."""
    found = [json.loads(line) for line in content.splitlines()]
    assert len({line["custom_id"] for line in found}) == len(found) == LINES
    return {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in found}


def asked_by_hand(api: httpx.Client, lines: list[dict[str, Any]]) -> dict[str, str]:
    return {
        line["custom_id"]: api.post(COMPLETIONS, json=line["body"]).json()["choices"][0]["text"]
        for line in lines
    }


@pytest.mark.parametrize("killed", ["prefill", "decode"])
def test_a_kill_of_a_service_loses_no_line_and_answers_none_twice(stack: RunningStack, killed: str) -> None:
    lines = requests(tokens=60)
    sent = stack.api.post("/v1/files", files={"file": ("in", jsonl(lines))}, data={"purpose": "batch"}).json()
    wanted = {"input_file_id": sent["id"], "endpoint": COMPLETIONS, "completion_window": "1h"}
    where = f"/v1/batches/{stack.api.post('/v1/batches', json=wanted).json()['id']}"

    def batch() -> dict[str, Any]:
        return stack.api.get(where).json()  # type: ignore[no-any-return]

    until(lambda: batch()["request_counts"]["completed"] >= 8)
    live = stack.api.post(COMPLETIONS, json=lines[0]["body"])
    assert live.status_code == 200  # beside the batch
    (service,) = (service for service in stack.stack.services if service.name == killed)
    service.process.kill()
    service.process.wait()
    stack.stack.restart(killed)
    until(lambda: answers(f"{stack.api.base_url}/ready"))
    until(lambda: batch()["status"] == "completed")
    assert batch()["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
    content = stack.api.get(f"/v1/files/{batch()['output_file_id']}/content").text
    assert texts(content) == asked_by_hand(stack.api, lines)


def test_a_kill_of_the_command_loses_no_line_and_asks_none_twice(stack: RunningStack, tmp_path: Path) -> None:
    lines = requests(tokens=40)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl(lines))
    command = [sys.executable, "-m", "prad_cli", "batch", str(source), str(target), "--at-once", "2"]
    command += ["--url", str(stack.api.base_url)]
    with subprocess.Popen(command) as running:
        until(lambda: target.is_file() and target.read_bytes().count(b"\n") >= 5)
        running.kill()
    before = target.read_bytes().count(b"\n")
    assert before < LINES
    ended = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True, encoding="utf-8")
    said = json.loads(ended.stdout)
    assert (said["requests"], said["asked"], said["refused"]) == (LINES, LINES - before, 0)
    assert texts(target.read_text(encoding="utf-8")) == asked_by_hand(stack.api, lines)
