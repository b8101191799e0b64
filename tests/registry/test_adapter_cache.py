"""Fetched adapters on a replica's disk: bounded, and never taken from whoever uses them."""

import asyncio
import gc
import os
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from adapter_registry import cache as module
from adapter_registry.cache import AdapterCache
from adapter_registry.client import AsyncRegistryClient
from adapter_registry.errors import DigestMismatchError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def digests(registry, adapter) -> list[str]:
    """Of support@1 to support@3."""
    return [registry.push(adapter(seed)).digest for seed in (1, 2, 3)]


def replica(registry, place, cache_bytes=0):
    return AsyncRegistryClient(registry.url, cache_dir=place, replica="prefill-1", cache_bytes=cache_bytes)


def there(place: Path) -> set[str]:
    return {path.name for path in (place / "adapters").iterdir()}


async def test_what_is_used_stays_beyond_every_bound(registry, place, digests):
    async with replica(registry, place) as prefill:
        held = [await prefill.fetch("support", n + 1, digest) for n, digest in enumerate(digests)]
        assert there(place) == set(digests)
        assert held.pop().weights.is_file()
        gc.collect()
        await prefill.tidy()
        assert there(place) == set(digests[:2]), "what nobody refers to any more goes"
        assert all(artefact.weights.is_file() for artefact in held)


async def test_the_least_recently_used_goes_first(registry, place, digests):
    async with replica(registry, place, 1 << 30) as prefill:
        for n, digest in enumerate(digests):
            await prefill.fetch("support", n + 1, digest)
            os.utime(place / "adapters" / digest, (n, n))
        await prefill.fetch("support", 1, digests[0])
    size = sum(path.stat().st_size for path in (place / "adapters" / digests[0]).iterdir())
    gc.collect()
    async with replica(registry, place, 2 * size) as prefill:
        await prefill.tidy()
    assert there(place) == {digests[0], digests[2]}


HOLDS = """
import asyncio, sys
from pathlib import Path
from adapter_registry.cache import AdapterCache

async def main(folder, digest):
    cache = AdapterCache(Path(folder), 0)
    found = await cache.find(digest)
    async with cache.stage():
        print(found.digest, flush=True)
        sys.stdin.read(1)
        import os
        os._exit(1)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_what_another_process_uses_stays_until_it_ends(registry, place, digests):
    async with replica(registry, place, 1 << 30) as prefill:
        for n, digest in enumerate(digests):
            await prefill.fetch("support", n + 1, digest)
    gc.collect()
    mine = AdapterCache(place, 0)
    program = (sys.executable, "-c", HOLDS, str(place), digests[1])
    other = await asyncio.create_subprocess_exec(*program, stdin=PIPE, stdout=PIPE)
    assert await other.stdout.readline() == f"{digests[1]}\n".encode()
    await mine.sweep()
    (half,) = there(place) - {digests[1]}
    assert half.startswith(".fetching-"), "its download is left alone as well"
    await other.communicate(b"x")
    await mine.sweep()
    assert there(place) == set(), "dead: neither is anybody's"
    await mine.close()
    assert {path.name for path in (place / "adapters-in-use").iterdir()} == {"lock"}


@pytest.mark.parametrize(("capacity", "sweeps"), [(1 << 30, 0), (0, 3), (3000, 3)])
async def test_all_entries_are_looked_at_only_once_much_was_added(
    registry, place, digests, monkeypatch, capacity, sweeps
):
    swept = []
    sweep = AdapterCache._sweep
    monkeypatch.setattr(AdapterCache, "_sweep", lambda cache: (swept.append(1), sweep(cache)))
    async with replica(registry, place, capacity) as prefill:
        held = [await prefill.fetch("support", n + 1, digest) for n, digest in enumerate(digests)]
        again = [await prefill.fetch("support", n + 1, digest) for n, digest in enumerate(digests)]
        assert (len(swept), len(held + again)) == (sweeps, 6)
        (process,) = {path.name for path in (place / "adapters-in-use").iterdir()} - {"lock"}
        in_use = (place / "adapters-in-use" / process).read_text(encoding="utf-8").split()
        assert sorted(in_use) == sorted(digests), "each is said once"


async def test_downloads_of_no_known_process_go_when_they_are_old(place):
    cache = AdapterCache(place, 0)
    old, new = (place / "adapters" / name for name in (".fetching-old", ".fetching-new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    os.utime(new)
    await cache.sweep()
    assert there(place) == {".fetching-new"}
    await cache.close()


async def test_a_check_that_takes_too_long_ends_the_fetch(registry, place, digests, monkeypatch):
    monkeypatch.setattr(module, "READ_SECONDS", 0.0)
    async with replica(registry, place) as prefill:
        with pytest.raises(DigestMismatchError, match="not read and checked"):
            await prefill.fetch("support", 1, digests[0])
