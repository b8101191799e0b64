"""The command `prad`. Each subcommand imports what it needs only when it runs, so `--help` is instant."""

import errno
import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from prad import __version__
from prad.core.errors import PradError

_FULL, _FORBIDDEN = {errno.ENOSPC, errno.EDQUOT}, {errno.EACCES, errno.EPERM, errno.EROFS}


_PLACES = {
    "serve": "serve.serve_command",
    "prefill": "services.prefill_command",
    "decode": "services.decode_command",
    "registry": "services.registry_command",
    "adapter": "exchange.app",
    "keys": "keys.app",
    "bench": "load.app",
    "model": "model.app",
    "train": "train.train_command",
    "eval": "evaluate.eval_command",
    "chat": "chat.chat_command",
    "top": "top.top_command",
    "doctor": "doctor.doctor_command",
    "batch": "batch.batch_command",
}
"""Where each command is, or a group of commands; `OPTIONS` of its module are those of its decorator."""


class _Group(TyperGroup):
    """Imports a command when it is asked for: a service waits for what it needs, and for no other's."""

    def list_commands(self, context: Any) -> list[str]:
        return [*_PLACES, *(name for name in self.commands if name not in _PLACES)]

    def get_command(self, context: Any, name: str) -> Any:
        if name not in self.commands:
            wanted = [name] if name in _PLACES else _PLACES  # all: one of them may have been meant
            self.commands.update((each, _imported(each)) for each in wanted)
        return super().get_command(context, name)


def _imported(name: str) -> Any:
    place, _, what = _PLACES[name].partition(".")
    module, group = import_module(f"prad_cli.{place}"), typer.Typer()
    found = getattr(module, what)
    if isinstance(found, typer.Typer):
        group.add_typer(found, name=name)
    else:
        group.command(name, **getattr(module, "OPTIONS", {}))(found)
    return typer.main.get_group(group).commands[name]


app = typer.Typer(
    name="prad",
    cls=_Group,
    help="Serve hundreds of tasks from one frozen language model: adapters on the prompt, plain decoding.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Examples:\n\nprad serve --adapters examples/adapters\n\nprad chat sentiment\n\nprad doctor",
)


@app.command("version", epilog="Example: prad version")
def version_command() -> None:
    """Print the version."""
    typer.echo(__version__)


def _print_version(wanted: bool) -> None:
    if wanted:
        version_command()
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Console script: what a person can mend becomes one line on stderr, Ctrl-C exits quietly."""
    # before torch loads: its threads must not spin while they wait, other services compute on the same cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(prog_name="prad")
    except KeyboardInterrupt:
        sys.exit(130)
    except PradError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in _FULL and not (error.errno in _FORBIDDEN and error.filename):
            raise
        fix = "free some room there" if error.errno in _FULL else "let this user write there"
        said = f"error: {error.filename or 'a file'}: {error.strerror}; {fix}, or choose another folder"
        typer.secho(said, fg="red", err=True)
        sys.exit(1)
