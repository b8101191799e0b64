"""`prad prefill`, `prad decode`, `prad registry`: one service alone. Their flags are their settings, which
are read before the service is imported: `--help` and a wrong flag wait for no torch.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import typer
from pydantic_settings import BaseSettings

from prad_cli.flags import PASS_ARGUMENTS, read_flags

OPTIONS = {"context_settings": PASS_ARGUMENTS, "add_help_option": False}

S = TypeVar("S", bound=BaseSettings)


def prefill_command(context: typer.Context) -> None:
    """Run the prefill service alone (HTTP API). `prad prefill --help` lists its settings."""
    from prefill_service.settings import PrefillSettings

    _log("prefill")
    settings = _settings(
        PrefillSettings, context, "prad prefill --decode 10.0.0.2:50051 --registry http://10.0.0.3:8001"
    )
    with _imports():
        from prefill_service.server import run

    run(settings)


def decode_command(context: typer.Context) -> None:
    """Run the decode service alone (gRPC). `prad decode --help` lists its settings."""
    from decode_service.settings import DecodeSettings

    _log("decode")
    settings = _settings(DecodeSettings, context, "prad decode --metrics-port 8002 --kv-cache-mib 2048")
    with _imports():
        from decode_service.server import run

    run(settings)


def registry_command(context: typer.Context) -> None:
    """Run the adapter registry alone (HTTP), or export and import what it holds.

    `prad registry --help` lists its settings.
    """
    with _imports():
        from adapter_registry.server import run
        from adapter_registry.settings import RegistrySettings
        from prad_cli import registry_files

    if context.args and context.args[0] in registry_files.COMMANDS:
        registry_files.run(context)
        return
    _log("registry")
    run(read_flags(RegistrySettings, context, RegistrySettings.__doc__ or "", registry_files.HINT))


@contextmanager
def _imports() -> Iterator[None]:
    """What is imported stays: no collection goes through it, neither amid the imports nor later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _settings(kind: type[S], context: typer.Context, example: str) -> S:
    """Flags win over environment variables, those over defaults."""
    return read_flags(kind, context, kind.__doc__ or "", f"Example: {example}")


def _log(service: str) -> None:
    import logging

    from local_stack.stack import LOG_FORMAT

    logging.basicConfig(level="INFO", format=LOG_FORMAT.format(service=service))
    logging.getLogger("httpx").setLevel("WARNING")
