"""The running stack from outside: errors, cancelled streams, new versions under traffic, lost services."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from safetensors.torch import load_file, save_file

from adapter_registry.client import RegistryClient
from adapter_registry.versions import State
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.proto.handoff_pb2_grpc import DecodeStub
from local_stack.stack import answers
from prad.artefact import WEIGHTS, Artefact
from prad.lm import LanguageModel
from tests.conftest import RunningStack, StackMaker, random_artefact

PROMPT = [5, 17, 40, 3, 99, 23]


@pytest.fixture(scope="module")
def running(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
    running_stack: StackMaker,
) -> Iterator[RunningStack]:
    root = tmp_path_factory.mktemp("life")
    random_artefact(root / "adapters" / "red", load_tiny("llama"), 1)
    with running_stack(tiny_model("llama"), root / "adapters", root, kv_cache_mib=1) as stack:
        yield stack


def complete(running: RunningStack, **body: Any) -> dict[str, Any]:
    response = running.api.post(
        "/v1/completions", json={"prompt": PROMPT, "raw_prompt": True, "ignore_eos": True} | body
    )
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def until(condition: Callable[[], bool]) -> None:
    """Waits for something that must come; the test's own time-out ends a wait in vain."""
    while not condition():
        time.sleep(0.02)


def blocks(running: RunningStack) -> tuple[int, int]:
    """(free, total) at decode."""
    with grpc.insecure_channel(running.decode) as channel:
        description = DecodeStub(channel).Describe(pb.DescribeRequest())  # type: ignore[no-untyped-call]
    return description.free_blocks, description.total_blocks


def all_free(running: RunningStack) -> bool:
    free, total = blocks(running)
    return free == total and "prad_prefill_live_prompts 0.0" in running.api.get("/metrics").text


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": PROMPT, "task": "blue"}, 404, ["blue", "tasks: red", "the plain model: llama"]),
        ({"prompt": PROMPT, "model": "red@7"}, 404, ["red@7", "red@1"]),
        ({"prompt": [1] * 600}, 400, ["512", "600"]),
        ({"prompt": []}, 400, ["prompt"]),
        ({"prompt": ""}, 400, ["prompt"]),
        ({"prompt": [5, 120]}, 400, ["120", "119"]),
        ({"prompt": PROMPT, "suffix": "x"}, 400, ["suffix", "not supported"]),
        ({"prompt": PROMPT, "wings": 2}, 400, ["wings"]),
        ({"prompt": PROMPT, "temperature": "hot"}, 400, ["temperature"]),
    ],
)
def test_bad_requests_are_named(
    running: RunningStack, body: dict[str, Any], status: int, words: list[str]
) -> None:
    response = running.api.post("/v1/completions", json=body)
    assert response.status_code == status
    message = response.json()["error"]["message"]
    assert all(word in message for word in words), message


