"""Thousands of tasks in the registry, on SQLite and on Redis, and one replica that follows it.

register   each task's only version pushed, checked, stored, reported as verified: tasks a second
list       all tasks, as the registry tells them; all that the replica answers
change     of one routing among them, until it is in force at the replica, and the bytes that tell it; beside
           them those of everything, which a replica is told that is new
start      of the registry with all of it on disk; of the replica with none of the adapters on its own disk
           (cold; once: the second store has the same ones), and with all of them (warm): until it is ready,
           then until it has answered for one task whose adapter no request has named, and from its start
           until every adapter is there
memory     of both, what they share with nobody; of Redis

A replica of a registry without tasks stands beside them. How long resolving a request's task to its version
takes is measured in-process.
"""

import shutil
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
from redis import Redis
from rich.console import Console

from adapter_registry.client import RegistryClient
from adapter_registry.routing import Routing
from bench.adapters import write_artefacts
from bench.flags import Registry
from bench.model import load, model_folder
from bench.rounds import seconds
from local_stack.stack import Stack, StackError, answers, free_ports
from prad.artefact import WEIGHTS, Artefact, read_artefact
from prefill_service.catalogue import TaskCatalogue, TaskVersions
from prefill_service.prompt import TaskVersion

_PUSHING = 4  # at once
_PATIENCE_S = 600.0
_LOOK_S = 0.05
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class _Child:
    """One service of ours, ready after `start_s`; `begun`: by the clock of `time.perf_counter`."""

    url: str
    start_s: float
    pid: int
    begun: float

    @property
    def memory_mib(self) -> float:
        return round(float(psutil.Process(self.pid).memory_full_info().uss) / _MIB, 1)

    def get_ms(self, path: str, rounds: int) -> float:
        """The median of as many GETs, to the answer's last byte."""
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as http:
            took = [seconds(lambda: http.get(path).raise_for_status())() for _ in range(rounds)]
        return round(1e3 * statistics.median(took), 1)

    def first_answer_ms(self, task: str) -> float:
        """Of a completion of one token."""
        body = {"model": task, "prompt": "one", "max_tokens": 1}
        with httpx.Client(base_url=self.url, timeout=_PATIENCE_S, trust_env=False) as http:
            took = seconds(lambda: http.post("/v1/completions", json=body).raise_for_status())()
        return round(1e3 * took, 1)

    def all_there_s(self) -> float:
        """From its start until it fetches nothing any more."""
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as http:
            while http.get("/ready").raise_for_status().json()["fetching"]:
                time.sleep(_LOOK_S)
        return round(time.perf_counter() - self.begun, 2)


class _Fleet:
    """Starts what is measured; `root` is its place for everything."""

    def __init__(self, root: Path, arguments: Registry) -> None:
        self._root = root
        self._common = ["--model", str(model_folder(arguments)), "--device", "cpu", "--cache-dir"]
        self._kernels = arguments.cache_dir.expanduser() / "kernels"
        self._decode, self._metrics = free_ports(2)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        ports = ["--port", str(self._decode), "--metrics-port", str(self._metrics)]
        with Stack(self._root / "logs") as stack:
            stack.start("decode", [*self._common, self._cache("decode"), *ports])
            yield

    @contextmanager
    def registry(self, data: Path, redis_url: str | None) -> Iterator[_Child]:
        where = ["--data-dir", str(data), *([] if redis_url is None else ["--redis-url", redis_url])]
        with self._started("registry", where) as child:
            yield child

    @contextmanager
    def replica(self, registry: _Child, cache: str) -> Iterator[_Child]:
        """`cache`: its adapters' folder, by a name; with what an earlier one left there."""
        where = ["--registry", registry.url, "--decode", f"127.0.0.1:{self._decode}"]
        with self._started("prefill", [*self._common, self._cache(cache), *where]) as child:
            yield child

    @contextmanager
    def _started(self, name: str, arguments: list[str]) -> Iterator[_Child]:
        (port,) = free_ports(1)
        url = f"http://127.0.0.1:{port}"
        with Stack(self._root / "logs") as stack:
            begun = time.perf_counter()
            stack.start(name, [*arguments, "--port", str(port)])
            stack.wait_until(lambda: answers(f"{url}/ready"), name)
            took = time.perf_counter() - begun
            yield _Child(url, round(took, 2), stack.services[0].process.pid, begun)

    def has_adapters(self, cache: str) -> bool:
        return (self._root / "caches" / cache / "adapters").exists()

    def _cache(self, name: str) -> str:
        folder = self._root / "caches" / name
        folder.mkdir(parents=True, exist_ok=True)
        kernels = folder / "kernels"
        if not kernels.exists():
            kernels.symlink_to(self._kernels)
        return str(folder)


def run(arguments: Registry) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="prad-bench-") as name:
        root = Path(name)
        (folder,) = write_artefacts(root / "adapters", load(arguments), "prad-pa", 1, arguments.r)
        adapter = read_artefact(root / "adapters" / folder)
        fleet = _Fleet(root, arguments)
        with fleet.decoding():
            rows = [_of_no_tasks(root / "nothing", fleet)]
            for store in arguments.stores:
                with _redis(root / "redis", wanted=store == "redis") as redis:
                    if (store == "redis") == (redis is not None):
                        measured = _measured(root / store, redis, fleet, adapter, arguments)
                        rows.append({"store": store} | measured)
                shutil.rmtree(root / store, ignore_errors=True)
        size = sum(path.stat().st_size for path in adapter.files)
        resolve_us = _resolve_us(adapter, arguments.tasks)
    adapters = {"adapter_mib": round(size / _MIB, 2), "resolve_us": resolve_us}
    return {"model": arguments.model, **adapters, "rows": rows}


