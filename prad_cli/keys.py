"""`prad keys create|list|revoke`: operators' tokens and API keys, over the registry's API."""

from typing import Annotated, Literal

import typer
from pydantic import ValidationError

from adapter_registry.keys import KeyLimits, NewKey, Role
from prad_cli.operating import DEFAULT_REGISTRY, Json, Registry, print_json, say_pending, talking
from prad_cli.tables import described_key, show_keys

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make, list and revoke keys: API keys for clients (role complete), and tokens of operators (read, "
    "push, route, admin: each may do what those before it may; SECURITY.md has the list).\n\n"
    "From the first API key on, the API asks everyone for one; from the first operator's token on, the "
    "registry does. These and other commands show the registry what PRAD_TOKEN says, or the file that "
    "PRAD_TOKEN_FILE names, and the API what PRAD_API_KEY or PRAD_API_KEY_FILE say.",
    epilog="Example: [bold]prad keys create alice --task sentiment[/bold]",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is, or what for.")]
Most = Annotated[int | None, typer.Option(min=1, help="Of an API key, at each prefill service.")]


@app.command(
    epilog="Examples:\n\n[bold]prad keys create alice --task sentiment --requests-per-minute 60[/bold]\n\n"
    "[bold]prad keys create ci --role push --json | jq -r .token > ci.token[/bold]"
)
def create(
    name: Name,
    role: Annotated[
        Literal["complete", "read", "push", "route", "admin"], typer.Option(help="What it is for.")
    ] = "complete",
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Of an API key: a task that it may use, or the plain model's id; repeatable. All if none is."
        ),
    ] = None,
    requests_per_minute: Most = None,
    tokens_per_minute: Most = None,
    concurrent: Most = None,
    as_json: Json = False,
    registry: Registry = DEFAULT_REGISTRY,
) -> None:
    """Make a key. Its token is printed once, and kept nowhere."""
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent": concurrent,
    }
    try:
        wanted = NewKey(
            name=name, role=Role(role), tasks=tuple(task) if task else None, limits=KeyLimits(**limits)
        )
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("name",):
            raise typer.BadParameter(
                f"{name!r}: expected 1 to 64 letters, digits and . _ @ -, beginning with a letter or digit",
                param_hint="NAME",
            ) from error
        where = ".".join(map(str, first["loc"]))
        raise typer.BadParameter(": ".join(filter(None, (where, first["msg"])))) from error
    with talking(registry) as client:
        made = client.create_key(wanted)
    if as_json:
        print_json(made.model_dump(mode="json"))
        return
    print(f"{described_key(made)}. This is its token, shown this once:\n{made.token}")
    say_pending(made)


@app.command("list", epilog="Example: [bold]prad keys list --json[/bold]")
def list_(as_json: Json = False, registry: Registry = DEFAULT_REGISTRY) -> None:
    """All keys there ever were: role, tasks, limits, who made them, which are revoked."""
    with talking(registry) as client:
        keys = client.keys()
    if as_json:
        print_json([key.model_dump(mode="json") for key in keys])
    elif keys:
        show_keys(keys)
    else:
        print("No keys. Make one: prad keys create NAME")


@app.command(epilog="Example: [bold]prad keys revoke alice[/bold]")
def revoke(name: Name, as_json: Json = False, registry: Registry = DEFAULT_REGISTRY) -> None:
    """Revoke a key: new requests with it are refused, those under way end as they would. Its record stays."""
    with talking(registry) as client:
        gone = client.revoke_key(name)
    if as_json:
        print_json(gone.model_dump(mode="json"))
        return
    print(f"the key {gone.name!r} is revoked; answers under way are finished")
    say_pending(gone)
