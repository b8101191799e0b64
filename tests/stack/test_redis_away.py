"""A stack whose registry is kept in Redis: Redis and registry are killed, requests go on being answered."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from adapter_registry.client import RegistryClient
from local_stack.stack import answers
from prad.lm import LanguageModel
from tests.conftest import RunningStack, StackMaker, random_artefact
from tests.redis_process import RedisProcess

PROMPT = [5, 17, 40, 3, 99, 23]


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    running = RedisProcess(tmp_path_factory.mktemp("r"))
    yield running
    running.kill()


def complete(running: RunningStack, model: str) -> tuple[int, str]:
    body = {"model": model, "prompt": PROMPT, "raw_prompt": True, "temperature": 0, "max_tokens": 8}
    body |= {"ignore_eos": True}
    response = running.api.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["prad"]["version"], response.json()["choices"][0]["text"]


def test_requests_go_on_without_redis_and_nothing_is_lost(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    running_stack: StackMaker,
    redis: RedisProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PRAD_REGISTRY_REDIS_URL", redis.url)
    random_artefact(tmp_path / "adapters" / "red", load_tiny("llama"), 1)
    with (
        running_stack(tiny_model("llama"), tmp_path / "adapters", tmp_path) as running,
        RegistryClient(running.registry) as registry,
    ):
        first = complete(running, "red")
        assert first[0] == 1
        before = registry.state()
        redis.kill()
        assert httpx.get(f"{running.registry}/ready").status_code == 503
        assert complete(running, "red") == complete(running, "red@1") == first
        assert running.api.get("/ready").status_code == 200, "prefill is as ready as before"
        redis.start()
        running.stack.wait_until(lambda: answers(f"{running.registry}/ready"), "Redis")
        assert registry.state() == before

        # a version that came meanwhile is probed and served, and the registry's end changes nothing either
        random_artefact(tmp_path / "blue", load_tiny("llama"), 2)
        pushed = httpx.post(
            f"{running.registry}/v1/tasks/red/versions", json={"path": str(tmp_path / "blue")}, timeout=30
        )
        assert pushed.status_code == 201, pushed.text
        running.stack.wait_until(lambda: registry.version("red", 2).state.answers, "the probe")
        assert registry.promote("red", 2).pending == ()
        second = complete(running, "red")
        assert second[0] == 2
        (service,) = (each for each in running.stack.services if each.name == "registry")
        service.process.kill()
        service.process.wait()
        assert complete(running, "red") == second
        assert complete(running, "red@1") == first
        running.stack.wait_until(lambda: "prad_registry_up 0.0" in running.api.get("/metrics").text, "it")
        told = running.api.get("/ready")
        assert (told.status_code, told.json()["status"]) == (200, "ready")
        assert "tasks are served as known last" in told.json()["warnings"][0]
        running.stack.restart("registry")
        running.stack.wait_until(lambda: answers(f"{running.registry}/ready"), "the registry")
        assert registry.task("red").routing.default == 2
        running.stack.wait_until(lambda: "prad_registry_up 1.0" in running.api.get("/metrics").text, "it")
        assert "warnings" not in running.api.get("/ready").json()
        assert registry.promote("red", 1).routing.default == 1
        running.stack.wait_until(lambda: complete(running, "red") == first, "the change")
