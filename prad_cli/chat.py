"""`prad chat`: a conversation with a running server, in a terminal or through pipes.

A line is a message, or a command if it begins with a slash. Answers go to stdout as they come, everything
else to stderr, so that what is piped on holds answers alone.
"""

import sys
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer

from prad.core.errors import PradError
from prad.http.asking import DEFAULT_API, answered, api_client, listed, streamed
from prad_cli.lines import Lines
from prad_cli.operating import credential

OPTIONS = {
    "epilog": (
        "Examples:\n\nprad chat\n\nprad chat sentiment --timings\n\n"
        "echo 'a gripping , beautifully acted film' | prad chat sentiment"
    )
}
COMMANDS = {
    "/task": "NAME    talk to that task, or to the plain model by its id; without a name: which there are",
    "/system": "TEXT  what the model is told first, - for nothing; without a text: what that is now",
    "/reset": "       forget the conversation",
    "/timings": "     show after each answer how long it took, or no more",
    "/help": "        this",
    "/quit": "        end (as Ctrl-D)",
}
_NO_SYSTEM = "--completions sends each line alone, as a prompt: there is no place for a system message"


class ChatError(PradError):
    """The server cannot be reached, or refuses; the message says what it said."""


def complete_task(incomplete: str) -> list[str]:
    """For the shell: names at the default server, if it answers at once."""
    with suppress(Exception):
        told = httpx.get(f"{DEFAULT_API}/v1/models", timeout=0.5, trust_env=False).json()
        return [model["id"] for model in told["data"] if model["id"].startswith(incomplete)]
    return []


