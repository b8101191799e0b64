"""Several registries and prefill services on one Redis agree; and whatever of them is killed, whenever,
nothing that was acknowledged is lost."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter_registry.client import RegistryClient
from adapter_registry.probing import wait_probed
from adapter_registry.routing import drawn
from local_stack.stack import answers
from prad.artefact import files_digest
from prad.lm import LanguageModel
from tests.conftest import RunningStack, StackMaker, random_artefact
from tests.redis_process import RedisProcess

PROMPT = [5, 17, 40, 3, 99, 23]
USERS = [f"user {number}" for number in range(12)]


@pytest.fixture
def redis(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RedisProcess]:
    running = RedisProcess(tmp_path_factory.mktemp("r"))
    monkeypatch.setenv("PRAD_REGISTRY_REDIS_URL", running.url)
    yield running
    running.kill()


def complete(running: RunningStack, user: str = "nobody") -> dict[str, Any]:
    body = {"model": "red", "prompt": PROMPT, "raw_prompt": True, "temperature": 0, "max_tokens": 8}
    response = running.api.post("/v1/completions", json=body | {"ignore_eos": True, "user": user})
    assert response.status_code == 200, response.text
    told = response.json()
    return {name: told["prad"][name] for name in ("version", "digest", "routing")} | {
        "text": told["choices"][0]["text"]
    }


def routed(running: RunningStack, revision: int) -> bool:
    return complete(running)["routing"] == revision


def push(url: str, folder: Path) -> dict[str, Any]:
    pushed = httpx.post(f"{url}/v1/tasks/red/versions", json={"path": str(folder)}, timeout=30)
    assert pushed.status_code == 201, pushed.text
    return pushed.json()


def test_two_replicas_of_two_registries_agree(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    running_stack: StackMaker,
    redis: RedisProcess,
) -> None:
    for seed, place in enumerate(("adapters/red", "again"), 1):
        random_artefact(tmp_path / place, load_tiny("llama"), seed)
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
    (tmp_path / "two" / "registry").symlink_to(tmp_path / "one" / "registry")  # one folder of files
    with (
        running_stack(tiny_model("llama"), tmp_path / "adapters", tmp_path / "one") as one,
        running_stack(tiny_model("llama"), None, tmp_path / "two") as two,
        RegistryClient(one.registry) as first,
        RegistryClient(two.registry) as second,
    ):
        push(two.registry, tmp_path / "again")
        wait_probed(first, "red", 2, connect_seconds=60, probe_seconds=60)
        for change in (
            lambda: first.promote("red", 2),
            lambda: second.split("red", {1: 50, 2: 50}),
            lambda: first.rollback("red"),
            lambda: second.rollback("red"),
        ):
            routing = change().routing
            assert first.task("red") == second.task("red")
            for each in (one, two):  # the other's replica hears of it at the same moment, and answers later
                each.stack.wait_until(partial(routed, each, routing.revision), "the change")
            said = [[complete(each, user) for user in USERS] for each in (one, two)]
            assert said[0] == said[1]
            assert [told["version"] for told in said[0]] == [drawn("red", routing.split, u) for u in USERS]


class Operators:
    """Push and promote, one version after the other, whoever is killed meanwhile; what was acknowledged."""

    def __init__(self, url: str, folders: Iterator[Path]) -> None:
        self.url = url
        self.pushed: dict[int, str] = {}
        self.promoted: dict[int, int] = {}
        self.stopped = threading.Event()
        self._folders = folders

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=30) as http:
            while not self.stopped.is_set():
                try:
                    self._change(http, next(self._folders))
                except (httpx.TransportError, AssertionError):
                    time.sleep(0.02)

    def _change(self, http: httpx.Client, folder: Path) -> None:
        wait = {"wait": "ready", "seconds": 2}
        pushed = http.post("/v1/tasks/red/versions", params=wait, json={"path": str(folder)})
        assert pushed.status_code in (200, 201)
        version = pushed.json()["version"]
        self.pushed[version] = pushed.json()["digest"]
        promoted = http.post(f"/v1/tasks/red/versions/{version}/promote")
        assert promoted.status_code == 200
        self.promoted[promoted.json()["routing"]["revision"]] = version


@pytest.mark.timeout(900)
@pytest.mark.parametrize("rounds", [1, pytest.param(4, marks=pytest.mark.long)])
def test_nothing_acknowledged_is_lost_whoever_is_killed(
    rounds: int,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    running_stack: StackMaker,
    redis: RedisProcess,
) -> None:
    model, rng = load_tiny("llama"), random.Random(7)

    def folders() -> Iterator[Path]:
        for seed in range(1, 10_000):
            yield random_artefact(tmp_path / f"adapter-{seed}", model, seed).folder

    with (
        running_stack(tiny_model("llama"), None, tmp_path) as running,
        RegistryClient(running.registry) as registry,
    ):
        operators = Operators(running.registry, folders())
        changing = threading.Thread(target=operators.run)
        changing.start()

        def kill(name: str) -> None:
            if name == "redis":
                redis.kill()
                redis.start()
                return
            (service,) = (each for each in running.stack.services if each.name == name)
            service.process.kill()
            service.process.wait()
            running.stack.restart(name)

        try:
            for name in rng.sample(["redis", "registry", "prefill"] * rounds, 3 * rounds):
                enough = len(operators.promoted) + 2
                running.stack.wait_until(lambda enough=enough: len(operators.promoted) >= enough, "changes")
                time.sleep(rng.uniform(0, 0.2))
                kill(name)
            enough = len(operators.promoted) + 2
            running.stack.wait_until(lambda: len(operators.promoted) >= enough, "changes")
        finally:
            operators.stopped.set()
            changing.join()
        running.stack.wait_until(lambda: answers(f"{running.registry}/ready"), "the registry")
        task = registry.task("red")
        assert operators.pushed.items() <= {each.version: each.digest for each in task.versions}.items()
        assert task.routing.revision >= max(operators.promoted)
        history = registry.history("red", 10_000).events
        promoted = {each.revision: each.version for each in history if each.event == "promote"}
        assert operators.promoted.items() <= promoted.items()
        (kept,) = (tmp_path / "registry" / "redis").iterdir()
        for digest in operators.pushed.values():
            assert files_digest(kept / "artefacts" / digest) == digest
        running.stack.wait_until(lambda: answers(f"{running.api.base_url}/v1/models/red"), "prefill")
        running.stack.wait_until(lambda: complete(running)["version"] == task.routing.default, "it")
