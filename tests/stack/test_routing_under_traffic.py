"""Tasks are loaded, promoted, split, rolled back and retired under steady traffic: no request fails, and each
answer is of the version that the routing which it names allows its user, and what the oracle says of it."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from adapter_registry.client import RegistryClient
from adapter_registry.messages import Rerouted
from adapter_registry.probing import wait_probed
from adapter_registry.routing import drawn
from local_stack.stack import answers
from prad.lm import LanguageModel
from tests.conftest import RunningStack, StackMaker, random_artefact
from tests.oracle import comparing
from tests.oracle.comparing import Served, served
from tests.oracle.reference import Reference

PROMPT = [5, 17, 40, 3, 99, 23]
USERS = [f"user {number}" for number in range(40)]
CLIENTS = 3
OPERATORS = 4


@dataclass(frozen=True)
class Answered:
    """`known`: the revision of the task's routing that was in force before it was asked."""

    task: str
    alias: str | None
    user: str
    known: int
    version: int
    routing: int
    text: str


@dataclass
class Traffic:
    """Clients that ask for tasks in turn, plain and by an alias, until they are stopped. `said`: each
    different answer of a version of a task once, with its log-probabilities."""

    api: httpx.Client
    known: dict[str, int] = field(default_factory=dict)
    answered: list[Answered] = field(default_factory=list)
    said: dict[tuple[str, int, str], Served] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def ask(self, task: str, user: str, alias: str | None = None) -> Answered | None:
        known = self.known[task]
        name = task if alias is None else f"{task}@{alias}"
        body = comparing.body(PROMPT, None, 3, model=name, user=user)
        response = self.api.post("/v1/completions", json=body)
        if response.status_code != 200:
            self.failed.append(f"{name}: {response.text}")
            return None
        told = response.json()
        version, routing, text = told["prad"]["version"], told["prad"]["routing"], told["choices"][0]["text"]
        self.said.setdefault((task, version, text), served(response))
        return Answered(task, alias, user, known, version, routing, text)

    def run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.stopped.is_set():
            if self.known:
                task = rng.choice(list(self.known))
                answer = self.ask(task, rng.choice(USERS), rng.choice([None, None, None, "canary"]))
                self.answered += [] if answer is None else [answer]
            else:
                time.sleep(0.01)


