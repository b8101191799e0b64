"""`prad registry export FILE` and `import FILE`: a registry from one store to another, without a server."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from adapter_registry.errors import CannotStartError
from adapter_registry.export import read_export, write_export
from adapter_registry.opening import SQLITE_FILE, OpenedData, open_data
from adapter_registry.settings import RegistrySettings
from adapter_registry.snapshot import Snapshot
from prad.settings import environment_name
from prad_cli.operating import counted

COMMANDS = ("export", "import")
HINT = (
    "Example: prad registry --port 8001 --data-dir ~/registry\n\n"
    "prad registry export FILE writes all that a registry holds, its adapters' files too; "
    "prad registry import FILE reads that into an empty one, in a folder or a Redis. "
    "Adapters' files in a bucket: prad registry --files s3://adapters/prad "
    "--files-endpoint http://127.0.0.1:9000"
)

DataDir = Annotated[
    Path | None,
    typer.Option(
        help="The registry's data_dir. If left out: PRAD_REGISTRY_DATA_DIR, the folder registry in "
        "PRAD_DATA_DIR (where prad serve keeps its own), or its default."
    ),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(help="The registry's redis_url. If left out: PRAD_REGISTRY_REDIS_URL, or no Redis."),
]
Files = Annotated[
    str | None,
    typer.Option(
        help="The registry's files, s3://BUCKET/FOLDER. If left out: PRAD_REGISTRY_FILES, or data_dir."
    ),
]
Endpoint = Annotated[
    str | None,
    typer.Option(help="The registry's files_endpoint. If left out: PRAD_REGISTRY_FILES_ENDPOINT, or none."),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="The export, a tar file.", dir_okay=False)]

_app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


def run(context: typer.Context) -> None:
    """The command that the first argument in `context` names."""
    command = typer.main.get_command(_app)
    with command.make_context(context.info_name, context.args, parent=context.parent) as inner:
        command.invoke(inner)


@_app.command("export", epilog="Example: prad registry export registry.tar --data-dir ~/registry")
def export_command(
    file: File,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    files: Files = None,
    files_endpoint: Endpoint = None,
) -> None:
    """Write everything that a registry holds to FILE. One without Redis must be stopped for it."""
    settings = _settings(data_dir, redis_url, files, files_endpoint)
    _require_registry(settings)
    with _opened(settings) as data:
        if not data.store.revision() and not data.store.keys():
            raise CannotStartError(
                f"{data.place} holds nothing: no version, no routing, no key, so no file is written; name "
                "another with --data-dir, --redis-url and --files, as the registry has them"
            )
        print(
            f"{_said(write_export(data.store, data.files, file))} written to {file}, read from {data.place}"
        )


@_app.command(
    "import", epilog="Example: prad registry import registry.tar --redis-url redis://127.0.0.1:6379/0"
)
def import_command(
    file: File,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    files: Files = None,
    files_endpoint: Endpoint = None,
) -> None:
    """Read everything in FILE into an empty registry: versions, routing, history and files."""
    with _opened(_settings(data_dir, redis_url, files, files_endpoint)) as data:
        print(f"{_said(read_export(data.store, data.files, file))} read into {data.place}")


def _require_registry(settings: RegistrySettings) -> None:
    """Raises CannotStartError where there is none: opening a folder would make an empty one in it."""
    folder = settings.data_dir.expanduser()
    if settings.redis_url is not None or (folder / SQLITE_FILE).is_file():
        return
    of_serve = folder / "registry"
    hint = f"; prad serve keeps its own in {of_serve}" if (of_serve / SQLITE_FILE).is_file() else ""
    raise CannotStartError(
        f"{folder} holds no registry: expected {SQLITE_FILE} in it{hint}; one on a Redis is "
        "named by --redis-url"
    )


def _settings(
    data_dir: Path | None, redis_url: str | None, files: str | None, endpoint: str | None
) -> RegistrySettings:
    """Raises CannotStartError for what is no bucket or no endpoint."""
    of_serve = os.environ.get("PRAD_DATA_DIR")
    if data_dir is None and of_serve and environment_name(RegistrySettings, "data_dir") not in os.environ:
        data_dir = Path(of_serve) / "registry"
    given: dict[str, Any] = {
        "data_dir": data_dir,
        "redis_url": redis_url,
        "files": files,
        "files_endpoint": endpoint,
    }
    try:
        return RegistrySettings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        raise CannotStartError(f"{problem['loc'][0]}: {problem['msg']}") from error


@contextmanager
def _opened(settings: RegistrySettings) -> Iterator[OpenedData]:
    data = open_data(settings)
    try:
        yield data
    finally:
        data.close()


def _said(found: Snapshot) -> str:
    tasks = counted(len(found.tasks), "task", "tasks")
    versions = counted(len(found.versions), "version", "versions")
    return f"{tasks} with {versions}, at revision {found.revision},"