def _of_no_tasks(data: Path, fleet: _Fleet) -> dict[str, Any]:
    with fleet.registry(data, None) as registry, fleet.replica(registry, "none") as replica:
        return {
            "store": "no tasks",
            "registry_start_s": registry.start_s,
            "registry_memory_mib": registry.memory_mib,
            "warm_start_s": replica.start_s,
            "replica_memory_mib": replica.memory_mib,
        }


def _measured(
    data: Path, redis: "Redis | None", fleet: _Fleet, adapter: Artefact, arguments: Registry
) -> dict[str, Any]:
    url = None if redis is None else f"redis://127.0.0.1:{redis.get_connection_kwargs()['port']}/0"
    rounds = arguments.rounds
    row: dict[str, Any] = {"tasks": arguments.tasks}
    cold = not fleet.has_adapters("all")
    with fleet.registry(data, url) as registry:
        took = seconds(lambda: _register(registry.url, adapter, data.with_name("pushed"), arguments.tasks))()
        row["registered_per_s"] = round(arguments.tasks / took, 1)
    with fleet.registry(data, url) as registry:
        row |= {"registry_start_s": registry.start_s, "list_ms": registry.get_ms("/v1/tasks", rounds)}
        with fleet.replica(registry, "all") as replica:
            row |= _start("cold", replica, arguments.tasks) if cold else {}
        with fleet.replica(registry, "all") as replica, RegistryClient(registry.url, timeout=60) as client:
            row |= _start("warm", replica, arguments.tasks)
            row |= {
                "models_ms": replica.get_ms("/v1/models", rounds),
                "change_ms": _change_ms(client, rounds),
                **_bytes_told(client, registry.url),
                "replica_memory_mib": replica.memory_mib,
                "registry_memory_mib": registry.memory_mib,
            }
    if redis is not None:
        row["redis_memory_mib"] = round(redis.info("memory")["used_memory"] / _MIB, 1)
    return row


def _start(kind: str, replica: _Child, tasks: int) -> dict[str, Any]:
    """The last task is the last in the background, too."""
    return {
        f"{kind}_start_s": replica.start_s,
        f"{kind}_on_demand_ms": replica.first_answer_ms(_task(tasks - 1)),
        f"{kind}_all_there_s": replica.all_there_s(),
    }


def _bytes_told(client: RegistryClient, url: str) -> dict[str, int]:
    """To a replica that knows all but one change, and to one that knows nothing."""
    known = client.state()
    client.alias(_task(0), "told", 1)
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:

        def told(mark: str) -> int:
            asked: dict[str, str | int] = {"after": known.revision, "mark": mark}
            return len(http.get("/v1/changes", params=asked).raise_for_status().content)

        return {"change_bytes": told(known.mark), "whole_bytes": told("")}


def _change_ms(client: RegistryClient, rounds: int) -> float:
    """The median of as many aliases, each of another task, until it is in force at the replica."""

    def change(number: int) -> None:
        if client.alias(_task(number), "tried", 1).pending:
            raise StackError("the replica did not put a change in force in time")

    return round(1e3 * statistics.median(seconds(partial(change, number))() for number in range(rounds)), 1)


def _task(number: int) -> str:
    return f"task-{number:05}"


def _register(url: str, adapter: Artefact, root: Path, tasks: int) -> None:
    """Each task with one version, whose files are nobody else's."""

    def register(first: int) -> None:
        folder = root / str(first)
        shutil.copytree(adapter.folder, folder)
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
            for number in range(first, tasks, _PUSHING):
                _make_unlike(folder / WEIGHTS, number)
                path = f"/v1/tasks/{_task(number)}/versions"
                http.post(path, json={"path": str(folder)}).raise_for_status()
                http.post(f"{path}/1/probe", json={"ok": True}).raise_for_status()

    with ThreadPoolExecutor(_PUSHING) as pool:
        list(pool.map(register, range(_PUSHING)))
    shutil.rmtree(root)


def _make_unlike(weights: Path, number: int) -> None:
    """Writes the number into the first values of the file, as signs of 16 small ones: float32 or bfloat16."""
    with weights.open("r+b") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        file.write(struct.pack("<16H", *(0x3C00 | ((number >> bit & 1) << 15) for bit in range(16))))


def _resolve_us(adapter: Artefact, tasks: int) -> float:
    catalogue = TaskCatalogue("plain")
    version = TaskVersion("task", 1, adapter.digest, adapter)
    routed = TaskVersions.of(Routing(revision=1, split={1: 100}), {1: version})
    names = [_task(number) for number in range(tasks)]
    catalogue.replace(dict.fromkeys(names, routed))
    took = seconds(lambda: [catalogue.resolve(name, None, "somebody") for name in names])()
    return round(1e6 * took / tasks, 2)


@contextmanager
def _redis(folder: Path, *, wanted: bool) -> "Iterator[Redis | None]":
    """A Redis that keeps what it acknowledges; None if none is wanted, or there is no program for it here."""
    program = shutil.which("redis-server")
    if not wanted or program is None:
        if wanted:
            Console(stderr=True).print("there is no redis-server here: redis is left out")
        yield None
        return
    folder.mkdir()
    (port,) = free_ports(1)
    lasting = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
    command = [program, "--port", str(port), "--dir", str(folder), *lasting]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process, Redis(port=port) as client:
        try:
            yield client
        finally:
            process.terminate()
