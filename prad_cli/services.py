"""`prad prefill`, `prad decode`, `prad registry`: one service alone. Their flags are their settings."""

from collections.abc import Sequence
from typing import Any, TypeVar

import typer
from pydantic import ValidationError
from pydantic_settings import BaseSettings

PASS_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

S = TypeVar("S", bound=BaseSettings)


def prefill_command(context: typer.Context) -> None:
    """Run the prefill service alone (HTTP API). `prad prefill --help` lists its settings."""
    from prefill_service.server import run
    from prefill_service.settings import PrefillSettings

    run(_settings(PrefillSettings, "prad prefill", context.args))


def decode_command(context: typer.Context) -> None:
    """Run the decode service alone (gRPC). `prad decode --help` lists its settings."""
    from decode_service import DecodeSettings, run

    _log("decode")
    run(_settings(DecodeSettings, "prad decode", context.args))


def registry_command(context: typer.Context) -> None:
    """Run the adapter registry alone (HTTP). `prad registry --help` lists its settings."""
    from adapter_registry.server import run
    from adapter_registry.settings import RegistrySettings

    _log("registry")
    run(_settings(RegistrySettings, "prad registry", context.args))


COMMANDS = {"prefill": prefill_command, "decode": decode_command, "registry": registry_command}


def _settings(kind: type[S], program: str, arguments: Sequence[str]) -> S:
    """Flags win over environment variables, those over defaults. Exits with the fault in one line."""
    options: dict[str, Any] = {
        "_cli_parse_args": list(arguments),
        "_cli_prog_name": program,
        "_cli_kebab_case": True,
        "_cli_implicit_flags": True,
    }
    try:
        return kind(**options)
    except ValidationError as error:
        for problem in error.errors():
            flag = "--" + "-".join(map(str, problem["loc"])).replace("_", "-")
            typer.secho(f"error: {flag}: {problem['msg']} (got {problem['input']!r})", fg="red", err=True)
        raise typer.Exit(2) from error


def _log(service: str) -> None:
    import logging

    logging.basicConfig(level="INFO", format=f"%(asctime)s {service} %(levelname)s %(message)s")
