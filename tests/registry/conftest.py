"""A real registry on a free port, adapters to push, and a prefill replica that only reports."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Response, expect
from safetensors.numpy import save_file
from typer.testing import CliRunner

from adapter_registry.client import RegistryClient
from adapter_registry.messages import Pushed, StoredFile
from adapter_registry.redis_store import RedisStore
from adapter_registry.server import RegistryServer
from adapter_registry.settings import RegistrySettings
from adapter_registry.sqlite_store import SqliteStore
from adapter_registry.store import Store, StoredAdapter
from prad.artefact import WEIGHTS, AdapterRecord, BaseModelRef, read_artefact, write_record
from prad_cli.adapter import app
from tests.chromium import browsing
from tests.redis_process import RedisProcess
from tests.source_servers import s3_server

BUCKET = "s3://adapters/of/prad"
STORES = ("sqlite+folder", "redis+bucket")
CONTRACT = ("disk", "lifecycle", "replicas", "routing")
"""Modules whose tests with a `registry` ask both alike."""
DESK = {"width": 1280, "height": 800}
PHONE = {"width": 360, "height": 780}
EXPECTED = ("the server responded with a status of", "net::ERR_NETWORK_CHANGED")
"""Of what a browser complains: refusals, and that an interface came up on this machine amid a request."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.module.__name__.rpartition("test_registry_")[2]
    told = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if name in CONTRACT and "registry" in metafunc.fixturenames and "registry" not in told:
        metafunc.parametrize("registry", STORES, indirect=True)


@dataclass(frozen=True)
class Running:
    """A registry that serves, and a bare HTTP client for what no client of ours would send."""

    url: str
    http: httpx.Client
    client: RegistryClient
    settings: RegistrySettings
    s3: Any

    @property
    def data(self) -> Path:
        """The folder of its files, or of what it keeps beside a bucket."""
        folder = self.settings.folder
        return next((folder / "redis").iterdir()) if self.settings.redis_url else folder

    @property
    def staged(self) -> list[Path]:
        """What is on its way."""
        return list((self.data / "staging").iterdir())

    @property
    def stored(self) -> set[str]:
        """Digests of the adapters that it keeps; of a bucket also that nothing else is there."""
        if self.settings.bucket is None:
            return {path.name for path in (self.data / "artefacts").iterdir()}
        return {key.split("/")[-3] for key in self.s3.find(BUCKET)}

    @property
    def files(self) -> set[str]:
        """Names of all files that it keeps."""
        if self.settings.bucket is None:
            return {path.name for path in (self.data / "artefacts").glob("*/*")}
        return {key.rpartition("/")[2] for key in self.s3.find(BUCKET)}

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
def _serving(settings: RegistrySettings, s3: Any = None) -> Iterator[Running]:
    """`s3`: a client of the S3 where its bucket is, if it has one."""
    server = RegistryServer(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with httpx.Client(base_url=server.url, timeout=30) as http, RegistryClient(server.url) as client:
            yield Running(server.url, http, client, settings, s3)
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
def registry(request: pytest.FixtureRequest, data_dir: Path) -> Iterator[Running]:
    """By parameter, one of `STORES`."""
    store, _, files = getattr(request, "param", STORES[0]).partition("+")
    more, s3 = {}, None
    if store == "redis":
        more["redis_url"] = request.getfixturevalue("redis").url
    if files == "bucket":
        s3 = request.getfixturevalue("bucket")
        more["files"] = BUCKET
    settings = RegistrySettings(port=0, data_dir=data_dir, max_upload_mib=1, log_level="warning", **more)
    with _serving(settings, s3) as running:
        yield running


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture(scope="session")
def _s3_client(s3_url: str) -> Any:
    import s3fs

    known = {"endpoint_url": s3_url, "key": "a", "secret": "b"}
    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, **known)


@pytest.fixture
def s3(s3_url: str, _s3_client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A client of an S3, as whoever stores adapters has one; the environment tells others where that is."""
    for name, value in {
        "AWS_ENDPOINT_URL_S3": s3_url,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    return _s3_client


@pytest.fixture
def bucket(s3: Any) -> Iterator[Any]:
    """The same client; the bucket of `BUCKET` is there, and empty."""
    s3.call_s3("create_bucket", Bucket="adapters")
    yield s3
    if s3.find("adapters"):
        s3.rm("adapters", recursive=True)
    else:
        s3.call_s3("delete_bucket", Bucket="adapters")


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


@pytest.fixture(scope="module")  # while it is there an event loop runs, which other tests must not meet
def browser() -> Iterator[Browser]:
    with browsing() as opened:
        yield opened


@dataclass
class Opened:
    """A page of the console. `faults`: what the browser complained of, and what it asked of others."""

    page: Page
    url: str
    faults: list[str]

    def go(self, path: str) -> Response | None:
        return self.page.goto(f"{self.url}/console{path}")


@pytest.fixture
def open_console(browser: Browser) -> Iterator[Callable[..., Opened]]:
    """open_console(url) opens a browser of its own, which must not complain, and asks nobody else."""
    opened = []

    def start(url: str, viewport: Any = DESK, **more: Any) -> Opened:
        context = browser.new_context(viewport=viewport, **more)
        page, faults = context.new_page(), []
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: said.type == "error" and faults.append(said.text))
        page.on(
            "request",
            lambda sent: urlsplit(sent.url).netloc != urlsplit(url).netloc and faults.append(sent.url),
        )
        opened.append((context, faults))
        return Opened(page, url, faults)

    expect.set_options(timeout=60_000)
    yield start
    for context, faults in opened:
        context.close()
        assert [fault for fault in faults if not any(map(fault.__contains__, EXPECTED))] == []


@pytest.fixture
def support(registry: Running, adapter: Callable[..., Path]) -> Running:
    """A registry with two verified versions of a task."""
    for seed in (1, 2):
        registry.verified(adapter(seed))
    return registry


@pytest.fixture
def console(support: Running, open_console: Callable[..., Opened]) -> Opened:
    return open_console(support.url)


@pytest.fixture
def prad(registry: Running) -> Callable[..., Any]:
    """prad(...) is `prad adapter ...` at the registry."""
    return lambda *arguments: CliRunner().invoke(app, [*arguments, "--registry", registry.url])
