"""`prad doctor`: what could keep this machine from serving, and what to do about it."""

import email.utils
import os
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from pydantic import ValidationError

from prad import __version__
from prad.core.models import DEFAULT_MODEL
from prad.http.asking import DEFAULT_API
from prad_cli import findings
from prad_cli.findings import Finding, Level, fault_from
from prad_cli.model import DEFAULT_CACHE, CacheOption, ModelOption
from prad_cli.operating import DEFAULT_REGISTRY, Json, print_json
from prad_cli.serve import API_PORT, DECODE_PORT, DEFAULT_DATA, METRICS_PORT, REGISTRY_PORT, port_option

OPTIONS = {
    "epilog": (
        "Examples:\n\nprad doctor\n\nprad doctor --redis-url redis://127.0.0.1:6379/0 --json\n\n"
        "prad doctor --running --registry http://10.0.0.3:8001"
    )
}
_ANSWER_S = 5.0
_SKEW_S, _WRONG_S = 5.0, 300.0
"""Between two clocks: what is told, and what keeps signed requests (S3) and certificates from working."""
_PORT = "As of prad serve: is it free?"
_SYNCHRONISE = "synchronise it with the others' (NTP: timedatectl set-ntp true)"
_STYLES = {Level.OK: "green", Level.NOTE: "yellow", Level.FAULT: "bold red"}


