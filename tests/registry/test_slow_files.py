"""A registry whose files come slowly: what else it is asked is not kept waiting by those."""

import asyncio
import threading
from concurrent.futures import Future

import httpx
import pytest

from adapter_registry import registry as registry_module
from adapter_registry.artefacts import ArtefactFolder
from adapter_registry.settings import RegistrySettings
from adapter_registry.sharing import Shared


@pytest.fixture
def slow(data_dir, serving, adapter, monkeypatch):
    """A registry with three versions, two threads for their files, and an event until which none comes."""
    monkeypatch.setattr(registry_module, "FILE_WORKERS", 2)
    come, file = threading.Event(), ArtefactFolder.file

    def after_a_while(*given):
        come.wait()
        return file(*given)

    with serving(RegistrySettings(port=0, data_dir=data_dir, log_level="warning")) as registry:
        for seed in (1, 2, 3):
            registry.push(adapter(seed))
        monkeypatch.setattr(ArtefactFolder, "file", after_a_while)
        yield registry, come
        come.set()


async def test_slow_files_keep_neither_pushes_nor_readiness_waiting(slow, adapter):
    registry, come = slow
    async with httpx.AsyncClient(base_url=registry.url, timeout=30) as client:
        path = "/v1/tasks/support/versions"
        asking = [
            asyncio.create_task(client.get(f"{path}/{number}/files/prad.json"))
            for number in (1, 1, 1, 2, 2, 3, 3)
        ]
        assert (await client.get("/ready")).status_code == 200
        assert (await client.post(path, json={"path": str(adapter(4))})).status_code == 201
        assert not any(each.done() for each in asking)
        come.set()
        assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}


class Workers:
    """Whose work ends when it is told to."""

    def __init__(self):
        self.begun = []

    def submit(self, work):
        self.begun.append((work, Future()))
        return self.begun[-1][1]


async def test_what_many_ask_for_is_done_once():
    workers = Workers()
    shared = Shared(workers)
    asking = [asyncio.create_task(shared.do("one", len)) for _ in range(3)]
    beside = asyncio.create_task(shared.do("other", sum))
    await asyncio.sleep(0)
    (one, found), (other, failing) = workers.begun
    assert (one, other) == (len, sum)
    asking[0].cancel()
    found.set_result(1)
    failing.set_exception(OSError("broken"))
    assert await asyncio.gather(*asking[1:]) == [1, 1]
    with pytest.raises(OSError, match="broken"):
        await beside
    again = asyncio.create_task(shared.do("one", len))
    await asyncio.sleep(0)
    assert len(workers.begun) == 3, "what is asked for later is done anew"
    workers.begun[2][1].set_result(2)
    assert await again == 2
