"""What the tests from outside ask: completions and streams of the API, versions of the registry."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx

from adapter_registry.client import RegistryClient
from adapter_registry.messages import Pushed
from adapter_registry.versions import State
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.proto.handoff_pb2_grpc import DecodeStub
from local_stack.stack import answers
from tests.conftest import RunningStack

LARGE = 240
"""A rank at which an adapter of the tiny model takes more than half a MiB: of two only one is in memory."""
STORY = "It rained all day and all night, and the town by the sea was quiet. "


def until(condition: Callable[[], bool]) -> None:
    """Waits for something that must come; the test's own time-out ends a wait in vain."""
    while not condition():
        time.sleep(0.02)


@dataclass(frozen=True)
class Outside:
    """The shared stack, seen as a client and as an operator see it."""

    stack: RunningStack

    def post(self, body: object, path: str = "/v1/completions", **more: Any) -> httpx.Response:
        return self.stack.api.post(path, json=body, **more)

    def ask(self, **body: Any) -> dict[str, Any]:
        """A greedy answer of 12 tokens, unless `body` says otherwise."""
        asked = {"prompt": STORY, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **body}
        response = self.post(asked)
        assert response.status_code == 200, response.text[:500]
        return response.json()  # type: ignore[no-any-return]

    def text(self, **body: Any) -> str:
        return str(self.ask(**body)["choices"][0]["text"])

    def ask_together(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(lambda body: self.ask(**body), bodies))

    @contextmanager
    def streaming(self, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of a stream, [DONE] left out; the first has come."""
        asked = {"prompt": STORY, "temperature": 0, "ignore_eos": True, "stream": True, **body}
        with self.stack.api.stream("POST", "/v1/completions", json=asked) as response:
            assert response.status_code == 200, response.read()
            lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
            events = (json.loads(line) for line in lines if line != "[DONE]")
            first = next(events)
            yield _behind(first, events)

    @contextmanager
    def registry(self) -> Iterator[RegistryClient]:
        with RegistryClient(self.stack.registry) as client:
            yield client

    def push(self, task: str, folder: Path, *, promote: bool = False) -> Pushed:
        """Pushes a version, and waits until a probe has verified it and prefill knows it."""
        with self.registry() as registry:
            pushed = upload(registry, task, folder)
            until(lambda: registry.version(task, pushed.version).state in (State.VERIFIED, State.ROUTABLE))
            if promote:
                registry.promote(task, pushed.version)
        until(lambda: answers(f"{self.stack.api.base_url}/v1/models/{pushed.name}"))
        return pushed

    def blocks(self) -> tuple[int, int]:
        """(free, total) at decode."""
        with grpc.insecure_channel(self.stack.decode) as channel:
            described = DecodeStub(channel).Describe(pb.DescribeRequest())  # type: ignore[no-untyped-call]
        return described.free_blocks, described.total_blocks

    def all_free(self) -> bool:
        free, total = self.blocks()
        return free == total

    def log(self, service: str) -> str:
        (found,) = (s for s in self.stack.stack.services if s.name == service)
        return found.log.read_text(encoding="utf-8")

    def process(self, service: str) -> int:
        (found,) = (s for s in self.stack.stack.services if s.name == service)
        return found.process.pid

    def kill_and_restart(self, service: str) -> None:
        """As `kill -9` does it, and whoever watches: the same command again."""
        (found,) = (s for s in self.stack.stack.services if s.name == service)
        found.process.kill()
        found.process.wait()
        self.stack.stack.restart(service)


def upload(registry: RegistryClient, task: str, folder: Path) -> Pushed:
    with ExitStack() as opened:
        files = [(f.name, opened.enter_context(f.open("rb"))) for f in sorted(folder.iterdir())]
        return registry.push(task, files)


def _behind(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest


def streamed_text(events: Iterator[dict[str, Any]]) -> str:
    """Raises AssertionError if the stream ends with an error."""
    texts = []
    for event in events:
        assert "error" not in event, event
        texts.extend(choice["text"] for choice in event["choices"])
    return "".join(texts)
