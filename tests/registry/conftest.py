"""A real registry on a free port, adapters to push, and a prefill replica that only reports."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from adapter_registry.client import RegistryClient
from adapter_registry.messages import Pushed, StoredFile
from adapter_registry.redis_store import RedisStore
from adapter_registry.server import RegistryServer
from adapter_registry.settings import RegistrySettings
from adapter_registry.sqlite_store import SqliteStore
from adapter_registry.store import Store, StoredAdapter
from prad.artefact import WEIGHTS, AdapterRecord, BaseModelRef, read_artefact, write_record
from tests.redis_process import RedisProcess


@dataclass(frozen=True)
class Running:
    """A registry that serves, and a bare HTTP client for what no client of ours would send."""

    url: str
    http: httpx.Client
    client: RegistryClient
    data: Path

    def push(self, folder: Path, task: str = "support") -> Pushed:
        with ExitStack() as opened:
            paths = read_artefact(folder).files
            return self.client.push(task, [(p.name, opened.enter_context(p.open("rb"))) for p in paths])

    def probe(self, name: str, *, ok: bool = True, reason: str = "") -> httpx.Response:
        task, _, number = name.partition("@")
        body = {"ok": ok, "reason": reason, "replica": "prefill-1"}
        return self.http.post(f"/v1/tasks/{task}/versions/{number}/probe", json=body)

    def verified(self, folder: Path, task: str = "support") -> str:
        """Pushes and reports a good probe; the name of the version."""
        name = self.push(folder, task).name
        assert self.probe(name).status_code == 200
        return name


@contextmanager
def _serving(settings: RegistrySettings) -> Iterator[Running]:
    server = RegistryServer(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with httpx.Client(base_url=server.url, timeout=30) as http, RegistryClient(server.url) as client:
            yield Running(server.url, http, client, settings.folder)
    finally:
        server.stop()
        thread.join()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def serving() -> Callable[[RegistrySettings], AbstractContextManager[Running]]:
    """For tests that start registries of their own."""
    return _serving


@pytest.fixture
def registry(data_dir: Path) -> Iterator[Running]:
    with _serving(
        RegistrySettings(port=0, data_dir=data_dir, max_upload_mib=1, log_level="warning")
    ) as running:
        yield running


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """adapter(seed) writes a valid adapter folder; another seed, another digest."""

    def write(seed: int = 0, *, values: int = 64) -> Path:
        folder = tmp_path / f"adapter-{seed}-{values}"
        folder.mkdir(exist_ok=True)
        weights = np.random.default_rng(seed).standard_normal((values, 4)).astype(np.float32)
        save_file({"layers.0.down": weights}, folder / WEIGHTS)
        base = BaseModelRef(name="tiny", architecture="llama-test", weights="0" * 64)
        write_record(folder, AdapterRecord(method="pa", config={"rank": 4}, base=base, licence="MIT"))
        return folder

    return write


@pytest.fixture(scope="session")
def _shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    running = RedisProcess(tmp_path_factory.mktemp("r"))
    yield running
    running.kill()


@pytest.fixture
def redis(_shared_redis: RedisProcess) -> RedisProcess:
    """A Redis that keeps what it acknowledges, empty."""
    _shared_redis.empty()
    return _shared_redis


@pytest.fixture
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """new_store(kind, name) opens an empty store, "sqlite" or "redis"; another name, another store."""
    opened: dict[tuple[str, str], Store] = {}

    def open_store(kind: str, name: str = "store") -> Store:
        if kind == "sqlite":
            opened[kind, name] = SqliteStore(tmp_path / f"{name}.sqlite3")
        else:
            number = sum(other == "redis" for other, _ in opened)
            running: RedisProcess = request.getfixturevalue("redis")
            opened[kind, name] = RedisStore(f"{running.url}?db={number}")
        return opened[kind, name]

    yield open_store
    for store in opened.values():
        store.close()


@pytest.fixture
def stored_adapter() -> Callable[[int], StoredAdapter]:
    """stored_adapter(seed): what a store is told of checked files; another seed, another digest."""

    def make(seed: int) -> StoredAdapter:
        base = BaseModelRef(name="tiny", architecture="llama-test", weights="0" * 64)
        record = AdapterRecord(method="pa", config={"rank": 4}, base=base, description=f"number {seed}")
        files = (StoredFile(name="prad.json", size=100), StoredFile(name=WEIGHTS, size=1000))
        return StoredAdapter(f"{seed:064x}", record, files, 1, 900)

    return make
