"""`prad chat`, through pipes and at a terminal, against an API that turns words round."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from prad_cli.lines import Lines
from tests import forked
from tests.cli.fake_api import FakeApi, fake_api
from tests.cli.test_command_line import ENVIRONMENT


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as api:
        yield api


def piped(
    api: FakeApi, lines: str, *arguments: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    asked = ("chat", *arguments, "--url", f"{api.url}/v1")
    return forked.prad(*asked, environment=ENVIRONMENT | environment, lines=lines)


class Terminal:
    """A child at a terminal of its own; what it has shown, and what a person types."""

    def __init__(self, *command: str) -> None:
        self._at, theirs = pty.openpty()
        at_it: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        environment = ENVIRONMENT | {"TERM": "xterm"}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **at_it)
        os.close(theirs)
        self.shown = ""

    def read(self, patience_s: float | None = None) -> bool:
        """Whether it showed something, at least that it has ended, in that time."""
        if not select.select([self._at], [], [], patience_s)[0]:
            return False
        with suppress(OSError):  # Linux: the child has closed it
            self.shown += os.read(self._at, 4096).decode("utf-8", errors="replace")
        return True

    def until(self, wanted: str) -> str:
        """What was shown up to what must come, which is then behind us; the test's own time-out ends a wait
        in vain."""
        while wanted not in self._plain:
            before = self.shown
            self.read()
            assert self.shown != before, f"it ended: {self._plain}"
        found, _, self.shown = self._plain.partition(wanted)
        return found

    def interrupt(self, until: Callable[[], bool]) -> None:
        """Ctrl-C, and again where nothing comes of it: one is lost that comes just before a system call."""
        while not until():
            self.process.send_signal(signal.SIGINT)
            while not until() and self.read(2.0):
                pass

    @property
    def _plain(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.shown)

    def type(self, text: str) -> None:
        os.write(self._at, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._at)


@contextmanager
def typing_to(api: FakeApi, *arguments: str) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "prad_cli", "chat", *arguments, "--url", api.url]
    terminal = Terminal(*command)
    try:
        yield terminal
    finally:
        terminal.close()


def test_lines_of_a_pipe_are_answered_with_history(api: FakeApi) -> None:
    ended = piped(api, "one two\n\n/system be brief\nthree\n//slash\n", "--temperature", "0")
    assert (ended.returncode, ended.stdout) == (0, "two one\nthree\n/slash\n")
    assert "system: be brief" in ended.stderr
    messages = [[(m["role"], m["content"]) for m in body["messages"]] for _, body in api.asked]
    assert messages[0] == [("user", "one two")]
    assert messages[2] == [
        ("system", "be brief"),
        ("user", "one two"),
        ("assistant", "two one"),
        ("user", "three"),
        ("assistant", "three"),
        ("user", "/slash"),
    ]
    assert {(body["model"], body["temperature"]) for _, body in api.asked} == {("small", 0)}


def test_a_task_that_takes_single_messages_gets_them(api: FakeApi) -> None:
    ended = piped(api, "a b\nc d\n/task story\ne\nf\n/reset\ng\n", "sort")
    assert ended.stdout == "b a\nd c\ne\nf\ng\n"
    asked = [(body["model"], len(body["messages"])) for _, body in api.asked]
    assert asked == [("sort", 1), ("sort", 1), ("story", 1), ("story", 3), ("story", 1)]


def test_prompts_alone_for_models_without_a_chat_template(api: FakeApi) -> None:
    ended = piped(api, "a b\nc\n", "--completions", "--timings", "--max-tokens", "5")
    assert ended.stdout == "b a\nc\n"
    assert [(path, body["prompt"]) for path, body in api.asked] == [
        ("/v1/completions", "a b"),
        ("/v1/completions", "c"),
    ]
    assert re.search(
        r"TTFT \d+ ms · ITL [\d.]+ ms \(longest \d+\) · [\d.]+ tokens/s · 2 tokens", ended.stderr
    )


def test_what_is_refused_is_said_and_the_rest_goes_on(api: FakeApi) -> None:
    ended = piped(api, "fail\n/task nobody\n/nothing\na b\n")
    assert (ended.returncode, ended.stdout) == (1, "b a\n")
    refused, nobody, nothing = ended.stderr.splitlines()
    assert refused.endswith("answers 400: that is refused: ask for something else")
    assert "no model 'nobody'; GET /v1/models lists them" in nobody
    assert "there is no /nothing: /task, " in nothing
    assert [len(body["messages"]) for _, body in api.asked] == [1, 1], "what was refused is forgotten"


def test_a_server_that_only_lists_its_models_is_talked_to(api: FakeApi) -> None:
    """Many do: `GET /v1/models/ID` is rare."""
    api.only_list = True
    ended = piped(api, "a b\n/task story\nc d\n/task nobody\n")
    assert (ended.returncode, ended.stdout) == (1, "b a\nd c\n")
    assert "no model 'nobody'" in ended.stderr.splitlines()[-1]


def test_bytes_that_are_no_text_are_one_line(api: FakeApi) -> None:
    ended = piped(api, "a \udcff\n/task \udcff\nc d\n")
    assert (ended.returncode, ended.stdout) == (1, "d c\n")
    assert [line for line in ended.stderr.splitlines() if "is no UTF-8" in line] == ended.stderr.splitlines()
    assert len(api.asked) == 1


def test_a_system_message_can_be_taken_back_and_has_its_place(api: FakeApi) -> None:
    assert piped(api, "/system -\na\n", "--system", "be brief").stdout == "a\n"
    assert [message["role"] for message in api.asked[0][1]["messages"]] == ["user"]
    ended = piped(api, "/system be brief\na\n", "--completions")
    assert (ended.returncode, "there is no place for a system message" in ended.stderr) == (1, True)
    refused = piped(api, "a\n", "--completions", "--system", "be brief")
    assert (refused.returncode, refused.stdout) == (2, "")


def test_what_a_long_conversation_is_refused_for_can_be_forgotten(api: FakeApi) -> None:
    ended = piped(api, "a\nfail\n")
    assert ended.stderr.strip().endswith("ask for something else (/reset forgets the conversation so far)")


def test_keys_and_addresses(api: FakeApi) -> None:
    api.key = "a-key"
    refused = piped(api, "a\n")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "an API key is needed: prad keys create NAME" in refused.stderr
    assert piped(api, "a b\n", PRAD_API_KEY="a-key").stdout == "b a\n"
    assert piped(api, "a b\n", "--api-key", "a-key").stdout == "b a\n"
    away = FakeApi("http://127.0.0.1:1")
    ended = piped(away, "a\n")
    assert ended.returncode == 1
    assert "Start a server with: prad serve" in ended.stderr


def test_at_a_terminal(api: FakeApi) -> None:
    with typing_to(api, "--timings") as terminal:
        terminal.until("small, the plain model")
        terminal.until("small> ")
        terminal.type("one two\r")
        terminal.until("two one")
        terminal.until("2 tokens")
        terminal.until("small> ")
        terminal.type("/task so\t\r")
        terminal.until("sort: it answers each message by itself")
        terminal.until("sort> ")
        terminal.type("\x1b[A\x1b[A\r")  # the first line again, from the history
        terminal.until("two one")
        terminal.until("sort> ")
        terminal.type("a hold\r")
        terminal.until("HOLD")  # the answer's first word: it waits for the second
        terminal.interrupt(lambda: "(stopped)" in terminal.shown)
        terminal.until("(stopped)")
        terminal.until("sort> ")
        terminal.type("c \\\r")
        terminal.until("... ")
        terminal.type("d\r")
        terminal.until("d c")
        terminal.until("sort> ")
        terminal.type("/quit\r")
        assert terminal.process.wait() == 0
    assert [body["model"] for _, body in api.asked] == ["small", "sort", "sort", "sort"]


def test_completion_of_commands_and_names() -> None:
    lines = Lines(["story", "sort", "small"], ["/task", "/system", "/timings"])
    assert lines.completions("/t") == ["/task ", "/timings"]
    assert lines.completions("/task s") == ["/task small", "/task sort", "/task story"]
    assert lines.completions("/task st") == ["/task story"]
    assert lines.completions("hello") == []
    assert [lines.completion("/t", number) for number in range(3)] == ["/task ", "/timings", None]


def test_ctrl_c_at_a_prompt_throws_away_what_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["begun \\", KeyboardInterrupt(), "whole", EOFError()])

    def answer(_: str) -> str:
        said = next(typed)
        if isinstance(said, BaseException):
            raise said
        return said

    monkeypatch.setattr("builtins.input", answer)
    lines = Lines([], [])
    lines.typed = True
    assert list(lines.read(lambda: "> ")) == ["whole"]
