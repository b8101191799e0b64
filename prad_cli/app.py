"""The command `prad`. Each subcommand imports what it needs only when it runs, so `--help` is instant."""

import errno
import os
import sys
from typing import Annotated

import typer

from prad import __version__
from prad.core.errors import PradError
from prad_cli import (
    adapter,
    batch,
    bench,
    chat,
    doctor,
    evaluate,
    exchange,
    keys,
    load,
    model,
    serve,
    services,
    top,
    train,
)
from prad_cli.flags import PASS_ARGUMENTS

_FULL, _FORBIDDEN = {errno.ENOSPC, errno.EDQUOT}, {errno.EACCES, errno.EPERM, errno.EROFS}

app = typer.Typer(
    name="prad",
    help="Serve hundreds of tasks from one frozen language model: adapters on the prompt, plain decoding.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Examples:\n\nprad serve --adapters examples/adapters\n\nprad chat sentiment\n\nprad doctor",
)
app.command("serve")(serve.serve_command)
for name, command in services.COMMANDS.items():
    app.command(name, context_settings=PASS_ARGUMENTS, add_help_option=False)(command)
adapter.app.command("import", epilog=exchange.IMPORT_EXAMPLES)(exchange.import_command)
adapter.app.command("export", epilog=exchange.EXPORT_EXAMPLES)(exchange.export_command)
bench.app.command("load", epilog=load.EXAMPLES)(load.load_command)
app.add_typer(adapter.app, name="adapter")
app.add_typer(keys.app, name="keys")
app.add_typer(bench.app, name="bench")
app.add_typer(model.app, name="model")
app.command("train")(train.train_command)
app.command("eval")(evaluate.eval_command)
app.command("chat", epilog=chat.EXAMPLES)(chat.chat_command)
app.command("top", epilog=top.EXAMPLES)(top.top_command)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor_command)
app.command("batch")(batch.batch_command)


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
