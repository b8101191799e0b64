"""The services themselves: strangers, rubbish, lost neighbours, full disks and crowded environments."""

import json
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.proto.handoff_pb2_grpc import DecodeStub
from local_stack.stack import Stack, answers
from tests.outside.asking import Outside, streamed_text

SERVICE = pb.DESCRIPTOR.services_by_name["Decode"].full_name


def test_a_stranger_cancels_nobodys_request(outside: Outside) -> None:
    """A response's id is public, and decode's port open to every process that reaches it."""
    whole = outside.text(max_tokens=400)
    with outside.streaming(max_tokens=400) as events:
        first = next(events)
        with grpc.insecure_channel(outside.stack.decode) as channel:
            said = [pb.TokenControl(attach=pb.Attach(client_id="stranger"))]
            for name in (first["id"], f"{first['id']}-0"):
                for attempt in (0, 1):
                    said.append(pb.TokenControl(cancel=pb.Cancel(request_id=name, attempt=attempt)))
            replies = DecodeStub(channel).Tokens(iter(said))  # type: ignore[no-untyped-call]
            assert next(replies).WhichOneof("reply") == "attached"
            rest = streamed_text(events)
        assert first["choices"][0]["text"] + rest == whole


def test_rubbish_on_decodes_port_harms_nobody_and_fills_no_log(outside: Outside) -> None:
    host, port = outside.stack.decode.split(":")
    for sent in (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"\x16\x03\x01" + bytes(500), os.urandom(4096)):
        with socket.create_connection((host, int(port))) as line:
            line.sendall(sent)
    with grpc.insecure_channel(outside.stack.decode) as channel:
        for method in ("HandOffs", "Tokens"):
            call = channel.stream_stream(f"/{SERVICE}/{method}")
            with pytest.raises(grpc.RpcError):
                list(call(iter([b"\xff" * 100])))
    assert outside.text(task="red")
    assert "Traceback" not in outside.log("decode")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks for the segment in /proc (Linux)")
def test_nobody_cuts_the_memory_that_two_services_share(outside: Outside) -> None:
    """What cuts a mapped file kills whoever reads behind its new end."""
    outside.text()
    files = Path(f"/proc/{outside.process('prefill')}/fd")
    shared = [file for file in files.iterdir() if "memfd:prad-kv" in str(file.readlink())]
    assert shared
    for file in shared:
        with pytest.raises(PermissionError):
            os.truncate(file, 0)
    assert outside.text()


def test_waiting_strangers_take_no_replicas_place(outside: Outside) -> None:
    """More than one address may have waiting: those are told so, and a change still reaches prefill."""
    with outside.registry() as registry, ThreadPoolExecutor(80) as pool:
        after = {"after": registry.state().revision, "wait": 5}
        limits = httpx.Limits(max_connections=None)
        with httpx.Client(base_url=outside.stack.registry, limits=limits, timeout=60) as http:
            waiting = [pool.submit(http.get, "/v1/changes", params=after) for _ in range(80)]
            refused = next(w.result() for w in as_completed(waiting))
            assert refused.status_code == 503
            assert len(registry.promote("red", 1).replicas) == 1
            assert {w.result().status_code for w in waiting} <= {200, 204, 503}


def test_a_web_page_reaches_no_registry(outside: Outside) -> None:
    """DNS rebinding makes Origin and Host agree."""
    url = f"{outside.stack.registry}/v1/tasks/red/versions/1/promote"
    forged = {"host": "evil.example", "origin": "http://evil.example"}
    assert httpx.post(url, headers=forged).status_code == 403
    assert httpx.post(url, headers={"origin": "http://evil.example"}).status_code == 403
    broken = httpx.post(url, headers={"origin": "http://[x"})
    assert (broken.status_code, set(broken.json())) == (403, {"error"})


@pytest.mark.parametrize("service", ["api", "registry"])
def test_a_head_without_an_end_is_not_kept(outside: Outside, service: str) -> None:
    """vllm #23267."""
    url = httpx.URL(outside.stack.registry) if service == "registry" else outside.stack.api.base_url
    told = b""
    with socket.create_connection((url.host, url.port or 80)) as line, suppress(ConnectionError):
        line.sendall(b"GET /health HTTP/1.1\r\nhost: here\r\n")
        for _ in range(64):
            line.sendall(b"x: %s\r\n" % (b"a" * 2**16))
        line.sendall(b"\r\n")
        told = line.recv(100)
    assert told == b"" or told.startswith(b"HTTP/1.1 400 ")


def test_a_large_body_of_a_command_is_not_taken(outside: Outside) -> None:
    url = f"{outside.stack.registry}/v1/tasks/red/versions/1/probe"
    body = json.dumps({"ok": True, "reason": "x" * 20_000_000}).encode()
    refused = httpx.post(url, content=body, headers={"content-type": "application/json"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "upload_too_large")


def texts(choices: Iterable[dict[str, Any]]) -> dict[int, str]:
    """Of each choice, whole or in pieces."""
    said: defaultdict[int, str] = defaultdict(str)
    for choice in choices:
        said[choice["index"]] += choice["text"]
    return said


def test_a_lost_decode_service_ends_no_stream(outside: Outside) -> None:
    """Neither a single answer nor several, nor one of a task: no client sees more of it than a pause."""
    drawn = {"prompt": "x", "max_tokens": 300, "temperature": 0.9, "seed": 3}
    bodies = ({"prompt": "x", "max_tokens": 500}, drawn | {"n": 2}, drawn | {"task": "red"})
    whole = [texts(outside.ask(**body)["choices"]) for body in bodies]
    with ExitStack() as opened:
        streams = [opened.enter_context(outside.streaming(**body)) for body in bodies]
        outside.kill_and_restart("decode")
        said = [texts(c for event in events for c in event["choices"]) for events in streams]
    assert said == whole


@pytest.fixture
def full_registry(
    tmp_path: Path, unused_tcp_port_factory: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """On a disk with less room than it wants, in the environment of a pod beside a Service of its name."""
    for name, value in (("PORT", "tcp://10.96.12.7:8001"), ("SERVICE_HOST", "10.96.12.7")):
        monkeypatch.setenv(f"PRAD_REGISTRY_{name}", value)
    port = unused_tcp_port_factory()
    url = f"http://127.0.0.1:{port}"
    where = ["--port", str(port), "--data-dir", str(tmp_path / "data"), "--min-free-mib", str(2**40)]
    with Stack(tmp_path / "logs") as stack:
        stack.start("registry", where)
        stack.wait_until(lambda: answers(f"{url}/health"), "the registry")
        yield url


def test_a_full_disk_is_said(full_registry: str, tmp_path: Path, make_adapter: Callable[..., Path]) -> None:
    """And the registry has started, whatever Kubernetes wrote into its environment."""
    ready = httpx.get(f"{full_registry}/ready")
    assert (ready.status_code, ready.json()["error"]["code"]) == (507, "storage_full")
    files = [("files", (f.name, f.read_bytes())) for f in make_adapter(1).iterdir()]
    refused = httpx.post(f"{full_registry}/v1/tasks/red/versions", files=files)
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
    assert "min_free_mib" in refused.json()["error"]["message"]
