"""A fleet moves from one base model to the next, on one registry and under traffic: no request fails, every
answer is its model's and version's, and what the old services were answering they finish."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx

from adapter_registry.client import RegistryClient
from adapter_registry.messages import ReplicaState
from adapter_registry.probing import wait_probed
from prad.lm import LanguageModel
from tests.conftest import StackMaker, random_artefact

TASKS = ("red", "green", "blue")
BODY = {"prompt": [5, 17, 40, 3, 99, 23], "raw_prompt": True, "temperature": 0, "ignore_eos": True}
OLD, NEW = 1, 2


def ask(api: httpx.Client, model: str, tokens: int = 4) -> httpx.Response:
    return api.post("/v1/completions", json={**BODY, "model": model, "max_tokens": tokens})


def text(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


class Traffic:
    """Clients that ask at the door, which moves. `answered`: task, version and text of each answer."""

    def __init__(self, door: httpx.Client) -> None:
        self.answered: list[tuple[str, int, str]] = []
        self.failed: list[str] = []
        self._door = door
        self._at = dict.fromkeys(range(2), door)
        self._stopped = threading.Event()
        self._clients = [threading.Thread(target=self._run, args=(seed,)) for seed in self._at]

    def __enter__(self) -> Self:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopped.set()
        for client in self._clients:
            client.join()

    def move(self, door: httpx.Client) -> None:
        """Returns once nobody asks at the old one any more."""
        self._door = door
        until(lambda: set(self._at.values()) == {door})

    def more(self, count: int = 10) -> None:
        """Returns once there are so many more answers."""
        enough = len(self.answered) + count
        until(lambda: len(self.answered) >= enough or bool(self.failed))

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stopped.is_set():
            task = rng.choice(TASKS)
            door = self._at[seed] = self._door
            response = ask(door, task)
            if response.status_code == 200:
                told = response.json()
                self.answered.append((task, told["prad"]["version"], text(told)))
            else:
                self.failed.append(f"{task}: {response.text}")


def until(said: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not said():
        assert time.monotonic() < end
        time.sleep(0.01)


def push(registry: RegistryClient, url: str, task: str, folder: Path) -> None:
    pushed = httpx.post(f"{url}/v1/tasks/{task}/versions", json={"path": str(folder)}, timeout=60)
    assert (pushed.status_code, pushed.json()["version"]) == (201, NEW)
    wait_probed(registry, task, NEW, connect_seconds=60, probe_seconds=60)


def test_a_fleet_moves_to_the_next_base_model(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    running_stack: StackMaker,
) -> None:
    families = {"old": "llama", "new": "qwen3"}
    for place, family in families.items():
        (tmp_path / place).mkdir()
        for seed, task in enumerate(TASKS):
            random_artefact(tmp_path / place / "adapters" / task, load_tiny(family), seed)
    old_model, new_model = map(tiny_model, families.values())
    adapters = tmp_path / "old" / "adapters"
    with (
        running_stack(old_model, adapters, tmp_path / "old") as old,
        RegistryClient(old.registry) as registry,
        Traffic(old.api) as traffic,
        running_stack(new_model, None, tmp_path / "new", followed=old.registry) as new,
    ):
        said = ask(new.api, "red")
        assert said.status_code == 503
        assert (
            "red@1 is not here (it answers as: none): trained on weights" in said.json()["error"]["message"]
        )
        until(lambda: ReplicaState.FAILED in [r.state for r in registry.replicas().replicas])

        for task in TASKS:
            push(registry, old.registry, task, tmp_path / "new" / "adapters" / task)
        traffic.more()
        assert [ask(new.api, f"{task}@2").status_code for task in TASKS] == [200] * len(TASKS)
        assert ask(old.api, "red@2").status_code == 503, "each serves what is for its model"

        for task in TASKS:
            assert registry.split(task, {OLD: 1, NEW: 1}).pending == ()
        states = [(r.state, r.troubles) for r in registry.replicas(registry.state().revision, 30).replicas]
        assert states == [(ReplicaState.READY, ())] * 2
        alone = {
            (task, version): text(ask(api, task).json())
            for task in TASKS
            for version, api in ((OLD, old.api), (NEW, new.api))
        }
        traffic.more()
        assert {version for _, version, _ in traffic.answered} == {OLD}

        whole = text(ask(old.api, "red", 400).json())
        traffic.move(new.api)
        drained: list[str] = []
        under_way = threading.Thread(target=lambda: drained.append(text(ask(old.api, "red", 400).json())))
        under_way.start()
        until(lambda: "prad_prefill_live_prompts 1.0" in old.api.get("/metrics").text)
        (prefill,) = (service for service in old.stack.services if service.name == "prefill")
        prefill.process.terminate()
        under_way.join()
        assert (prefill.process.wait(60), drained) == (0, [whole])

        traffic.more()
        for task in TASKS:
            assert registry.promote(task, NEW).pending == ()
            assert registry.retire(task, OLD).pending == ()
        traffic.more()
        traffic.stop()
    assert traffic.failed == []
    assert {version for _, version, _ in traffic.answered} == {OLD, NEW}
    assert all(said == alone[task, version] for task, version, said in traffic.answered)
    assert all(alone[task, OLD] != alone[task, NEW] for task in TASKS)
