"""`prad adapter ...`: versions pushed, shown and removed while traffic runs, over the registry's API."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from adapter_registry.client import RegistryClient
from adapter_registry.messages import Pushed, TaskRoute, VersionRecord
from adapter_registry.names import parse_name
from adapter_registry.probing import NotProbedError, wait_probed
from adapter_registry.versions import State
from prad.artefact import ArtefactError, NotServableError, read_servable
from prad.artefact.signatures import pushed_files
from prad_cli.diff import diff
from prad_cli.operating import (
    DEFAULT_REGISTRY,
    Json,
    Registry,
    Version,
    fail,
    print_json,
    progress_console,
    say_pending,
    talking,
    version_of,
)
from prad_cli.routing import COMMANDS
from prad_cli.signing import sign
from prad_cli.tables import show_task, show_tasks, show_version

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Push adapter versions, look at them, route requests to them, while traffic runs; and exchange "
    "adapters with PEFT.",
    epilog="Examples:\n\n[bold]prad adapter push runs/support --task support[/bold]\n\n"
    "[bold]prad adapter promote support@2[/bold]",
)


@app.command(
    epilog="Examples:\n\n[bold]prad adapter push runs/support --task support[/bold]\n\n"
    "[bold]prad adapter push runs/support --task support --promote[/bold]\n\n"
    "[bold]prad adapter push oci://ghcr.io/my-org/support:1 --task support[/bold]"
)
def push(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIR|URI",
            help="Folder with prad.json and the weights; or where the registry fetches them.",
        ),
    ],
    task: Annotated[str, typer.Option(help="The task that it becomes a version of.")],
    promote: Annotated[
        bool, typer.Option("--promote", help="Once verified, make it what plain TASK means.")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Wait until a prefill service has verified it.")] = True,
    connect_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for any prefill service.")
    ] = 15.0,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for its verdict.")] = 120.0,
    as_json: Json = False,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """Upload an adapter as the next version of a task, and wait until it is verified.

    A URI is fetched by the registry, if its operator allows that ([bold]--push-from[/bold] of prad registry):
    file:///FOLDER on its machine, hf://ORG/REPO@REVISION, s3://BUCKET/FOLDER, oci://HOST/NAME:TAG.

    The same files again are the same version. A task's first version answers as soon as it is verified;
    later ones wait for [bold]promote[/bold].
    """
    if promote and not wait:
        raise typer.BadParameter("--promote needs to wait until the version is verified; drop --no-wait")
    with talking(registry) as client:
        pushed = _fetched(client, source, task) if "://" in source else _upload(client, Path(source), task)
        if not as_json:
            _say_pushed(pushed)
        record: VersionRecord = pushed
        if wait:
            record = _wait(client, pushed, connect_timeout, timeout)
        if promote:
            promoted = client.promote(record.task, record.version)
            record = client.version(record.task, record.version)
            if not as_json:
                say_pending(promoted)
        if as_json:
            print_json(record.model_dump(mode="json"))
        elif wait:
            _say_next(record, registry)
        else:
            print(f"Its state: prad adapter show {pushed.name}{_flag(registry)}")


@app.command("list", epilog="Example: [bold]prad adapter list --json[/bold]")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Also failed and deleted versions.")] = False,
    as_json: Json = False,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """All tasks: what plain TASK means, and its versions."""
    with talking(registry) as client:
        state = client.tasks(everything=everything)
    if as_json:
        print_json(state.model_dump(mode="json"))
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
    name: Annotated[str, typer.Argument(metavar="TASK[@N|@ALIAS]", help="A task, or one version of it.")],
    as_json: Json = False,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """A task's versions, or everything about one version."""
    with talking(registry) as client:
        task, which = parse_name(name)
        shown: TaskRoute | VersionRecord
        shown = client.task(task) if which is None else client.version(*version_of(client, name))
    if as_json:
        print_json(shown.model_dump(mode="json"))
    elif isinstance(shown, VersionRecord):
        show_version(shown)
    else:
        show_task(shown)


@app.command(epilog="Example: [bold]prad adapter unretire support@1[/bold]")
def unretire(name: Version, as_json: Json = False, registry: Registry = DEFAULT_REGISTRY) -> None:
    """Bring a retired version back: it is probed again, and then answers as TASK@N."""
    with talking(registry) as client:
        record = client.unretire(*version_of(client, name))
    if as_json:
        print_json(record.model_dump(mode="json"))
    else:
        print(
            f"{record.name} is {record.state} again, and answers as soon as a prefill service has verified it"
        )


