"""The prefill side's client: follows changes, fetches and verifies files."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from adapter_registry.client import AsyncRegistryClient
from adapter_registry.client_calls import seconds_for
from adapter_registry.errors import (
    DigestMismatchError,
    IllegalTransitionError,
    RegistryUnreachableError,
    StoredFilesDamagedError,
    VersionNotFoundError,
)


@pytest.fixture
async def prefill(registry, tmp_path):
    async with AsyncRegistryClient(registry.url, cache_dir=tmp_path / "cache", replica="prefill-1") as client:
        yield client


def until_a_replica_is_connected(registry):
    while not any(replica.connected for replica in registry.client.replicas().replicas):
        pass


async def test_a_prefill_follows_probes_and_reports(registry, prefill, adapter):
    known = await prefill.state()
    waiting = asyncio.create_task(prefill.changes(known.revision))
    await asyncio.to_thread(until_a_replica_is_connected, registry)
    folder = adapter(1)
    await asyncio.to_thread(registry.push, folder)
    state = await waiting
    version = state.tasks[0].versions[0]
    fetched = await prefill.fetch("support", version.version, version.digest)
    assert fetched.digest == version.digest
    assert fetched.weights.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    record = await prefill.probe("support", version.version, ok=True)
    assert (record.state, record.current) == ("routable", True)
    assert [line.by for line in record.history] == ["127.0.0.1", "prefill-1", "prefill-1"]


async def test_a_report_is_small_whatever_went_wrong(registry, prefill, adapter):
    """Or the registry refuses it, and the version stays as it was pushed."""
    await asyncio.to_thread(registry.push, adapter(1))
    record = await prefill.probe("support", 1, ok=False, reason="got " + "e" * 200_000)
    assert (record.state, len(record.reason)) == ("failed", 1000)


async def test_a_fetched_adapter_is_not_fetched_twice(registry, prefill, adapter, tmp_path):
    digest = registry.push(adapter(1)).digest
    first = await prefill.fetch("support", 1, digest)
    (registry.data / "artefacts" / digest / "prad.json").unlink()
    assert await prefill.fetch("support", 1, digest) == first
    assert [path.name for path in (tmp_path / "cache" / "adapters").iterdir()] == [digest]


async def test_a_damaged_cache_entry_is_fetched_again(registry, prefill, adapter):
    digest = registry.push(adapter(1)).digest
    weights = (await prefill.fetch("support", 1, digest)).weights
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert (await prefill.fetch("support", 1, digest)).weights.read_bytes() == whole


async def test_fetching_at_the_same_time(registry, prefill, adapter, tmp_path):
    digest = registry.push(adapter(1)).digest
    fetched = await asyncio.gather(*(prefill.fetch("support", 1, digest) for _ in range(4)))
    assert {artefact.digest for artefact in fetched} == {digest}
    assert [path.name for path in (tmp_path / "cache" / "adapters").iterdir()] == [digest]


@pytest.mark.parametrize("spoil", [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:-4], lambda b: b""])
async def test_files_that_changed_in_the_registry_are_never_used(registry, prefill, adapter, tmp_path, spoil):
    digest = registry.push(adapter(1)).digest
    stored = registry.data / "artefacts" / digest / "adapter_model.safetensors"
    stored.write_bytes(spoil(stored.read_bytes()))
    with pytest.raises(DigestMismatchError, match="files of support@1"):
        await prefill.fetch("support", 1, digest)
    assert list((tmp_path / "cache" / "adapters").iterdir()) == []
    # Pushing the same files again heals the registry.
    assert not registry.push(adapter(1)).created
    assert (await prefill.fetch("support", 1, digest)).digest == digest


async def test_files_that_are_gone(registry, prefill, adapter):
    digest = registry.push(adapter(1)).digest
    (registry.data / "artefacts" / digest / "prad.json").unlink()
    with pytest.raises(StoredFilesDamagedError, match=r"prad\.json of adapter"):
        await prefill.fetch("support", 1, digest)


async def test_refusals_arrive_as_what_they_were(registry, prefill, adapter):
    registry.push(adapter(1))
    with pytest.raises(VersionNotFoundError):
        await prefill.probe("support", 2, ok=True)
    registry.client.retire("support", 1)
    with pytest.raises(IllegalTransitionError, match="support@1 is retired"):
        await prefill.probe("support", 1, ok=True)


async def test_a_registry_that_must_fetch_the_files_first_is_waited_for(
    registry, prefill, adapter, monkeypatch, tmp_path
):
    """From a bucket, as slowly as one may be."""
    registry.push(adapter(1, values=1 << 14))
    record, asked = registry.client.version("support", 1), []

    def noted(request):
        if "/files/" in request.url.path:
            asked.append(request.extensions["timeout"])

    async def noted_too(request):
        noted(request)

    prefill._http.event_hooks = {"request": [noted_too]}
    registry.client._http.event_hooks = {"request": [noted]}
    await prefill.fetch("support", 1, record.digest)
    await asyncio.to_thread(registry.client.pull, "support", 1, tmp_path / "pulled")
    worst = seconds_for(0) + sum(seconds_for(file.size) for file in record.files)
    assert [each["read"] > worst for each in asked] == [True] * 4
    assert {each["connect"] for each in asked} == {10.0}


async def test_nobody_there(tmp_path):
    async with AsyncRegistryClient("http://127.0.0.1:1", cache_dir=tmp_path, replica="r") as client:
        with pytest.raises(
            RegistryUnreachableError, match=r"no adapter registry answers at http://127.0.0.1:1"
        ):
            await client.state()


def test_the_client_brings_no_server_along():
    program = (
        "import sys, adapter_registry.client;"
        "assert not {'fastapi', 'uvicorn', 'torch', 'sqlite3', 'adapter_registry.store'} & set(sys.modules)"
    )
    # what measures coverage in such a process brings sqlite3 along
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    subprocess.run([sys.executable, "-c", program], check=True, env=plain)


class Watched:
    """A file that knows which threads write to it."""

    def __init__(self, file, threads):
        self._file, self._threads = file, threads

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, data):
        self._threads.add(threading.current_thread())
        return self._file.write(data)


async def test_what_is_downloaded_is_written_beside_the_event_loop(registry, prefill, adapter, monkeypatch):
    digest = registry.push(adapter(1)).digest
    threads = set()

    def watched(path, mode="r", *rest):
        file = open_really(path, mode, *rest)
        if mode != "wb":
            return file
        return Watched(file, threads)

    open_really = Path.open
    monkeypatch.setattr(Path, "open", watched)
    await prefill.fetch("support", 1, digest)
    assert threads
    assert threading.main_thread() not in threads