def chat_command(
    task: Annotated[
        str | None,
        typer.Argument(
            metavar="[TASK]",
            help="The task, TASK@N or TASK@ALIAS; the plain model if left out.",
            autocompletion=complete_task,
        ),
    ] = None,
    url: Annotated[str, typer.Option(envvar="PRAD_API_URL", help="URL of the running server.")] = DEFAULT_API,
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    completions: Annotated[
        bool,
        typer.Option(
            "--completions",
            help="Each line is a prompt of its own (/v1/completions): for models without a chat template.",
        ),
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Of an answer, at most.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", min=0)] = None,
    seed: Annotated[int | None, typer.Option(help="Draw the same tokens each time.", min=0)] = None,
    timings: Annotated[
        bool,
        typer.Option(
            "--timings",
            help="Under each answer: time to the first token, between tokens, tokens a second.",
        ),
    ] = False,
    api_key: Annotated[
        str,
        typer.Option(help="API key. Others on this machine can read flags: rather set PRAD_API_KEY."),
    ] = "",
) -> None:
    """Talk to a running server: streamed answers, history, /task NAME to change the task (/help).

    Lines from a pipe are answered one after the other, answers alone go to stdout.
    """
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    given = {name: value for name, value in sampling.items() if value is not None}
    if system and completions:
        raise typer.BadParameter(_NO_SYSTEM)
    with api_client(url, 1, ChatError, key=api_key or credential("PRAD_API_KEY")) as client:
        names = listed(client, ChatError)
        talk = Talk(client, names, system, given, completions=completions, timings=timings)
        if not names and task is None:
            raise ChatError(f"{url} lists no model that this key may use; name a task, or show another key")
        talk.choose(task or names[0])
        failed = _converse(talk, Lines(names, list(COMMANDS)))
    if failed:
        raise typer.Exit(1)


def _converse(talk: "Talk", lines: Lines) -> bool:
    """Until the input ends. Whether a line of a pipe was refused: a person has seen it and goes on."""
    failed = False
    if lines.typed:
        _note(f"{talk.about}\n/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends\n")
    for line in lines.read(lambda: f"{talk.name}> "):
        try:
            _require_text(line)
            if line.startswith("/") and not line.startswith("//"):
                if not talk.command(line):
                    break
            elif line.strip():
                talk.say(line.removeprefix("/") if line.startswith("//") else line)
        except ChatError as error:
            failed = failed or not lines.typed
            typer.secho(f"error: {error}", fg="red", err=True)
        except KeyboardInterrupt:
            if not lines.typed:
                raise
            _note("\n(stopped)")
    return failed


def _require_text(line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError:  # bytes that are none: see Lines
        raise ChatError("this line is no UTF-8, so it was not sent: convert it (iconv -t UTF-8)") from None


@dataclass
class Answer:
    """One that comes in: its text, when its pieces came, and the tokens that the server counted."""

    began: float = field(default_factory=perf_counter)
    text: str = ""
    came: list[float] = field(default_factory=list)
    tokens: int = 0

    def add(self, event: dict[str, Any]) -> str:
        """What an event brings of the text."""
        if usage := event.get("usage"):
            self.tokens = int(usage.get("completion_tokens", 0))
        piece = "".join(_piece(choice) for choice in event.get("choices", ())[:1])
        if piece:
            self.came.append(perf_counter())
            self.text += piece
        return piece

    def timings(self) -> str:
        """Time to the first token, between tokens, and tokens a second behind the first."""
        if not self.came:
            return "no token"
        said = [f"TTFT {1e3 * (self.came[0] - self.began):.0f} ms"]
        took, tokens = self.came[-1] - self.came[0], self.tokens or len(self.came)
        if tokens > 1 and took > 0:
            longest = max(later - earlier for earlier, later in pairwise(self.came)) if self.came[1:] else 0.0
            said.append(f"ITL {1e3 * took / (tokens - 1):.1f} ms (longest {1e3 * longest:.0f})")
            said.append(f"{(tokens - 1) / took:.1f} tokens/s")
        return " · ".join((*said, f"{tokens} tokens"))


def _piece(choice: dict[str, Any]) -> str:
    return str(choice.get("text") or (choice.get("delta") or {}).get("content") or "")


class Talk:
    """A conversation: whom it is with, what was said, and how answers are drawn. `names`: what the server
    lists."""

    def __init__(
        self,
        client: httpx.Client,
        names: list[str],
        system: str,
        sampling: dict[str, Any],
        *,
        completions: bool,
        timings: bool,
    ) -> None:
        self._client = client
        self._names = names
        self._system = system
        self._sampling = sampling
        self._completions = completions
        self._timings = timings
        self._said: list[dict[str, str]] = []
        self.name = ""
        """Of the task, or the plain model's id."""
        self._plain = True
        self._remembers = True

    @property
    def about(self) -> str:
        """Whom one talks to, in a line."""
        if self._plain:
            return f"{self.name}, the plain model"
        return self.name if self._remembers else f"{self.name}: it answers each message by itself"

    def choose(self, name: str) -> None:
        """Talks to a task, or the plain model, from now on, and begins anew. Raises ChatError."""
        told = self._described(name).get("prad")
        self.name, self._plain = name, told is None
        # a server that does not say is sent everything, and refuses what it does not take
        self._remembers = told is None or told.get("chat_template") is not False
        self._said.clear()

    def _described(self, name: str) -> dict[str, Any]:
        """As the server has it; of one that has no more than its list nothing, if that names it."""
        try:
            told = answered(self._client, ChatError, "GET", f"/v1/models/{quote(name)}")
        except ChatError:
            if name not in self._names:
                raise
            return {}
        return told if isinstance(told, dict) else {}

    def command(self, line: str) -> bool:
        """Does what a line with a slash says. Whether the conversation goes on."""
        name, _, rest = line.partition(" ")
        does: dict[str, Callable[[str], None]] = {
            "/task": self._change_task,
            "/system": self._change_system,
            "/reset": lambda _: self._said.clear(),
            "/timings": self._change_timings,
            "/help": lambda _: _note("\n".join(f"{name} {text}" for name, text in COMMANDS.items())),
        }
        if name in ("/quit", "/exit"):
            return False
        if name not in does:
            known = ", ".join(COMMANDS)
            raise ChatError(f"there is no {name}: {known}. A message that begins with / is written with //")
        does[name](rest.strip())
        return True

    def _change_task(self, name: str) -> None:
        if name:
            self.choose(name)
            _note(self.about)
        else:
            _note("\n".join(f"{'*' if each == self.name else ' '} {each}" for each in self._names))

    def _change_system(self, text: str) -> None:
        if text and self._completions:
            raise ChatError(_NO_SYSTEM)
        self._system = "" if text == "-" else text or self._system
        _note(f"system: {self._system or '(nothing)'}")

    def _change_timings(self, _: str) -> None:
        self._timings = not self._timings
        _note(f"timings {'on' if self._timings else 'off'}")

    def say(self, text: str) -> None:
        """Sends a message and writes the answer as it comes. One that breaks off is forgotten, with its
        question. Raises ChatError."""
        turn = {"role": "user", "content": text}
        answer = Answer()
        try:
            with closing(self._asked(turn)) as events:
                for event in events:
                    sys.stdout.write(answer.add(event))
                    sys.stdout.flush()
        except ChatError as error:
            if self._said:  # of which there may be more than the model reads
                raise ChatError(f"{error} (/reset forgets the conversation so far)") from error
            raise
        sys.stdout.write("\n")
        sys.stdout.flush()
        if self._remembers and not self._completions:
            self._said += [turn, {"role": "assistant", "content": answer.text}]
        if self._timings:
            _note(answer.timings())

    def _asked(self, turn: dict[str, str]) -> Generator[dict[str, Any], None, None]:
        body: dict[str, Any] = {
            "model": self.name,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._sampling,
        }
        if self._completions:
            return streamed(self._client, ChatError, "/v1/completions", body | {"prompt": turn["content"]})
        first = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*first, *self._said, turn]
        return streamed(self._client, ChatError, "/v1/chat/completions", body | {"messages": messages})


def _note(text: str) -> None:
    typer.secho(text, dim=True, err=True)