def test_bad_json_is_named(running: RunningStack) -> None:
    response = running.api.post(
        "/v1/completions", content=b'{"prompt": ', headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_a_request_that_never_fits_at_decode_is_refused(running: RunningStack) -> None:
    response = running.api.post(
        "/v1/completions", json={"prompt": PROMPT, "n": 16, "max_tokens": 500, "ignore_eos": True}
    )
    assert response.status_code == 400, response.text[:300]
    assert "blocks" in response.json()["error"]["message"]


def test_more_requests_than_decode_has_room_for_are_all_answered(running: RunningStack) -> None:
    free, _ = blocks(running)
    answers_: list[dict[str, Any]] = []
    needed = 2 * (free * 16) // 400
    threads = [
        threading.Thread(target=lambda: answers_.append(complete(running, max_tokens=390)))
        for _ in range(needed)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [a["usage"]["completion_tokens"] for a in answers_] == [390] * needed
    until(lambda: all_free(running))


def test_a_small_request_behind_a_refused_large_one_is_answered(running: RunningStack) -> None:
    large = {"max_tokens": 400, "n": 4}  # decode has room for one of these at a time
    done: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda b=body: done.append(complete(running, **b)))
        for body in (large, large, large, {"max_tokens": 4}, {"max_tokens": 4, "task": "red"})
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert sorted(a["usage"]["completion_tokens"] for a in done) == [4, 4, 1600, 1600, 1600]
    until(lambda: all_free(running))


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_frees_both_sides(running: RunningStack, stream: bool) -> None:
    body = {
        "prompt": PROMPT,
        "raw_prompt": True,
        "task": "red",
        "max_tokens": 450,
        "ignore_eos": True,
        "stream": True,
    }

    def closed_while_it_runs() -> bool:
        with running.api.stream("POST", "/v1/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            assert next(lines).startswith("data: ")
            free, total = blocks(running)
            return free < total

    if stream:
        until(closed_while_it_runs)  # a tiny model may be done before a busy machine looks
    else:
        with pytest.raises(Exception, match="timed out"):
            running.api.post("/v1/completions", json=body | {"stream": False, "n": 4}, timeout=0.2)
    until(lambda: all_free(running))


def test_salts_keep_what_was_asked_apart(running: RunningStack) -> None:
    """Otherwise `cached_tokens` tells one client what another has asked."""
    prompt = [7 + i % 90 for i in range(40)]

    def cached(fields: dict[str, str]) -> int:
        usage = complete(running, prompt=prompt, max_tokens=1, **fields)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    for target in ({}, {"task": "red"}):
        asked = [target | salt for salt in ({}, {"cache_salt": "mine"}, {"cache_salt": "yours"})]
        assert [cached(fields) for fields in asked] == [0, 0, 0]
        assert [cached(fields) for fields in asked] == [32, 32, 32]


def test_a_stop_string_ends_the_choice_and_frees_it(running: RunningStack) -> None:
    whole = complete(running, task="red", max_tokens=60, temperature=0)["choices"][0]["text"].split()
    stop = whole[5]
    first = whole.index(stop)
    cut = complete(running, task="red", max_tokens=60, temperature=0, stop=[stop])["choices"][0]
    assert cut["text"].split() == whole[:first]
    assert cut["finish_reason"] == "stop"
    until(lambda: all_free(running))


def test_a_new_version_arrives_under_traffic(
    running: RunningStack, load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    old = complete(running, task="red", max_tokens=400, temperature=0)
    assert old["prad"]["version"] == 1
    artefact = random_artefact(tmp_path / "red2", load_tiny("llama"), 2)
    before = threading.Event()
    during: list[str] = []

    def read() -> None:
        body = {"prompt": PROMPT, "task": "red", "max_tokens": 400, "temperature": 0} | {
            "ignore_eos": True,
            "raw_prompt": True,
        }
        with running.api.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    during.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
                    before.set()

    reader = threading.Thread(target=read)
    reader.start()
    before.wait()
    with RegistryClient(running.registry) as registry:
        files = [(f.name, f.open("rb")) for f in artefact.files]
        pushed = registry.push("red", files)
        for _, file in files:
            file.close()
        until(lambda: registry.version("red", pushed.version).state is State.VERIFIED)
        assert complete(running, task="red", max_tokens=4)["prad"]["version"] == 1
        until(lambda: running.api.get("/v1/models/red").json()["prad"]["versions"] == [1, 2])
        explicit = complete(running, model="red@2", max_tokens=400, temperature=0)
        assert (explicit["prad"]["version"], explicit["prad"]["digest"]) == (2, artefact.digest)
        for number in (2, 1) * 5 + (2,):
            rerouted = registry.promote("red", number)
            assert len(rerouted.replicas) == 1
            until(lambda promoted=rerouted: not registry.replicas(promoted.routing.revision, 5.0).pending)
            assert complete(running, task="red", max_tokens=1)["prad"]["version"] == number, "at once"
    new = complete(running, task="red", max_tokens=400, temperature=0)
    assert new["choices"][0]["text"] == explicit["choices"][0]["text"] != old["choices"][0]["text"]
    reader.join()
    assert "".join(during) == old["choices"][0]["text"]


def pushed_number(registry: RegistryClient, task: str, artefact: Artefact) -> int:
    with ExitStack() as opened:
        files = [(f.name, opened.enter_context(f.open("rb"))) for f in artefact.files]
        return registry.push(task, files).version


def is_unknown(running: RunningStack, task: str) -> bool:
    body = {"prompt": PROMPT, "raw_prompt": True, "task": task}
    return running.api.post("/v1/completions", json=body).status_code == 404


def test_a_bad_version_fails_its_probe_and_changes_nothing(
    running: RunningStack, load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    artefact = random_artefact(tmp_path / "huge", load_tiny("llama"), 3)
    weights = load_file(artefact.folder / WEIGHTS)
    save_file({name: 1e38 * weight for name, weight in weights.items()}, artefact.folder / WEIGHTS)
    with RegistryClient(running.registry) as registry:
        number = pushed_number(registry, "green", artefact)
        until(lambda: registry.version("green", number).state is State.FAILED)
        assert "not finite" in registry.version("green", number).reason
    assert is_unknown(running, "green")


def test_a_version_for_another_model_is_left_to_who_serves_that(
    running: RunningStack, load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    artefact = random_artefact(tmp_path / "gpt2", load_tiny("gpt2"), 3)
    with RegistryClient(running.registry) as registry:
        number = pushed_number(registry, "blue", artefact)
        name = f"blue@{number}: "
        until(lambda: any(t.startswith(name) for r in registry.replicas().replicas for t in r.troubles))
        assert registry.version("blue", number).state is State.PUSHED
    assert is_unknown(running, "blue")


def test_a_killed_decode_service_that_is_away_too_long_ends_its_streams_and_comes_back(
    tiny_model: Callable[[str], Path], tmp_path: Path, running_stack: StackMaker
) -> None:
    with running_stack(tiny_model("gpt2"), None, tmp_path, prefill={"queue_timeout_s": 1}) as running:
        body = {"prompt": PROMPT, "max_tokens": 500, "ignore_eos": True, "stream": True}
        with running.api.stream("POST", "/v1/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            (decode,) = (each for each in running.stack.services if each.name == "decode")
            decode.process.kill()
            decode.process.wait()
            events = list(lines)
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "decode_unavailable"
        assert "data: [DONE]" not in events, "that would call the answer whole"
        refused = running.api.post("/v1/completions", json={"prompt": PROMPT})
        assert refused.status_code == 503
        running.stack.restart("decode")
        until(lambda: answers(f"{running.api.base_url}/ready"))
        assert complete(running, max_tokens=20)["usage"]["completion_tokens"] == 20


def test_another_model_at_decode_is_noticed(
    tiny_model: Callable[[str], Path], tmp_path: Path, running_stack: StackMaker
) -> None:
    with running_stack(tiny_model("llama"), None, tmp_path, decode_model=tiny_model("mistral")) as running:
        url = f"{running.api.base_url}/ready"

        def reasons() -> list[str]:
            try:
                return httpx.get(url).json()["reasons"]  # type: ignore[no-any-return]
            except httpx.TransportError:
                return []

        until(lambda: any("another model" in reason for reason in reasons()))
        assert running.api.post("/v1/completions", json={"prompt": PROMPT}).status_code == 503
