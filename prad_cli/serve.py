"""`prad serve`: registry, decode and prefill on this machine, and what to type next."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prad.core.host_names import is_loopback
from prad.core.models import DEFAULT_MODEL, served_name
from prad_cli.ready import Addresses, Ready, model_said, threads_said
from prad_cli.serve_flags import agreed, given, shared_option, without_effect

if TYPE_CHECKING:
    from rich.console import Console

    from adapter_registry.client import RegistryClient
    from local_stack.stack import Stack

API_PORT, REGISTRY_PORT, DECODE_PORT, METRICS_PORT = 8000, 8001, 50051, 8002
DEFAULT_DATA = Path("~/.local/share/prad")


def port_option(flag: str, default: int, variable: str, help_text: str) -> Any:
    """An option that a service of its own would read from `variable`, too."""

    def read(text: str) -> int:
        if str(text).isdecimal() and 1 <= int(text) <= 65535:
            return int(text)
        from prad.settings import is_service_link

        if is_service_link(str(text)):  # what Kubernetes or Docker set for a service of that name is no port
            return default
        raise typer.BadParameter(f"{text!r} is no port: expected a number from 1 to 65535")

    return typer.Option(flag, help=help_text, envvar=variable, parser=read, metavar="INTEGER")


def serve_command(
    adapters: Annotated[
        Path | None,
        typer.Option(
            help="Folder of adapter folders; each is pushed as a task of its name.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        shared_option(
            "--model",
            "MODEL",
            DEFAULT_MODEL,
            "Folder, .gguf file, Hugging Face id, or the default model.",
            "PRAD_MODEL",
        ),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(help="The plain model's id in the API.", envvar="PRAD_PREFILL_MODEL_NAME"),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address that the API listens on; 0.0.0.0 is every one. Beyond this machine everybody is "
            "asked for an API key (prad keys create). The registry and decode stay on this machine.",
            envvar="PRAD_PREFILL_HOST",
        ),
    ] = "127.0.0.1",
    unprotected: Annotated[
        bool,
        typer.Option(
            "--unprotected",
            help="Beyond this machine, too, ask for keys only once there are any: whoever reaches the API "
            "can use every task until then.",
            envvar="PRAD_PREFILL_UNPROTECTED",
        ),
    ] = False,
    port: Annotated[int, port_option("--port", API_PORT, "PRAD_PREFILL_PORT", "The API's port.")] = API_PORT,
    registry_port: Annotated[
        int,
        port_option("--registry-port", REGISTRY_PORT, "PRAD_REGISTRY_PORT", "The adapter registry's port."),
    ] = REGISTRY_PORT,
    decode_port: Annotated[
        int, port_option("--decode-port", DECODE_PORT, "PRAD_DECODE_PORT", "The decode service's port.")
    ] = DECODE_PORT,
    decode_metrics_port: Annotated[
        int,
        port_option(
            "--decode-metrics-port",
            METRICS_PORT,
            "PRAD_DECODE_METRICS_PORT",
            "The port of decode's /metrics.",
        ),
    ] = METRICS_PORT,
    data_dir: Annotated[
        Path, typer.Option(help="Where the registry keeps adapters, and the logs.", envvar="PRAD_DATA_DIR")
    ] = DEFAULT_DATA,
    redis_url: Annotated[
        str | None,
        typer.Option(
            help="Redis that keeps versions and routing, such as redis://127.0.0.1:6379/0. If left out: "
            "PRAD_REGISTRY_REDIS_URL (unlike flags, no other user can read it), or a file in --data-dir."
        ),
    ] = None,
    files: Annotated[
        str | None,
        typer.Option(
            help="Bucket that keeps adapters' files, s3://BUCKET/FOLDER, with the environment's credentials "
            "(AWS_ACCESS_KEY_ID and so on). If left out: PRAD_REGISTRY_FILES, or --data-dir."
        ),
    ] = None,
    files_endpoint: Annotated[
        str | None,
        typer.Option(
            help="URL of the server of that bucket, such as http://127.0.0.1:9000. If left out: "
            "PRAD_REGISTRY_FILES_ENDPOINT, AWS_ENDPOINT_URL_S3, or AWS."
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        shared_option(
            "--cache-dir", "CACHE_DIR", "~/.cache/prad", "Where converted models are kept.", "PRAD_CACHE_DIR"
        ),
    ] = None,
    dtype: Annotated[
        str | None, shared_option("--dtype", "DTYPE", "bfloat16", "bfloat16 or float32.")
    ] = None,
    device: Annotated[str | None, shared_option("--device", "DEVICE", "cpu", "cpu, cuda or cuda:N.")] = None,
    weights: Annotated[
        Literal["full", "int8", "int4"] | None,
        typer.Option(
            help="Of decode's linear layers: int8 or int4 are faster, int4 for few sequences, and not exact. "
            "If left out: PRAD_DECODE_WEIGHTS, or full."
        ),
    ] = None,
    prefill_weights: Annotated[
        Literal["full", "int8", "int4"] | None,
        typer.Option(
            help="Of prefill's linear layers: int8 or int4 are faster, and not exact: adapters were trained "
            "on full. If left out: PRAD_PREFILL_WEIGHTS, or full."
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

    What has no flag here, or is given none, is set as PRAD_PREFILL_*, PRAD_DECODE_* and PRAD_REGISTRY_* in
    the environment: see prad prefill --help and so on. What of that has no effect is said at the start.
    """
    from rich.console import Console

    from local_stack.stack import require_apart, require_free

    ports = {
        "--port": port,
        "--registry-port": registry_port,
        "--decode-port": decode_port,
        "--decode-metrics-port": decode_metrics_port,
    }
    require_apart(ports)
    for flag, number in ports.items():
        require_free(number, flag, host if flag == "--port" else "127.0.0.1")
    here = _Here(
        data_dir.expanduser(),
        Addresses.of(host, port, registry_port, decode_metrics_port),
        adapters,
        host,
        unprotected,
    )
    served = agreed("--model", "MODEL", model, DEFAULT_MODEL)
    computed = agreed("--dtype", "DTYPE", dtype, "bfloat16")
    shared = given(
        {
            "--model": model,
            "--cache-dir": cache_dir,
            "--dtype": dtype,
            "--device": device,
            "--threads": threads,
        }
    )
    registry = {
        "--port": registry_port,
        "--redis-url": redis_url,
        "--files": files,
        "--files-endpoint": files_endpoint,
    }
    decode = {"--port": decode_port, "--metrics-port": decode_metrics_port, "--weights": weights}
    prefill = {
        "--host": host,
        "--port": port,
        "--model-name": model_name,
        "--nice": nice,
        "--weights": prefill_weights,
    }
    own = {"registry": here.registry_flags(), "prefill": here.prefill_flags(decode_port)}
    flags = {
        "registry": given(registry | own["registry"]),
        "decode": [*shared, *given(decode)],
        "prefill": [*shared, *given(prefill | own["prefill"]), *(["--unprotected"] if unprotected else [])],
    }
    about = {"model": model_said(model_name or served_name(served), computed, prefill_weights, weights)}
    for text in without_effect(own):
        Console(stderr=True).print(f"[yellow]without effect:[/] {text}", soft_wrap=True)
    _run(flags, here, Console(stderr=True), about | {"threads": threads_said(threads)})


