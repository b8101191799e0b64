"""Chunked prompts from outside: short ones overtake a long one, and a client that leaves frees everything."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import RunningStack, StackMaker

LONG = [i % 119 for i in range(480)]


@pytest.fixture(scope="module")
def running(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, running_stack: StackMaker
) -> Iterator[RunningStack]:
    settings = {"pass_tokens": 2, "prefix_cache_mib": 0, "chunked_kv_mib": 2}
    root = tmp_path_factory.mktemp("chunks")
    with running_stack(tiny_model("llama"), None, root, prefill=settings) as stack:
        yield stack


def metric(running: RunningStack, name: str) -> float:
    lines = running.api.get("/metrics").text.splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{name} "))
    return float(value)


def until(condition: Callable[[], bool]) -> None:
    """Waits for something that must come; the test's own time-out ends a wait in vain."""
    while not condition():
        time.sleep(0.01)


def under_way(running: RunningStack) -> bool:
    return metric(running, "prad_prefill_prompt_blocks_in_use") > 0


def test_a_short_prompt_overtakes_a_long_one(running: RunningStack) -> None:
    ended: list[str] = []

    def ask(name: str, prompt: list[int], max_tokens: int) -> None:
        body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        response = running.api.post("/v1/completions", json=body)
        assert response.json()["usage"]["completion_tokens"] == max_tokens
        ended.append(name)

    long = threading.Thread(target=ask, args=("long", LONG, 2))
    long.start()
    until(lambda: under_way(running))
    ask("short", [1, 2, 3], 2)
    long.join()
    assert ended == ["short", "long"]
    until(lambda: not under_way(running))


def test_a_client_that_leaves_amid_chunks_frees_both_sides(running: RunningStack) -> None:
    body = {"prompt": LONG, "max_tokens": 9, "n": 2}
    with pytest.raises(httpx.ReadTimeout):
        running.api.post("/v1/completions", json=body, timeout=0.1)
    until(lambda: metric(running, "prad_prefill_live_prompts") == 0)
    until(lambda: not under_way(running))
    whole = running.api.post("/v1/completions", json=body | {"ignore_eos": True})
    assert whole.json()["usage"]["completion_tokens"] == 18


def test_without_a_cache_nothing_is_looked_up(running: RunningStack) -> None:
    for _ in range(2):
        response = running.api.post("/v1/completions", json={"prompt": LONG[:40], "max_tokens": 1})
        assert response.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert metric(running, "prad_prefill_prefix_prompts_total") == 0
    assert metric(running, "prad_prefill_cached_tokens") == 0
