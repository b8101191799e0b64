"""A push by URI: the door to other hosts, which are listed, bounded and given up when they drip."""

import asyncio
import gzip
import socket
import threading
from contextlib import suppress

import pytest

from adapter_registry.errors import (
    AdapterRefusedError,
    SourceNotAllowedError,
    SourceUnavailableError,
)
from adapter_registry.sources import fetching
from adapter_registry.sources.arrival import Arrival, Promised
from adapter_registry.sources.door import Door
from adapter_registry.sources.places import allowed_sources
from tests.source_servers import ToldServer, dripping


@pytest.fixture
def told():
    server = ToldServer()
    yield server
    server.close()


@pytest.fixture
def other():
    server = ToldServer()
    yield server
    server.close()


def door(tmp_path, *hosts, seconds=30.0):
    return Door(Arrival(tmp_path, "oci://x/y:1", 1 << 20, seconds), hosts)


def test_a_host_that_is_not_listed_is_never_asked(tmp_path, told, other):
    with pytest.raises(SourceNotAllowedError, match="not a host that this registry may ask"):
        door(tmp_path, told.host).read(other.url, {})
    assert other.asked == []


def test_a_redirect_leads_to_listed_hosts_only_and_takes_no_credentials(tmp_path, told, other):
    told.answers["/a"] = (307, {"location": f"{other.url}/b"}, b"")
    other.answers["/b"] = (200, {}, b"there")
    with pytest.raises(SourceNotAllowedError, match=r"sends on to 127\.0\.0\.1:\d+, which is not a host"):
        door(tmp_path, told.host).read(f"{told.url}/a", {"authorization": "secret"})
    assert other.asked == []
    found = door(tmp_path, told.host, other.host).read(f"{told.url}/a", {"authorization": "secret"})
    assert found.content == b"there"
    assert "authorization" in told.asked[-1][1]
    assert "authorization" not in other.asked[-1][1]


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "//evil.example/x",
        "http://[",
    ],
)
def test_a_redirect_to_anything_else_is_refused(tmp_path, told, location):
    told.answers["/a"] = (302, {"location": location}, b"")
    with pytest.raises((SourceNotAllowedError, SourceUnavailableError)):
        door(tmp_path, told.host).read(f"{told.url}/a", {})


def test_redirects_end(tmp_path, told):
    told.answers["/a"] = (302, {"location": "/a"}, b"")
    with pytest.raises(SourceUnavailableError, match="redirects"):
        door(tmp_path, told.host).read(f"{told.url}/a", {})
    assert len(told.asked) == 6


def test_beyond_this_machine_it_is_https(tmp_path):
    with pytest.raises(SourceNotAllowedError, match="not HTTPS"):
        door(tmp_path, "ghcr.io").read("http://ghcr.io/v2/", {})


def test_an_answer_is_bounded(tmp_path, told):
    told.answers["/a"] = (200, {}, bytes(9 << 20))
    with pytest.raises(AdapterRefusedError, match="more than"):
        door(tmp_path, told.host).read(f"{told.url}/a", {})
    assert told.asked[0][1]["accept-encoding"] == "identity"


def test_what_comes_packed_is_refused_before_it_is_unpacked(tmp_path, told):
    told.answers["/plain"] = (200, {"content-encoding": "identity"}, b"as it is")
    assert door(tmp_path, told.host).read(f"{told.url}/plain", {}).content == b"as it is"
    body = gzip.compress(gzip.compress(bytes(9 << 20)))
    assert len(body) < 1000
    for encoding in ("gzip, gzip", "gzip", "br", "zstd", "Deflate", "nonsense"):
        told.answers["/a"] = (200, {"content-encoding": encoding}, body)
        with pytest.raises(
            AdapterRefusedError, match=f"content encoding '{encoding}', where identity was asked"
        ):
            door(tmp_path, told.host).read(f"{told.url}/a", {})


def test_a_source_that_drips_is_given_up(tmp_path):
    with (
        dripping(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n") as host,
        pytest.raises(SourceUnavailableError, match=r"within 0\.3 s .*fetch_seconds"),
    ):
        door(tmp_path, host, seconds=0.3).read(f"http://{host}/", {})


def test_a_source_that_is_not_there(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(SourceUnavailableError, match="cannot be reached"):
        door(tmp_path, f"127.0.0.1:{port}").read(f"http://127.0.0.1:{port}/", {})


@pytest.mark.parametrize(
    "head", [b"", b"HTTP/1.1 200 OK\r\nx: ", b"HTTP/1.1 200 OK\r\ncontent-length: 99999\r\n\r\n"]
)
async def test_a_source_that_drips_its_head_holds_no_thread(tmp_path, monkeypatch, head):
    with dripping(head) as host:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://{host}")
        sources = fetching.Sources(allowed_sources("hf://org", any_folder=True), 1 << 20, 0.3)
        pushes = [sources.fetch("hf://org/support", tmp_path) for _ in range(fetching.MOST_AT_ONCE)]
        for error in await asyncio.gather(*pushes, return_exceptions=True):
            assert isinstance(error, SourceUnavailableError)
            assert "within 0.3 s" in error.message
        monkeypatch.setattr(fetching.folders, "copy", lambda place, allowed, arrival: arrival.uri)
        for _ in range(100):
            with suppress(SourceUnavailableError):  # the threads are about to end
                assert await sources.fetch("file:///x", tmp_path) == "file:///x"
                return
        pytest.fail("no thread has become free")


async def test_only_so_many_fetch_at_once_and_who_waits_too_long_is_told(tmp_path, monkeypatch):
    going, free = threading.Semaphore(0), threading.Event()

    def slow(place, allowed, arrival):
        going.release()
        assert free.wait(30)
        return arrival.uri

    monkeypatch.setattr(fetching.folders, "copy", slow)
    sources = fetching.Sources(allowed_sources("", any_folder=True), 1, 0.2)
    fetches = [asyncio.create_task(sources.fetch("file:///x", tmp_path)) for _ in range(5)]
    for _ in range(fetching.MOST_AT_ONCE):
        await asyncio.to_thread(going.acquire)
    for error in await asyncio.gather(*fetches, return_exceptions=True):
        assert isinstance(error, SourceUnavailableError), "told in time, though no thread is free"
    assert not going.acquire(blocking=False), "the last one never began"
    free.set()
    assert await sources.fetch("file:///x", tmp_path) == "file:///x"


async def test_a_fetch_that_nobody_waits_for_ends(tmp_path, monkeypatch):
    started, ended = threading.Event(), threading.Event()

    def endless(place, allowed, arrival):
        started.set()
        try:
            arrival.write("prad.json", iter(lambda: b"", None), Promised())
        finally:
            ended.set()

    monkeypatch.setattr(fetching.folders, "copy", endless)
    sources = fetching.Sources(allowed_sources("", any_folder=True), 1, 300)
    fetch = asyncio.create_task(sources.fetch("file:///x", tmp_path))
    await asyncio.to_thread(started.wait)
    fetch.cancel()
    assert await asyncio.to_thread(ended.wait, 30)