def _run(flags: Mapping[str, list[str]], here: "_Here", console: "Console", about: Mapping[str, str]) -> None:
    """Starts every service with its flags, pushes, says what to type next, and supervises until Ctrl-C."""
    from local_stack.signals import stopped_by_signals
    from local_stack.stack import Stack, answers
    from local_stack.supervisor import Supervisor

    here.warn(console)
    with stopped_by_signals(), Stack(here.logs) as stack, _said_when_stopping(console):
        _start(stack, flags, here, console)
        with _doing(console, "verifying the adapters"):
            found = _push(stack, here)
        for name, reason in found.failed.items():
            console.print(f"[red]{name} cannot be served:[/] {reason}")
        asked = found.keys or not (here.unprotected or is_loopback(here.host))
        pids = {service.name: service.process.pid for service in stack.services}
        warned = [f"{service.name}: {text}" for service in stack.services for text in service.warnings()]
        places = here.logs, here.admin_token
        console_is_on = answers(f"{here.at.registry}/console/sign-in")
        welcome = Ready(here.at, here.host, found.tasks, asked, *places, about, pids, console_is_on, warned)
        welcome.say(console.print)
        ready = {
            "registry": lambda: answers(f"{here.at.registry}/ready"),
            "decode": lambda: answers(here.at.decode_metrics),
            "prefill": lambda: answers(f"{here.at.api}/ready"),
        }
        # replicas go on with what they have while the registry is away, whatever it waits for
        Supervisor(stack, ready, partial(_say_when, console), missed_by_none=["registry"]).run()


