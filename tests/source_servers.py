"""Servers that adapters are fetched from in tests: an OCI registry, an S3, and what answers as it is told."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

import httpx
import pytest

REQUIRED = "PRAD_REQUIRE_SOURCES"
_START_S = 60.0


def _missing(what: str, install: str) -> None:
    """Skips the test, loudly; fails it where that is required."""
    reason = (
        f"NOT RUN: there is no {what} here, so pushes by URI were not tested against one; install it "
        f"({install}). {REQUIRED}=1 makes this a failure"
    )
    if os.environ.get(REQUIRED):
        pytest.fail(reason)
    pytest.skip(reason)


def require_packages(*names: str) -> None:
    for name in names:
        if find_spec(name) is None:
            _missing(f"package {name}", "pip install -e '.[dev]'")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def docker_registry(folder: Path, auth: Mapping[str, Any] | None = None) -> Iterator[str]:
    """HOST:PORT of Debian's docker-registry, with its data in `folder`. `auth`: its settings for that."""
    binary = shutil.which("docker-registry")
    if binary is None:
        _missing("docker-registry", "Debian: apt-get install docker-registry")
    assert binary is not None
    host = f"127.0.0.1:{free_port()}"
    asked = "" if auth is None else f"auth: {{htpasswd: {{realm: tests, path: {auth['htpasswd']}}}}}\n"
    settings = folder / "registry.yml"
    storage = f"storage: {{filesystem: {{rootdirectory: {folder / 'blobs'}}}}}"
    settings.write_text(f"version: 0.1\n{storage}\nhttp: {{addr: '{host}'}}\n{asked}", encoding="utf-8")
    with _process([binary, "serve", str(settings)], f"http://{host}/v2/", folder / "registry.log"):
        yield host


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """The URL of an S3 that moto plays, in a process of its own; what it keeps is gone afterwards."""
    require_packages("moto", "flask", "flask_cors", "s3fs")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _process(command, f"http://127.0.0.1:{port}/", folder / "s3.log"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _process(command: list[str], url: str, log: Path) -> Iterator[None]:
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        by = time.monotonic() + _START_S
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > by:
                pytest.fail(f"{command[0]} did not start: {log.read_text(encoding='utf-8')}")
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code < 500
    except httpx.TransportError:
        return False


@contextmanager
def dripping(begin: bytes) -> Iterator[str]:
    """HOST:PORT of what answers every request with `begin`, and then a byte now and then, without end."""
    done = threading.Event()

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                self.request.recv(65536)
                self.request.sendall(begin)
                while not done.wait(0.02):
                    self.request.sendall(b"x")

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            done.set()
            server.shutdown()
            thread.join()


class Gate:
    """A port that leads to a server's: while it is `open`; `closed`, it ends every connection, and `silent`,
    it takes what is sent and passes nothing on."""

    def __init__(self, url: str) -> None:
        self._at = url.rpartition(":")[2]
        self._mode = "open"
        self._pipes: list[socket.socket] = []
        gate = self

        class Handler(BaseRequestHandler):
            def handle(self) -> None:
                gate._lead(self.request)

        class Server(ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def set(self, mode: str) -> None:
        self._mode = mode
        self._end()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._end()

    def _end(self) -> None:
        pipes, self._pipes = self._pipes, []
        for each in pipes:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _lead(self, near: socket.socket) -> None:
        if self._mode == "closed":
            return
        with socket.create_connection(("127.0.0.1", int(self._at))) as far, suppress(OSError):
            self._pipes += [near, far]
            back = threading.Thread(target=self._pump, args=(far, near), daemon=True)
            back.start()
            self._pump(near, far)
            back.join()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(65536):
                if self._mode == "open":
                    target.sendall(piece)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


class ToldServer:
    """Answers on a port of this machine as `answers` says: by path, a status, headers and a body; else 404.

    `asked`: (path with its query, headers) of every request.
    """

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        told = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                told.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                status, headers, body = told.answers.get(self.path.partition("?")[0], (404, {}, b"no"))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "content-length" not in {name.lower() for name in headers}:
                    self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
