"""`prad registry export FILE` and `import FILE`: a registry from one store to another, without a server."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from adapter_registry.errors import CannotStartError
from adapter_registry.export import read_export, write_export
from adapter_registry.opening import SQLITE_FILE, OpenedData, open_data
from adapter_registry.settings import RegistrySettings
from adapter_registry.snapshot import Snapshot

COMMANDS = ("export", "import")
HINT = (
    "prad registry export FILE writes all that a registry holds, its adapters' files too; "
    "prad registry import FILE reads that into an empty one, in a folder or a Redis."
)

DataDir = Annotated[
    Path | None,
    typer.Option(help="The registry's data_dir. If left out: PRAD_REGISTRY_DATA_DIR, or its default."),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(help="The registry's redis_url. If left out: PRAD_REGISTRY_REDIS_URL, or no Redis."),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="The export, a tar file.", dir_okay=False)]

_app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


def run(context: typer.Context) -> None:
    """The command that the first argument in `context` names."""
    command = typer.main.get_command(_app)
    with command.make_context(context.info_name, context.args, parent=context.parent) as inner:
        command.invoke(inner)


@_app.command("export")
def export_command(file: File, data_dir: DataDir = None, redis_url: RedisUrl = None) -> None:
    """Write everything that a registry holds to FILE. One without Redis must be stopped for it."""
    _require_registry(data_dir, redis_url)
    with _opened(data_dir, redis_url) as data:
        print(f"{_said(write_export(data.store, data.files, file))} are in {file}")


@_app.command("import")
def import_command(file: File, data_dir: DataDir = None, redis_url: RedisUrl = None) -> None:
    """Read everything in FILE into an empty registry: versions, routing, history and files."""
    with _opened(data_dir, redis_url) as data:
        print(f"{_said(read_export(data.store, data.files, file))} are in {data.place}")


def _require_registry(data_dir: Path | None, redis_url: str | None) -> None:
    """Raises CannotStartError where there is none: opening a folder would make an empty one in it."""
    settings = _settings(data_dir, redis_url)
    folder = settings.data_dir.expanduser()
    if settings.redis_url is not None or (folder / SQLITE_FILE).is_file():
        return
    of_serve = folder / "registry"
    hint = f"; prad serve keeps its own in {of_serve}" if (of_serve / SQLITE_FILE).is_file() else ""
    raise CannotStartError(f"{folder} holds no registry: expected {SQLITE_FILE} in it{hint}")


def _settings(data_dir: Path | None, redis_url: str | None) -> RegistrySettings:
    given: dict[str, Any] = {"data_dir": data_dir, "redis_url": redis_url}
    return RegistrySettings(**{name: value for name, value in given.items() if value is not None})


@contextmanager
def _opened(data_dir: Path | None, redis_url: str | None) -> Iterator[OpenedData]:
    data = open_data(_settings(data_dir, redis_url))
    try:
        yield data
    finally:
        data.close()


def _said(found: Snapshot) -> str:
    return f"{len(found.tasks)} tasks with {len(found.versions)} versions, at revision {found.revision},"