@contextmanager
def steady(api: httpx.Client) -> Iterator[Traffic]:
    traffic = Traffic(api)
    clients = [threading.Thread(target=traffic.run, args=(seed,)) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield traffic
    finally:
        traffic.stopped.set()
        for client in clients:
            client.join()


@dataclass
class Operator:
    registry: RegistryClient
    url: str
    folders: Iterator[Path]
    traffic: Traffic
    trained: dict[tuple[str, int], Path] = field(default_factory=dict)
    retired: dict[str, int] = field(default_factory=dict)
    one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def push(self, task: str) -> int:
        path = f"{self.url}/v1/tasks/{task}/versions"
        with self.one_at_a_time:
            folder = next(self.folders)
        pushed = httpx.post(path, json={"path": str(folder)}, timeout=60)
        assert pushed.status_code == 201, pushed.text
        version: int = pushed.json()["version"]
        self.trained[task, version] = folder
        wait_probed(self.registry, task, version, connect_seconds=60, probe_seconds=60)
        return version

    def start(self, task: str) -> None:
        self.in_force(task, self.registry.alias(task, "canary", self.push(task)).routing.revision)

    def in_force(self, task: str, revision: int) -> None:
        self.registry.replicas(revision, 60)
        self.traffic.known[task] = revision

    def turn(self, task: str) -> None:
        """A new version comes in by and by, is taken back, and comes in; the one before the last goes."""
        registry = self.registry
        old = registry.task(task).routing.default
        new = self.push(task)
        assert old is not None
        changes: tuple[Callable[[], Rerouted], ...] = (
            lambda: registry.alias(task, "canary", new),
            lambda: registry.split(task, {old: 70, new: 30}),
            lambda: registry.split(task, {old: 30, new: 70}),
            lambda: registry.promote(task, new),
            lambda: registry.rollback(task),
            lambda: registry.promote(task, new),
        )
        for change in changes:
            self.in_force(task, change().routing.revision)
        if task in self.retired:
            self.in_force(task, registry.retire(task, self.retired[task]).routing.revision)
        self.retired[task] = old


def check(traffic: Traffic, registry: RegistryClient, operator: Operator, reference: Reference) -> None:
    assert traffic.failed == []
    for (task, version, _), answer in traffic.said.items():
        logits = reference.logits(PROMPT, answer.tokens, operator.trained[task, version])
        comparing.check(answer, logits)
    texts: dict[tuple[str, int], set[str]] = {}
    for task in traffic.known:
        history = registry.history(task, 10_000).events
        routings = {line.revision: line.routing for line in history if line.routing is not None}
        for answer in (each for each in traffic.answered if each.task == task):
            routing = routings[answer.routing]
            assert answer.routing >= answer.known, "what was in force is not forgotten"
            if answer.alias is None:
                assert answer.version == drawn(task, routing.split, answer.user)
            else:
                assert answer.version == routing.meant(answer.alias)
            texts.setdefault((task, answer.version), set()).add(answer.text)
    assert all(len(said) == 1 for said in texts.values()), "a version says the same each time"
    following = [(said, texts.get((task, version + 1))) for (task, version), said in texts.items()]
    pairs = [(said, later) for said, later in following if later is not None]
    # of so few tokens some are the same by chance
    assert sum(said != later for said, later in pairs) > 0.75 * len(pairs) > 0, "and not the one's before"


def folders(root: Path, model: LanguageModel) -> Iterator[Path]:
    for seed in range(1, 10_000):
        random_artefact(root / f"adapter-{seed}", model, seed)
        yield root / f"adapter-{seed}"


@pytest.fixture(scope="module")
def running(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, running_stack: StackMaker
) -> Iterator[RunningStack]:
    with running_stack(tiny_model("llama"), None, tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="module")
def reference(tiny_model: Callable[[str], Path]) -> Reference:
    return Reference(tiny_model("llama"))


def operated(
    running: RunningStack,
    model: LanguageModel,
    reference: Reference,
    root: Path,
    *,
    tasks: int,
    seconds: float,
) -> None:
    """Each task is loaded, and has a turn; and on, in turn, until the time is over."""
    names = [f"task-{number}" for number in range(tasks)]
    with RegistryClient(running.registry) as registry:
        with steady(running.api) as traffic:
            operator = Operator(registry, running.registry, folders(root, model), traffic)
            begun = time.monotonic()

            def operate(own: list[str]) -> None:
                for task in own:
                    operator.start(task)
                turn = 0
                while turn < len(own) or time.monotonic() - begun < seconds:
                    operator.turn(own[turn % len(own)])
                    turn += 1

            with ThreadPoolExecutor(OPERATORS) as pool:
                list(pool.map(operate, (names[at::OPERATORS] for at in range(OPERATORS))))
        check(traffic, registry, operator, reference)
        assert {answer.task for answer in traffic.answered} == set(names)


@pytest.mark.timeout(1500)
def test_no_request_fails_while_tasks_are_routed_anew(
    running: RunningStack, load_tiny: Callable[[str], LanguageModel], reference: Reference, tmp_path: Path
) -> None:
    operated(running, load_tiny("llama"), reference, tmp_path, tasks=40, seconds=20)


def test_users_keep_their_version_over_restarts(
    running: RunningStack, load_tiny: Callable[[str], LanguageModel], reference: Reference, tmp_path: Path
) -> None:
    with RegistryClient(running.registry) as registry:
        traffic = Traffic(running.api)
        operator = Operator(registry, running.registry, folders(tmp_path, load_tiny("llama")), traffic)
        operator.start("t")
        operator.push("t")
        operator.in_force("t", registry.split("t", {1: 50, 2: 50}).routing.revision)
        before = [answer for user in USERS if (answer := traffic.ask("t", user))]
        assert {answer.version for answer in before} == {1, 2}
        for name in ("registry", "prefill"):
            (service,) = (each for each in running.stack.services if each.name == name)
            service.process.kill()
            service.process.wait()
            running.stack.restart(name)
        listed = f"{running.api.base_url}/v1/models/t"
        running.stack.wait_until(lambda: answers(listed), "prefill")
        assert [traffic.ask("t", user) for user in USERS] == before
        traffic.answered += before
        check(traffic, registry, operator, reference)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_no_request_fails_in_ten_minutes_of_routing(
    running: RunningStack, load_tiny: Callable[[str], LanguageModel], reference: Reference, tmp_path: Path
) -> None:
    operated(running, load_tiny("llama"), reference, tmp_path, tasks=200, seconds=600)
