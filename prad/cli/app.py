"""The command `prad`. Each subcommand imports what it needs only when it runs, so `--help` is instant."""

import sys

import typer

from prad import __version__
from prad.cli import adapter, evaluate, serve, train

app = typer.Typer(
    name="prad",
    help="Serve hundreds of tasks from one frozen language model: adapters on the prompt, plain decoding.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(adapter.app, name="adapter")
app.command("train")(train.train_command)
app.command("eval")(evaluate.eval_command)
app.command("serve")(serve.serve_command)
app.command("prefill")(serve.prefill_command)
app.command("decode")(serve.decode_command)
app.command("registry")(serve.registry_command)


@app.command("version")
def version_command() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Console script: known errors become one line on stderr, Ctrl-C exits quietly."""
    from prad.cli.errors import known_errors

    try:
        app()
    except known_errors() as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
