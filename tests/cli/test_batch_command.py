"""`prad batch`: every request gets one answer, whatever breaks it off, and mistakes are one line."""

import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_chat import Terminal
from tests.cli.test_command_line import one_line, prad


@dataclass
class Asked:
    """What a server heard, by custom_id, which the prompts are; it is busy for the first `busy` of them."""

    url: str = ""
    prompts: list[str] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    busy: int = 0
    hold: threading.Event = field(default_factory=threading.Event)
    """What an answer to `slow` waits for, of which nothing comes."""


@pytest.fixture
def server() -> Iterator[Asked]:
    asked = Asked()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(200, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.prompts.append(body["prompt"])
            asked.keys.add(self.headers["authorization"])
            if len(asked.prompts) <= asked.busy:
                self._answer(503, {"error": {"message": "busy"}})
            elif body["prompt"] == "slow":
                asked.hold.wait(60)
            elif body["prompt"] == "who":
                self._answer(401, {"detail": "show a key"})
            elif body["prompt"] == "wrong":
                self._answer(400, {"error": {"message": "what is this?"}})
            else:
                self._answer(200, {"choices": [{"text": f"{self.path} {body['prompt']}"}]})

        def _answer(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.send_header("x-request-id", "req-1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        asked.url = f"http://127.0.0.1:{listening.server_address[1]}"
        yield asked
        asked.hold.set()
        listening.shutdown()
        thread.join()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def write(path: Path, *names: str, **more: Any) -> None:
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": name, **more}}
        for name in names
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def answers(path: Path) -> dict[str, Any]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({line["custom_id"] for line in found}) == len(found)
    return {line["custom_id"]: line["response"] for line in found}


def test_it_goes_on_where_it_was_broken_off_and_asks_nothing_twice(
    server: Asked, files: tuple[Path, Path]
) -> None:
    source, target = files
    write(source, *(f"r{number}" for number in range(20)))
    ended = prad("batch", source, target, "--url", f"{server.url}/v1", "--at-once", "4", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    said = json.loads(ended.stdout)
    assert (said["requests"], said["asked"], said["refused"]) == (20, 20, 0)
    first = answers(target)
    assert first["r7"]["body"]["choices"][0]["text"] == "/v1/completions r7"
    whole = target.read_bytes()
    target.write_bytes(whole[: len(whole) // 2])  # as a kill leaves it: the last line is torn
    kept = whole[: len(whole) // 2].count(b"\n")
    server.prompts.clear()
    ended = prad("batch", source, target, "--url", server.url)
    assert ended.returncode == 0, ended.stderr
    assert (answers(target), len(server.prompts)) == (first, 20 - kept)
    server.prompts.clear()
    assert prad("batch", source, target, "--url", server.url).returncode == 0
    assert server.prompts == []


def test_a_busy_server_is_asked_again_and_a_refusal_is_an_answer(
    server: Asked, files: tuple[Path, Path]
) -> None:
    source, target = files
    write(source, "one", "wrong")
    server.busy = 1
    ended = prad("batch", source, target, "--url", server.url, "--at-once", "1")
    assert ended.returncode == 1
    assert "1 request was refused" in one_line(ended.stderr)
    assert {name: said["status_code"] for name, said in answers(target).items()} == {"one": 200, "wrong": 400}
    assert server.prompts == ["one", "one", "wrong"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"custom_id": "a"}', "line 2: expected"),
        ("{", "line 2:"),
        ('{"custom_id": "r", "method": "POST", "url": "/v1/x", "body": {}}', "'r' is there twice"),
        ('{"custom_id": "a", "method": "GET", "url": "/v1/x", "body": {}}', "expected POST"),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/x", "body": {"stream": true}}', "leave it out"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_asked(
    server: Asked, files: tuple[Path, Path], line: str, words: str
) -> None:
    source, target = files
    write(source, "r")
    source.write_text(source.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    ended = prad("batch", source, target, "--url", server.url)
    assert ended.returncode == 1
    assert words in one_line(ended.stderr)
    assert (server.prompts, target.exists()) == ([], False)


def test_answers_of_others_are_not_added_to(server: Asked, files: tuple[Path, Path]) -> None:
    source, target = files
    write(source, "one")
    assert prad("batch", source, target, "--url", server.url).returncode == 0
    write(source, "two")
    ended = prad("batch", source, target, "--url", server.url)
    assert (ended.returncode, "has answers to other requests" in one_line(ended.stderr)) == (1, True)
    target.write_text("my notes\n", encoding="utf-8")
    ended = prad("batch", source, target, "--url", server.url)
    assert (ended.returncode, "no answer to a batch's request" in one_line(ended.stderr)) == (1, True)
    assert target.read_text(encoding="utf-8") == "my notes\n"


def test_nobody_there_is_said_at_once(files: tuple[Path, Path], unused_tcp_port: int) -> None:
    source, target = files
    write(source, "one")
    ended = prad("batch", source, target, "--url", f"http://127.0.0.1:{unused_tcp_port}")
    assert (ended.returncode, "Start a server with: prad serve" in one_line(ended.stderr)) == (1, True)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:8000", "expected a server's address like"),
        ("http://here:port", "is no address of a server"),
    ],
)
def test_an_address_that_is_none_is_said(files: tuple[Path, Path], url: str, words: str) -> None:
    source, target = files
    write(source, "one")
    ended = prad("batch", source, target, "--url", url)
    assert (ended.returncode, words in one_line(ended.stderr)) == (1, True)


def test_a_key_that_others_miss_in_words_of_their_own_is_said(
    server: Asked, files: tuple[Path, Path]
) -> None:
    source, target = files
    write(source, "who")
    ended = prad("batch", source, target, "--url", server.url)
    assert ended.returncode == 1
    assert f"{server.url} answers 401: " in one_line(ended.stderr)
    assert "show a key" in ended.stderr


def test_a_terminal_shows_how_far_it_is(server: Asked, files: tuple[Path, Path]) -> None:
    source, target = files
    write(source, "one", "two", "three")
    command = ["-m", "prad_cli", "batch", str(source), str(target), "--url", server.url]
    terminal = Terminal(sys.executable, *command)
    try:
        terminal.until("asked")
        terminal.until("3/3")
        terminal.until("3 requests have answers")
        assert terminal.process.wait() == 0
    finally:
        terminal.close()


def test_who_stops_it_is_told_that_it_goes_on(server: Asked, files: tuple[Path, Path]) -> None:
    source, target = files
    write(source, "one", "slow", "two")
    command = ["-m", "prad_cli", "batch", str(source), str(target), "--url", server.url, "--at-once", "1"]
    terminal = Terminal(sys.executable, *command)
    try:
        terminal.until("1/3")
        terminal.interrupt(lambda: "stopped" in terminal.shown)
        terminal.until("1 of 3 answered; the same command goes on where this ended")
        assert terminal.process.wait() == 130
    finally:
        terminal.close()
    assert set(answers(target)) == {"one"}
