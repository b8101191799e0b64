"""The playground's way to the API: who gives up frees the place, and what comes is passed on as it came."""

import gzip
import socket
import threading
from contextlib import contextmanager

import httpx
import pytest
from pydantic import ValidationError

from adapter_registry.console import playground
from adapter_registry.settings import RegistrySettings

QUESTION = {"model": "support", "prompt": "how was it?"}
SAID = b'data: {"choices": [{"text": "very good"}]}\n\ndata: [DONE]\n\n'
LONG_S = 30
"""Until a test gives up waiting."""


class Api:
    """Answers a question once `may_answer` is set, compressed for whoever takes that; says who went away."""

    def __init__(self):
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.asked, self.gone, self.may_answer = threading.Event(), threading.Event(), threading.Event()
        self.status = b"200 OK"

    def serve(self):
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            with connection:
                head = connection.recv(65_536).lower()
                self.asked.set()
                if self.may_answer.is_set():
                    self.answer(connection, gzipped=b"gzip" in head)
                else:
                    while connection.recv(65_536):
                        pass
                    self.gone.set()

    def answer(self, connection, *, gzipped):
        body = gzip.compress(SAID) if gzipped else SAID
        coded = b"content-encoding: gzip\r\n" if gzipped else b""
        connection.sendall(b"HTTP/1.1 " + self.status + b"\r\nconnection: close\r\n" + coded + b"\r\n" + body)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65_536):  # a question's body may still come; closed on it the answer is lost
            pass


@contextmanager
def some_api():
    api = Api()
    thread = threading.Thread(target=api.serve)
    thread.start()
    try:
        yield api
    finally:
        api.listening.shutdown(socket.SHUT_RDWR)
        api.listening.close()
        thread.join()


@pytest.fixture
def api():
    with some_api() as running:
        yield running


@pytest.fixture
def asked(serving, data_dir, api):
    """A registry whose playground asks that API."""
    with serving(
        RegistrySettings(port=0, data_dir=data_dir, api_url=api.url, log_level="warning")
    ) as running:
        yield running


def ask(registry):
    return registry.http.post("/console/playground/ask", json=QUESTION)


def test_who_stops_before_the_answer_begins_ends_the_question_and_frees_its_place(
    serving, data_dir, api, monkeypatch
):
    monkeypatch.setattr(playground, "AT_ONCE", 1)
    settings = RegistrySettings(port=0, data_dir=data_dir, api_url=api.url, log_level="warning")
    with serving(settings) as registry:
        url = httpx.URL(registry.url)
        body = httpx.Request("POST", url, json=QUESTION).content
        head = f"POST /console/playground/ask HTTP/1.1\r\nhost: {url.host}\r\ncontent-length: {len(body)}\r\n"
        with socket.create_connection((url.host, url.port)) as client:
            client.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
            assert api.asked.wait(LONG_S)
            assert ask(registry).status_code == 429
            assert not api.gone.is_set()
        assert api.gone.wait(LONG_S)
        api.may_answer.set()
        while (answer := ask(registry)).status_code == 429:
            pass
        assert (answer.status_code, answer.content) == (200, SAID)


@pytest.mark.parametrize("status", [b"200 OK", b"400 Bad Request"])
def test_an_api_that_compresses_is_asked_not_to(api, asked, status):
    api.status = status
    api.may_answer.set()
    answer = ask(asked)
    assert (answer.status_code, answer.content) == (int(status[:3]), SAID)


WRONG = [
    "127.0.0.1:8000",
    "localhost:8000",
    "ftp://api",
    "http://",
    "http://:8000",
    "http://api:port",
    "http://api:99999",
    "http://me:secret@api",
    "http://me@api",
    "http://[::1",
    "http://api?x",
]


@pytest.mark.parametrize("url", ["", "http://a b", *WRONG])
def test_an_address_that_cannot_be_asked_is_an_error_at_the_start(url):
    with pytest.raises(ValidationError, match="api_url"):
        RegistrySettings(api_url=url)


@pytest.mark.parametrize(
    "url", [None, "http://127.0.0.1:8000", "https://api/", "http://[::1]:8000/v1", "http://balancer/prad/v1"]
)
def test_an_address_of_a_service_is_taken(url):
    assert RegistrySettings(api_url=url).api_url == url
