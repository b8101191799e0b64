"""`prad adapter ...`: versions pushed, promoted and retired while traffic runs, over the registry's API."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from adapter_registry.api import Pushed, Rerouted, TaskRoute, VersionRecord
from adapter_registry.client import RegistryClient
from adapter_registry.errors import RegistryError, RegistryUnreachableError
from adapter_registry.names import parse_name
from adapter_registry.probing import NotProbedError, wait_probed
from adapter_registry.versions import State
from prad.artefact import ArtefactError, NotServableError, read_servable
from prad_cli.exchange import export_command, import_command
from prad_cli.tables import show_task, show_tasks, show_version

DEFAULT_REGISTRY = "http://127.0.0.1:8001"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Push adapter versions, look at them, promote and retire them, while traffic runs; and exchange "
    "adapters with PEFT.",
)

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
Version = Annotated[str, typer.Argument(metavar="TASK@N", help="Task and version, e.g. support@2.")]


@app.command(
    epilog="Examples:\n\n[bold]prad adapter push runs/support --task support[/bold]\n\n"
    "[bold]prad adapter push runs/support --task support --promote[/bold]"
)
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with prad.json and the weights.")],
    task: Annotated[str, typer.Option(help="The task that it becomes a version of.")],
    promote: Annotated[
        bool, typer.Option("--promote", help="Once verified, make it what plain TASK means.")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Wait until a prefill service has verified it.")] = True,
    connect_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for any prefill service.")
    ] = 15.0,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for its verdict.")] = 120.0,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """Upload an adapter as the next version of a task, and wait until it is verified.

    The same files again are the same version. A task's first version answers as soon as it is verified;
    later ones wait for [bold]promote[/bold].
    """
    if promote and not wait:
        raise typer.BadParameter("--promote needs to wait until the version is verified; drop --no-wait")
    with _talking(registry) as client:
        pushed = _upload(client, folder, task)
        verb = "pushed" if pushed.created else "is there already, with these files"
        print(f"{pushed.name} {verb} ({pushed.record.method}, digest {pushed.digest[:12]}, {pushed.state})")
        if not wait:
            print(f"Its state: prad adapter show {pushed.name}{_flag(registry)}")
            return
        record = _wait(client, pushed, connect_timeout, timeout)
        if promote and not record.current:
            record = rerouted = client.promote(record.task, record.version)
            _say_pending(rerouted)
        _say_next(record, registry)


@app.command("list", epilog="Example: [bold]prad adapter list --json[/bold]")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Also failed and deleted versions.")] = False,
    as_json: Json = False,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """All tasks: the current version of each, and its other versions."""
    with _talking(registry) as client:
        state = client.tasks(everything=everything)
    if as_json:
        _print_json(state.model_dump(mode="json"))
    elif state.tasks:
        show_tasks(state.tasks)
    elif everything:
        print("No adapters yet. Push one: prad adapter push DIR --task NAME")
    else:
        print(
            "No adapters. Push one: prad adapter push DIR --task NAME (--all lists failed and deleted ones)"
        )


@app.command(
    epilog="Examples:\n\n[bold]prad adapter show support[/bold]\n\n[bold]prad adapter show support@2[/bold]"
)
def show(
    name: Annotated[str, typer.Argument(metavar="TASK[@N]", help="A task, or one version of it.")],
    as_json: Json = False,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """A task's versions, or everything about one version."""
    with _talking(registry) as client:
        task, number = parse_name(name)
        shown: TaskRoute | VersionRecord
        shown = client.task(task) if number is None else client.version(task, number)
    if as_json:
        _print_json(shown.model_dump(mode="json"))
    elif isinstance(shown, VersionRecord):
        show_version(shown)
    else:
        show_task(shown)


@app.command(epilog="Example: [bold]prad adapter promote support@2[/bold]")
def promote(name: Version, seen: Seen = None, registry: Registry = DEFAULT_REGISTRY) -> None:
    """Make a verified version what plain TASK means. The earlier one still answers to its TASK@N."""
    with _talking(registry) as client:
        record = client.promote(*_version(name), seen=seen)
    print(f"{record.name} is now what plain {record.task!r} means")
    _say_pending(record)