@app.command(epilog="Example: [bold]prad adapter rm support@1[/bold]")
def rm(name: Version, as_json: Json = False, registry: Registry = DEFAULT_REGISTRY) -> None:
    """Remove a version's files from the registry; its record stays. Retire it first if it answers."""
    with talking(registry) as client:
        record = client.delete(*version_of(client, name))
    if as_json:
        print_json(record.model_dump(mode="json"))
    else:
        print(f"{record.name} is deleted; the same files, pushed again, are a new version")


@app.command(epilog="Example: [bold]prad adapter pull support@2 adapters/support[/bold]")
def pull(
    name: Version,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to be, new or empty.")],
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """Fetch a version's files back from the registry, verified against its digest."""
    with talking(registry) as client:
        try:
            record = client.pull(*version_of(client, name), folder)
        except OSError as error:
            fail(f"cannot write {folder}: {error.strerror or error}")
    print(f"{record.name} is in {folder} (digest {record.digest[:12]})")


app.command(
    epilog="Examples:\n\n[bold]prad adapter sign --generate --key ada.key[/bold]\n\n"
    "[bold]prad adapter sign runs/support --key ada.key[/bold]"
)(sign)

for command, example in (*COMMANDS, (diff, "prad adapter diff support@1 support@2 --data test.jsonl")):
    app.command(epilog=f"Example: [bold]{example}[/bold]")(command)


def _say_pushed(pushed: Pushed) -> None:
    verb = "pushed" if pushed.created else "is there already, with these files"
    print(f"{pushed.name} {verb} ({pushed.record.method}, digest {pushed.digest[:12]}, {pushed.state})")
    if pushed.source:
        print(f"fetched from {pushed.source}")
    if pushed.signatures:
        print(f"signed by {', '.join(each.who for each in pushed.signatures)}")


def _fetched(client: RegistryClient, uri: str, task: str) -> Pushed:
    with progress_console().status(f"the registry fetches {uri}"):
        return client.push_uri(task, uri)


def _upload(client: RegistryClient, folder: Path, task: str) -> Pushed:
    try:
        files = pushed_files(read_servable(folder))
    except NotServableError as error:
        fail(f"{folder}: {error}")
    except ArtefactError as error:
        fail(f"{error}. An adapter folder is what prad train or prad adapter import writes")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with ExitStack() as opened:
        progress = opened.enter_context(Progress(*columns, console=progress_console(), transient=True))
        parts: list[tuple[str, IO[bytes]]] = []
        for path in files:
            file = opened.enter_context(progress.open(path, "rb", description=path.name))
            parts.append((path.name, file))
        return client.push(task, parts)


def _wait(
    client: RegistryClient, pushed: Pushed, connect_seconds: float, probe_seconds: float
) -> VersionRecord:
    try:
        with progress_console().status(f"waiting until a prefill service has verified {pushed.name}"):
            record = wait_probed(
                client,
                pushed.task,
                pushed.version,
                connect_seconds=connect_seconds,
                probe_seconds=probe_seconds,
            )
    except NotProbedError as error:
        fail(f"{error}; {pushed.name} is stored, and answers as soon as one has verified it")
    if record.state is State.FAILED or (record.state is State.DELETED and record.reason):
        fail(f"{record.name} failed on the model: {record.reason or 'no reason given'}")
    if record.state.over:
        fail(f"{record.name} was {record.state} meanwhile")
    return record


def _say_next(record: VersionRecord, registry: str) -> None:
    model = record.task if record.current else record.name
    if record.current:
        print(f"{record.name} is verified, and what plain {record.task!r} means. Try it:")
    else:
        print(f"{record.name} is verified, and answers as {record.name!r}. Try it:")
    body = json.dumps({"model": model, "prompt": "..."})
    here = "http://127.0.0.1:8000" if registry == DEFAULT_REGISTRY else "http://API:PORT"
    api = os.environ.get("PRAD_API_URL", here).rstrip("/").removesuffix("/v1")
    print(f"  curl {api}/v1/completions -H 'Content-Type: application/json' -d '{body}'")
    if not record.current:
        command = f"prad adapter promote {record.name}{_flag(registry)}"
        print(f"Then make it what plain {record.task!r} means:\n  {command}")


def _flag(registry: str) -> str:
    """What a command typed next has to say for the same registry."""
    return "" if registry == DEFAULT_REGISTRY else f" --registry {registry}"