def _start(stack: "Stack", flags: Mapping[str, list[str]], here: "_Here", console: "Console") -> None:
    from adapter_registry.secret import ensure_secret
    from local_stack.stack import answers

    ensure_secret(here.replicas_secret)
    ensure_secret(here.admin_token)
    with _doing(console, "starting the registry"):
        # prefill takes longest: of two cores it has one, the others have the second in turn
        stack.start("registry", flags["registry"])
        stack.start("prefill", flags["prefill"])
        stack.wait_until(lambda: answers(f"{here.at.registry}/ready"), "starting the registry")
        stack.start("decode", flags["decode"], before="prefill")
    with _doing(console, "loading the model (the first start converts it: about a minute)"):
        stack.wait_until(lambda: answers(f"{here.at.api}/ready"), "starting")


def _push(stack: "Stack", here: "_Here") -> "_Found":
    """Pushes the adapters, and waits until prefill has what the registry knows."""
    from adapter_registry.client import RegistryClient
    from adapter_registry.secret import ensure_secret
    from local_stack.pushing import push_all

    token = ensure_secret(here.admin_token)
    failed = {} if here.adapters is None else push_all(here.adapters, here.at.registry, token)
    with RegistryClient(here.at.registry, token=token) as client:
        state, keys = client.state(), client.keys()
        stack.wait_until(lambda: _replicas_ready(client, state.revision), "loading the adapters")
    tasks = [task.task for task in state.tasks if task.routing.split]
    return _Found(tasks, failed, any(key.role == "complete" for key in keys))


@dataclass(frozen=True)
class _Found:
    """What the registry knows after the push."""

    tasks: list[str]
    failed: Mapping[str, str]
    keys: bool
    """Whether clients have keys, so that everybody is asked for one."""


@dataclass(frozen=True)
class _Here:
    """This machine's part of it: files, addresses, and who may come."""

    data: Path
    at: "Addresses"
    adapters: Path | None
    host: str
    unprotected: bool

    @property
    def logs(self) -> Path:
        return self.data / "logs"

    @property
    def replicas_secret(self) -> Path:
        return self.data / "replica-secret"

    @property
    def admin_token(self) -> Path:
        return self.data / "admin-token"

    def registry_flags(self) -> dict[str, object]:
        """What follows from this command's own flags and folders, and no variable changes."""
        return {
            "--data-dir": self.data / "registry",
            "--replica-secret-file": self.replicas_secret,
            "--admin-token-file": self.admin_token,
            "--api-url": self.at.api,
        }

    def prefill_flags(self, decode_port: int) -> dict[str, object]:
        return {
            "--decode": f"127.0.0.1:{decode_port}",
            "--registry": self.at.registry,
            "--registry-secret-file": self.replicas_secret,
        }

    def warn(self, console: "Console") -> None:
        from local_stack.pushing import adapter_folders
        from prad.artefact import RECORD

        if self.adapters is None or adapter_folders(self.adapters):
            return
        fix = "nothing is pushed"
        if (self.adapters / RECORD).is_file():
            above = self.adapters.resolve().parent
            fix += f": it is an adapter itself, name the folder that it lies in ({above})"
        console.print(f"[yellow]{self.adapters} holds no adapter folders:[/] {fix}", soft_wrap=True)


def _doing(console: "Console", what: str) -> AbstractContextManager[object]:
    """A spinner, or a line where there is no terminal."""
    if console.is_terminal:
        return console.status(what)
    console.print(what, soft_wrap=True)
    return nullcontext()


def _say_when(console: "Console", text: str) -> None:
    console.print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}", markup=False, soft_wrap=True)


@contextmanager
def _said_when_stopping(console: "Console") -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        text = "stopping: answers under way may end, for up to half a minute; Ctrl-C again ends them"
        with suppress(OSError):  # the terminal was closed
            console.print(text, soft_wrap=True)
        raise


def _replicas_ready(registry: "RegistryClient", revision: int) -> bool:
    """Whether prefill has all that the registry knows, or all that it can have; or serves all of it, and
    fetches what it does not have when that is wanted."""
    connected = [replica for replica in registry.replicas().replicas if replica.connected]
    return bool(connected) and all(
        replica.state in ("ready", "failed") or (replica.fetching and (replica.revision or 0) >= revision)
        for replica in connected
    )