@app.command(epilog="Example: [bold]prad adapter retire support@1[/bold]")
def retire(
    name: Version,
    force: Annotated[
        bool, typer.Option("--force", help="Also the current version; the latest other routable takes over.")
    ] = False,
    seen: Seen = None,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """No new requests for a version; running ones keep it. The current version needs an heir or --force."""
    with _talking(registry) as client:
        record = client.retire(*_version(name), force=force, seen=seen)
        current = client.task(record.task).current
    print(f"{record.name} is retired; running requests keep it")
    if current is None:
        print(f"{record.task!r} has no current version now: requests for it are refused")
    else:
        print(f"plain {record.task!r} means {record.task}@{current}")
    _say_pending(record)


@app.command(epilog="Example: [bold]prad adapter unretire support@1[/bold]")
def unretire(name: Version, registry: Registry = DEFAULT_REGISTRY) -> None:
    """Bring a retired version back: it is probed again, and then answers as TASK@N."""
    with _talking(registry) as client:
        record = client.unretire(*_version(name))
    print(f"{record.name} is {record.state} again, and answers as soon as a prefill service has verified it")


@app.command(epilog="Example: [bold]prad adapter rm support@1[/bold]")
def rm(name: Version, registry: Registry = DEFAULT_REGISTRY) -> None:
    """Remove a version's files from the registry; its record stays. Retire it first if it answers."""
    with _talking(registry) as client:
        record = client.delete(*_version(name))
    print(f"{record.name} is deleted; the same files, pushed again, are a new version")


@app.command(epilog="Example: [bold]prad adapter pull support@2 adapters/support[/bold]")
def pull(
    name: Version,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to be, new or empty.")],
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """Fetch a version's files back from the registry, verified against its digest."""
    with _talking(registry) as client:
        try:
            record = client.pull(*_version(name), folder)
        except OSError as error:
            _fail(f"cannot write {folder}: {error.strerror or error}")
    print(f"{record.name} is in {folder} (digest {record.digest[:12]})")


app.command(
    "import",
    epilog="Examples:\n\n[bold]prad adapter import my-lora adapters/mine --model Qwen/Qwen3-0.6B[/bold]\n\n"
    "[bold]prad adapter import my-lora --task support --template 'Q: {prompt} A:'[/bold]",
)(import_command)
app.command("export", epilog="Example: [bold]prad adapter export adapters/mine for-peft[/bold]")(
    export_command
)


@contextmanager
def _talking(url: str) -> Iterator[RegistryClient]:
    """A client; whatever the registry refuses becomes one line on stderr and exit code 1."""
    try:
        with RegistryClient(url) as client:
            yield client
    except RegistryUnreachableError as error:
        _fail(f"{error}. Start one with: prad serve, or prad registry; or name another with --registry URL")
    except RegistryError as error:
        _fail(error.message)


def _say_pending(record: Rerouted) -> None:
    if record.pending:
        print(f"not yet at {', '.join(record.pending)}: it goes on with what it knew until it hears of this")


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(1)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _version(name: str) -> tuple[str, int]:
    task, number = parse_name(name)
    if number is None:
        _fail(f"which version of {task!r}? Say {task}@N; prad adapter show {task} lists them")
    return task, number


def _upload(client: RegistryClient, folder: Path, task: str) -> Pushed:
    try:
        files = read_servable(folder).files
    except NotServableError as error:
        _fail(f"{folder}: {error}")
    except ArtefactError as error:
        _fail(f"{error}. An adapter folder is what prad train or prad adapter import writes")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with ExitStack() as opened:
        progress = opened.enter_context(Progress(*columns, console=_progress_console(), transient=True))
        parts: list[tuple[str, IO[bytes]]] = []
        for path in files:
            file = opened.enter_context(progress.open(path, "rb", description=path.name))
            parts.append((path.name, file))
        return client.push(task, parts)


def _progress_console() -> Console:
    """Bars and spinners go to a terminal's stderr; a pipe gets none of them."""
    console = Console(stderr=True)
    console.quiet = not console.is_terminal
    return console


def _wait(
    client: RegistryClient, pushed: Pushed, connect_seconds: float, probe_seconds: float
) -> VersionRecord:
    try:
        with _progress_console().status(f"waiting until a prefill service has verified {pushed.name}"):
            record = wait_probed(
                client,
                pushed.task,
                pushed.version,
                connect_seconds=connect_seconds,
                probe_seconds=probe_seconds,
            )
    except NotProbedError as error:
        _fail(f"{error}; {pushed.name} is stored, and answers as soon as one has verified it")
    if record.state is State.FAILED or (record.state is State.DELETED and record.reason):
        _fail(f"{record.name} failed on the model: {record.reason or 'no reason given'}")
    if record.state.over:
        _fail(f"{record.name} was {record.state} meanwhile")
    return record


def _say_next(record: VersionRecord, registry: str) -> None:
    model = record.task if record.current else record.name
    if record.current:
        print(f"{record.name} is verified, and what plain {record.task!r} means. Try it:")
    else:
        print(f"{record.name} is verified, and answers as {record.name!r}. Try it:")
    body = json.dumps({"model": model, "prompt": "..."})
    api = "http://127.0.0.1:8000" if registry == DEFAULT_REGISTRY else "http://API:PORT"
    print(f"  curl {api}/v1/completions -H 'Content-Type: application/json' -d '{body}'")
    if not record.current:
        command = f"prad adapter promote {record.name}{_flag(registry)}"
        print(f"Then make it what plain {record.task!r} means:\n  {command}")


def _flag(registry: str) -> str:
    """What a command typed next has to say for the same registry."""
    return "" if registry == DEFAULT_REGISTRY else f" --registry {registry}"
