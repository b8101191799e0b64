"""What the commands that talk to a registry or an API share: their options, the client, what they show it."""

import getpass
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from adapter_registry.client import RegistryClient
from adapter_registry.errors import RegistryError, RegistryUnreachableError
from adapter_registry.keys import ChangedKey
from adapter_registry.messages import Rerouted
from adapter_registry.names import parse_name

DEFAULT_REGISTRY = "http://127.0.0.1:8001"

Registry = Annotated[
    str, typer.Option("--registry", envvar="PRAD_REGISTRY_URL", help="URL of the adapter registry.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Seen = Annotated[
    int | None,
    typer.Option(
        "--if-revision",
        min=0,
        help="Only if the task's routing still has this revision (as show prints it): another operator may "
        "be faster.",
    ),
]
Task = Annotated[str, typer.Argument(metavar="TASK", help="The task.")]
Version = Annotated[
    str, typer.Argument(metavar="TASK@N", help="Task and version, e.g. support@2 or support@canary.")
]


@contextmanager
def talking(url: str) -> Iterator[RegistryClient]:
    """A client; whatever the registry refuses becomes one line on stderr and exit code 1."""
    try:
        with RegistryClient(url, operator=operator(), token=credential("PRAD_TOKEN")) as client:
            yield client
    except RegistryUnreachableError as error:
        fail(f"{error}. Start one with: prad serve, or prad registry; or name another with --registry URL")
    except RegistryError as error:
        fail(error.message)


def version_of(client: RegistryClient, name: str) -> tuple[str, int]:
    """Task and number of `task@N` or `task@alias`."""
    task, which = parse_name(name)
    if which is None:
        fail(f"which version of {task!r}? Say {task}@N; prad adapter show {task} lists them")
    if isinstance(which, int):
        return task, which
    meant = client.task(task).routing.meant(which)
    if meant is None:
        fail(f"{task!r} has no alias {which!r}; prad adapter show {task} lists them")
    return task, meant


def credential(variable: str) -> str:
    """What the environment says, or the file that the variable with _FILE names; never an argument, which
    every user of this machine can read. Empty if there is neither."""
    named = os.environ.get(f"{variable}_FILE", "")
    found = os.environ.get(variable, "")
    if not found and named:
        try:
            found = Path(named).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"cannot read the file that {variable}_FILE names: {error}")
    found = found.strip()
    if not found.isascii() or len(found.split()) > 1:
        fail(f"{variable if os.environ.get(variable) else named} is no token: expected one word of ASCII")
    return found


def say_pending(changed: Rerouted | ChangedKey) -> None:
    if changed.pending:
        behind = ", ".join(changed.pending)
        print(f"not yet at {behind}: it goes on with what it knew until it hears of this")


def fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(1)


def counted(number: int, one: str, many: str) -> str:
    """As in "1 task" and "2 tasks"."""
    return f"{number} {one if number == 1 else many}"


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def progress_console() -> Console:
    """Bars and spinners go to a terminal's stderr; a pipe gets none of them."""
    console = Console(stderr=True)
    console.quiet = not console.is_terminal
    return console


def operator() -> str:
    """Who types this, for the registry's history and behind a new key."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a container's user may have no name
        return socket.gethostname()
