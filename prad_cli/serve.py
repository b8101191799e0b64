"""`prad serve`: registry, decode and prefill on this machine, and what to type next."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prad_cli.model import (
    DEFAULT_CACHE,
    DEFAULT_MODEL,
    CacheOption,
    DeviceOption,
    DTypeOption,
    ModelOption,
)

_START_S = 300.0  # the first start converts or fetches the model


def serve_command(
    adapters: Annotated[
        Path | None,
        typer.Option(
            help="Folder of adapter folders; each is pushed as a task of its name.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    model_name: Annotated[str | None, typer.Option(help="The plain model's id in the API.")] = None,
    port: Annotated[int, typer.Option(help="The API's port.")] = 8000,
    registry_port: Annotated[int, typer.Option(help="The adapter registry's port.")] = 8001,
    decode_port: Annotated[int, typer.Option(help="The decode service's port.")] = 50051,
    data_dir: Annotated[
        Path, typer.Option(help="Where the registry keeps adapters, and the logs.", envvar="PRAD_DATA_DIR")
    ] = Path("~/.local/share/prad"),
    cache_dir: CacheOption = DEFAULT_CACHE,
    dtype: DTypeOption = "bfloat16",
    device: DeviceOption = "cpu",
    weights: Annotated[
        Literal["full", "int8"] | None,
        typer.Option(
            help="int8: decode's linear layers rounded to 8 bits, faster for few sequences. If left out: "
            "PRAD_DECODE_WEIGHTS, or full."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Computing threads of prefill and of decode, each. If left out: PRAD_PREFILL_THREADS and "
            "PRAD_DECODE_THREADS, or torch's default.",
            min=1,
        ),
    ] = None,
    nice: Annotated[
        int | None,
        typer.Option(
            help="How far prompt passes step back for decode (Linux). If left out: PRAD_PREFILL_NICE, or 0.",
            min=0,
            max=19,
        ),
    ] = None,
) -> None:
    """Run everything on this machine, with nothing else installed.

    Example:  prad serve --adapters examples/adapters

    What has no flag here is set as PRAD_PREFILL_*, PRAD_DECODE_* and PRAD_REGISTRY_* in the environment: see
    prad prefill --help and so on.
    """
    from rich.console import Console

    from local_stack.pushing import push_all
    from local_stack.signals import stopped_by_signals
    from local_stack.stack import Stack, answers, require_free

    console = Console(stderr=True)
    data_dir = data_dir.expanduser()
    api, registry = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{registry_port}"
    shared = ["--model", model, "--cache-dir", str(cache_dir), "--dtype", dtype, "--device", device]
    shared += _given({"--threads": threads})
    own = _given({"--model-name": model_name, "--nice": nice})
    decode = ["--decode", f"127.0.0.1:{decode_port}"]
    logs = data_dir / "logs"
    for wanted in (port, registry_port, decode_port):
        require_free(wanted)
    with stopped_by_signals(), Stack(logs) as stack:
        with console.status("starting the registry"):
            stack.start("registry", ["--port", str(registry_port), "--data-dir", str(data_dir / "registry")])
            stack.start("decode", [*shared, *_given({"--weights": weights}), "--port", str(decode_port)])
            stack.start("prefill", [*shared, *own, *decode, "--registry", registry, "--port", str(port)])
            stack.wait_until(lambda: answers(f"{registry}/ready"), 30.0, "starting the registry")
        with console.status("loading the model (the first start converts it: about a minute)"):
            stack.wait_until(lambda: answers(f"{api}/ready"), _START_S, "starting")
        with console.status("verifying the adapters"):
            failed = {} if adapters is None else push_all(adapters, registry)
            tasks = _current_tasks(registry)
            listed = [f"{api}/v1/models/{task}" for task in tasks]
            stack.wait_until(lambda: all(map(answers, listed)), 60.0, "loading the adapters")
        for name, reason in failed.items():
            console.print(f"[red]{name} cannot be served:[/] {reason}")
        _say_what_next(console.print, api, registry, tasks, logs)
        stack.watch()


def _given(flags: dict[str, Any]) -> list[str]:
    """Those that were given: the others are the environment's, or the service's own default."""
    return [part for flag, value in flags.items() if value is not None for part in (flag, str(value))]


def _current_tasks(registry: str) -> list[str]:
    from adapter_registry.client import RegistryClient

    with RegistryClient(registry) as client:
        return [task.task for task in client.state().tasks if task.current is not None]


def _say_what_next(say: Callable[..., None], api: str, registry: str, tasks: list[str], logs: Path) -> None:
    shown = ", ".join(tasks) or "none yet: prad adapter push DIR --task NAME"
    say(f"\n[bold green]ready[/]  API {api}   registry {registry}   logs {logs}")
    say(f"tasks  {shown}\n\n[bold]try[/]")
    for task, prompt in _EXAMPLES.items():
        if task in tasks:
            say(_curl(api, f'{{"task":"{task}","prompt":"{prompt}"}}'), markup=False, soft_wrap=True)
    say(
        _curl(api, '{"prompt":"The capital of France is","stream":true}', "-N "), markup=False, soft_wrap=True
    )
    say("\nCtrl-C stops everything")


_EXAMPLES = {
    "e2e": "name[The Eagle], eatType[coffee shop], food[Japanese], "
    "priceRange[less than £20], near[Burger King]",
    "sentiment": "a gripping , beautifully acted film",
}


def _curl(api: str, body: str, flags: str = "") -> str:
    return f"  curl {flags}{api}/v1/completions -H 'content-type: application/json' -d '{body}'"