def doctor_command(
    model: ModelOption = DEFAULT_MODEL,
    cache_dir: CacheOption = DEFAULT_CACHE,
    data_dir: Annotated[
        Path, typer.Option(help="Where prad serve keeps adapters, and the logs.", envvar="PRAD_DATA_DIR")
    ] = DEFAULT_DATA,
    redis_url: Annotated[
        str | None,
        typer.Option(
            help="The registry's Redis: is it reached, and does it keep what it acknowledges? It is a "
            "secret if it holds a password: rather set PRAD_REGISTRY_REDIS_URL.",
            envvar="PRAD_REGISTRY_REDIS_URL",
        ),
    ] = None,
    port: Annotated[int, port_option("--port", API_PORT, "PRAD_PREFILL_PORT", _PORT)] = API_PORT,
    registry_port: Annotated[
        int, port_option("--registry-port", REGISTRY_PORT, "PRAD_REGISTRY_PORT", _PORT)
    ] = REGISTRY_PORT,
    decode_port: Annotated[
        int, port_option("--decode-port", DECODE_PORT, "PRAD_DECODE_PORT", _PORT)
    ] = DECODE_PORT,
    decode_metrics_port: Annotated[
        int, port_option("--decode-metrics-port", METRICS_PORT, "PRAD_DECODE_METRICS_PORT", _PORT)
    ] = METRICS_PORT,
    running: Annotated[
        bool, typer.Option("--running", help="Look at the server that runs here, instead of for free ports.")
    ] = False,
    url: Annotated[str | None, typer.Option(help="A running API: does it answer, is its clock ours?")] = None,
    registry: Annotated[str | None, typer.Option(help="The same of an adapter registry.")] = None,
    decode_metrics: Annotated[
        str | None, typer.Option(help="The same of a decode service, by its metrics page.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look for what keeps this machine from serving: packages, CPU, kernels, memory, ports, model, folders.

    Also a Redis and running services, if they are named. Exit status 1 if there is a fault.
    """
    services = {"API": url, "registry": registry, "decode": decode_metrics}
    if running:
        here = (DEFAULT_API, DEFAULT_REGISTRY, f"http://127.0.0.1:{METRICS_PORT}/metrics")
        services = {name: said or at for (name, said), at in zip(services.items(), here, strict=True)}
    found = _machine(model, cache_dir.expanduser(), data_dir.expanduser())
    if not running:
        ports = {
            "--port": port,
            "--registry-port": registry_port,
            "--decode-port": decode_port,
            "--decode-metrics-port": decode_metrics_port,
        }
        found += fault_from("ports", lambda: findings.ports(ports))
    if redis_url:
        found += fault_from("Redis", lambda: redis(redis_url))
    for name, at in services.items():
        if at is not None:
            found += fault_from(name, partial(service, name, at))
    if as_json:
        print_json({"version": __version__, "serves": not _faults(found), "findings": _plain(found)})
    else:
        _show(found, running=running)
    if _faults(found):
        raise typer.Exit(1)


def _machine(model: str, cache_dir: Path, data_dir: Path) -> list[Finding]:
    from adapter_registry.settings import RegistrySettings
    from decode_service.settings import DecodeSettings
    from prefill_service.settings import PrefillSettings

    found = fault_from("packages", findings.packages)
    found += fault_from("CPU", lambda: findings.cpu(cache_dir))
    folder: Path | None = None
    try:
        told, folder = findings.model(model, cache_dir)
        found += told
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        found.append(Finding("model", Level.FAULT, f"{model}: {error}", "mend --model"))
    try:
        prefill, decode, _ = PrefillSettings(), DecodeSettings(), RegistrySettings()
    except ValidationError as error:
        first = error.errors()[0]
        said = f"{error.title}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        return [*found, Finding("settings", Level.FAULT, said, "mend or unset it in the environment")]
    found += findings.unread((PrefillSettings, DecodeSettings, RegistrySettings), os.environ)
    room = decode.kv_cache_mib + prefill.prefix_cache_mib + prefill.chunked_kv_mib + prefill.adapters_mib
    found += fault_from("clock", own_clock)
    found += fault_from("memory", lambda: findings.memory(folder, room))
    found += fault_from("limits", lambda: findings.limits(prefill.kv_shared_mib))
    return found + fault_from(
        "folders", lambda: findings.folders({"--cache-dir": cache_dir, "--data-dir": data_dir})
    )


def redis(url: str) -> Iterator[Finding]:
    """Reached, and does it keep what it acknowledges?"""
    from redis.exceptions import RedisError

    from adapter_registry.redis_address import RedisAddress
    from adapter_registry.redis_server import warnings

    try:
        address = RedisAddress(url)
        address.check()
        named, client = str(address), address.client()
    except ValueError as error:
        fix = "one such as redis://127.0.0.1:6379/0 (prad registry --help lists the kinds)"
        yield Finding("Redis", Level.FAULT, f"its URL cannot be read: {error}", fix)
        return
    try:
        took = time.perf_counter()
        client.ping()
        took = time.perf_counter() - took
        lost = warnings(client, address, replicas=0)
    except RedisError as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        yield Finding("Redis", Level.FAULT, f"{named}: {said}", "start it, or mend --redis-url")
        return
    finally:
        client.close()
    yield Finding("Redis", Level.OK, f"{named} answers in {1e3 * took:.1f} ms")
    for warning in lost:
        told, _, fix = warning.partition(": ")
        yield Finding("Redis keeps data", Level.NOTE, told, fix)


def service(name: str, url: str) -> Iterator[Finding]:
    """Whether it answers, is ready, and has our version and our clock."""
    base = url.rstrip("/").removesuffix("/v1")
    metrics = name == "decode"  # which has no other page
    page = f"{base.removesuffix('/metrics')}/metrics" if metrics else f"{base}/ready"
    try:
        with httpx.Client(timeout=_ANSWER_S, trust_env=False) as client:
            sent = time.time()
            answer = client.get(page)
            got = time.time()
            told = {} if metrics else _json(client.get(f"{base}/"))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        said = f"no answer from {base}: {str(error) or type(error).__name__}"
        yield Finding(name, Level.FAULT, said, "start it (prad serve), or mend the URL")
        return
    if answer.status_code == httpx.codes.OK:
        yield Finding(name, Level.OK, f"{base} is ready")
    else:
        reasons = "; ".join(map(str, _json(answer).get("reasons", ()))) or f"it answers {answer.status_code}"
        yield Finding(name, Level.FAULT, f"{base} is not ready: {reasons}", "its log says more")
    if (version := told.get("version", __version__)) != __version__:
        said = f"{version} there, {__version__} here"
        yield Finding(f"{name}'s version", Level.NOTE, said, "prefill and decode need the same minor version")
    yield from clock(name, answer.headers.get("date"), sent, got)


def own_clock() -> Iterator[Finding]:
    """What time it is: not before this code was written, as a clock says that begins anew in 1970."""
    now, written = time.time(), max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
    said = _utc(now)
    if written - now < _WRONG_S:
        yield Finding("clock", Level.OK, f"{said}; of services that are named it is compared with theirs")
        return
    found = f"{said}, which is before this code was written here ({_utc(written)})"
    yield Finding("clock", Level.FAULT, found, _SYNCHRONISE)


def clock(name: str, said: str | None, sent: float, got: float) -> Iterator[Finding]:
    """How far a service's clock is from ours, by the Date of what it answered between two of our times; that
    counts whole seconds."""
    try:
        there = email.utils.parsedate_to_datetime(said or "").timestamp()
    except ValueError:
        return
    ahead = there + 0.5 - (sent + got) / 2
    off = max(abs(ahead) - 0.5 - (got - sent) / 2, 0.0)
    if off < _SKEW_S:
        yield Finding(f"{name}'s clock", Level.OK, "as ours")
        return
    level = Level.FAULT if off >= _WRONG_S else Level.NOTE
    found = f"{off:.0f} s {'ahead of' if ahead > 0 else 'behind'} ours ({_utc(there)})"
    yield Finding(f"{name}'s clock", level, found, _SYNCHRONISE)


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        told = response.json()
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _faults(found: Sequence[Finding]) -> bool:
    return any(each.level is Level.FAULT for each in found)


def _plain(found: Sequence[Finding]) -> list[dict[str, str]]:
    return [
        {"what": each.what, "level": str(each.level), "found": each.found, "fix": each.fix} for each in found
    ]


def _show(found: Sequence[Finding], *, running: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("", "", "found", box=None, header_style="bold", show_header=False, pad_edge=False)
    for each in found:
        said = Text(each.found)
        if each.fix:
            said.append(f"\n→ {each.fix}", style="cyan")
        table.add_row(Text(each.level, style=_STYLES[each.level]), Text(each.what), said)
    console.print(table)
    if _faults(found):
        console.print("\n[bold red]this machine does not serve as it is[/]; what has → says what to do")
    elif running:
        console.print("\n[bold green]it serves[/]: what runs here answers")
    else:
        console.print("\n[bold green]ready to serve[/]: prad serve --adapters examples/adapters")
