"""An API that answers as one is told to: chats with what was asked, turned round."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "a-key"
MODELS: dict[str, dict[str, Any]] = {
    "small": {"id": "small"},
    "story": {"id": "story", "prad": {"chat_template": True}},
    "sort": {"id": "sort", "prad": {"chat_template": False}},
}


@dataclass
class FakeApi:
    """`asked`: the bodies that came, with their paths; `hold`: until it is set, a stream waits behind its
    first word; `ahead_s`: of its clock."""

    url: str = ""
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    ahead_s: float = 0.0
    key: str = ""
    ready: bool = True
    usage: bool = True
    spaced: bool = False
    """JSON with spaces, as some servers write it."""
    only_list: bool = False
    """Models are listed, and there is no page for each."""
    page: str = ""
    """What everything is answered with, of a server that is no API."""
    moved: str = ""
    """Where it is now."""


class _Handler(BaseHTTPRequestHandler):
    api: FakeApi
    protocol_version = "HTTP/1.0"

    def log_message(self, *_: object) -> None:
        pass

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string((timestamp or time.time()) + self.api.ahead_s)

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if self._elsewhere():
            return None
        if self.path == "/ready":
            told = {"reasons": [] if self.api.ready else ["no decode service"]}
            return self._json(told, 200 if self.api.ready else 503)
        if self.path in ("/", "/metrics"):
            return self._json({"service": "a fake"})
        if self._refused():
            return None
        if self.path == "/v1/models":
            return self._json({"data": list(MODELS.values())})
        if name in MODELS and not self.api.only_list:
            return self._json(MODELS[name])
        return self._json({"error": {"message": f"no model {name!r}; GET /v1/models lists them"}}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self._elsewhere() or self._refused():
            return None
        self.api.asked.append((self.path, body))
        chat = self.path == "/v1/chat/completions"
        words = (body["messages"][-1]["content"] if chat else body["prompt"]).split()
        if words == ["fail"]:
            return self._json({"error": {"message": "that is refused: ask for something else"}}, 400)
        return self._stream(body, words[::-1], chat)

    def _stream(self, body: dict[str, Any], words: list[str], chat: bool) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        if chat:
            self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for number, word in enumerate(words):
            said = word.upper() if word == "hold" else word  # a terminal shows what was typed, too
            piece = f" {said}" if number else said
            choice = {"index": 0, "delta": {"content": piece}} if chat else {"index": 0, "text": piece}
            self._event({"choices": [choice]})
            if words[0] == "hold" and not self.api.hold.wait(60):
                return
        if self.api.usage:
            self._event({"choices": [], "usage": {"completion_tokens": len(words)}})
        with suppress(ConnectionError):
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, told: dict[str, Any]) -> None:
        text = json.dumps(told, separators=None if self.api.spaced else (",", ":"))
        with suppress(ConnectionError):  # whoever asked is gone
            self.wfile.write(f"data: {text}\n\n".encode())

    def _elsewhere(self) -> bool:
        if self.api.moved:
            self.send_response(308)
            self.send_header("location", self.api.moved)
            self.end_headers()
        elif self.api.page:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.api.page.encode())
        return bool(self.api.moved or self.api.page)

    def _refused(self) -> bool:
        if self.api.key and self.headers["authorization"] != f"Bearer {self.api.key}":
            self._json({"error": {"message": "an API key is needed: prad keys create NAME"}}, 401)
            return True
        return False

    def _json(self, told: object, status: int = 200) -> None:
        text = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("x-request-id", str(time.time_ns()))
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def fake_api() -> Iterator[FakeApi]:
    api = FakeApi()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": api}))
    server.daemon_threads = True
    api.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield api
    finally:
        api.hold.set()
        server.shutdown()
        server.server_close()
        thread.join()
