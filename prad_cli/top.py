"""`prad top`: queue, batch, blocks, tokens a second, and latencies by task, as they are now."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from prad.core.errors import PradError
from prad.http.asking import DEFAULT_API
from prad_cli.operating import DEFAULT_REGISTRY, Json, Registry, credential, print_json
from prad_cli.serve import METRICS_PORT

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from prad_cli.vitals import Decode, Prefill, Task, Vitals, Watch

OPTIONS = {
    "epilog": (
        "Examples:\n\nprad top\n\nprad top --once --json\n\n"
        "prad top --api http://10.0.0.1:8000 --api http://10.0.0.2:8000 --decode http://10.0.0.3:8002/metrics"
    )
}
_START = "Start them with: prad serve; or name others with --api, --decode and --registry"


class NothingRunsError(PradError):
    """No service answers."""


def top_command(
    api: Annotated[
        list[str] | None,
        typer.Option(help=f"URL of a prefill service; repeatable.  \\[default: {DEFAULT_API}]"),
    ] = None,
    decode: Annotated[
        list[str] | None,
        typer.Option(
            help="Metrics page of a decode service; repeatable.  "
            f"\\[default: http://127.0.0.1:{METRICS_PORT}/metrics]"
        ),
    ] = None,
    registry: Registry = DEFAULT_REGISTRY,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.05)] = 2.0,
    rows: Annotated[int, typer.Option(help="Tasks that are shown, the busiest first.", min=1)] = 20,
    once: Annotated[
        bool,
        typer.Option("--once", help="One picture, as a pipe gets it: rates are over --every seconds."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a running stack, live: what waits, what runs, KV blocks, tokens a second, TTFT and ITL by task.

    From /metrics of prefill and decode services, and the registry's list of replicas. Shows PRAD_API_KEY and
    PRAD_TOKEN where keys are asked for. Times are means since the look before, or since the start where
    nothing came. Ctrl-C ends it.
    """
    from prad_cli.vitals import Watch

    watch = Watch(
        api or [DEFAULT_API],
        decode or [f"http://127.0.0.1:{METRICS_PORT}"],
        registry,
        key=credential("PRAD_API_KEY"),
        token=credential("PRAD_TOKEN"),
    )
    if once or as_json or not sys.stdout.isatty():
        _print_once(watch, every, rows, as_json=as_json)
    else:
        _live(watch, every, rows)


def _print_once(watch: "Watch", every: float, rows: int, *, as_json: bool) -> None:
    from rich.console import Console

    watch.look()
    time.sleep(every)
    seen = watch.look()
    if as_json:
        print_json(seen.plain())
    else:
        Console().print(picture(seen, rows))
    if not seen.any_answers:
        raise NothingRunsError(f"no service answers ({seen.registry_away}). {_START}")
    if seen.registry_away and all(each.away for each in seen.prefills):
        raise NothingRunsError(f"neither an API nor the registry tells anything ({seen.registry_away})")


def _live(watch: "Watch", every: float, rows: int) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(screen=True, auto_refresh=False) as live:
        while True:
            seen = watch.look()
            hint = Text("" if seen.any_answers else f"\nno service answers. {_START}", style="yellow")
            live.update(Group(picture(seen, rows), hint), refresh=True)
            time.sleep(every)


def picture(seen: "Vitals", rows: int) -> "RenderableType":
    """One frame."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [
        _prefills(seen.prefills),
        Text(),
        _decodes(seen.decodes),
        Text(),
        _replicas(seen),
        Text(),
        _tasks(seen.tasks[:rows]),
    ]
    if (more := len(seen.tasks) - rows) > 0:
        parts.append(Text(f"and {more} more tasks (--rows)", style="dim"))
    return Group(*parts)


def _table(*columns: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(columns[0], overflow="fold", ratio=1)
    for name in columns[1:]:
        table.add_column(name, justify="right")
    return table


def _prefills(services: "Sequence[Prefill]") -> "Table":
    table = _table(
        "prefill", "waiting", "under way", "requests/s", "prompt tokens/s", "TTFT", "adapters", "cached"
    )
    for each in services:
        if each.away:
            table.add_row(_away(each.url, each.away))
            continue
        table.add_row(
            each.url.removesuffix("/metrics"),
            str(each.waiting),
            str(each.live),
            _shown(each.requests_per_s),
            _shown(each.prompt_tokens_per_s),
            _ms(each.ttft_ms),
            f"{each.adapters} ({each.adapter_mib:.0f} MiB)",
            f"{each.cached_tokens} tokens",
        )
    return table


def _decodes(services: "Sequence[Decode]") -> "Table":
    table = _table("decode", "batch", "tokens/s", "step", "tokens/step", "blocks used", "drafts right")
    for each in services:
        if each.away:
            table.add_row(_away(each.url, each.away))
            continue
        used = each.blocks - each.free_blocks
        table.add_row(
            each.url.removesuffix("/metrics"),
            str(each.running),
            _shown(each.tokens_per_s),
            _ms(each.step_ms),
            _shown(each.tokens_per_step),
            f"{used} of {each.blocks} ({used / max(each.blocks, 1):.0%})",
            "–" if each.drafts_accepted is None else f"{each.drafts_accepted:.0%}",
        )
    return table


def _replicas(seen: "Vitals") -> "RenderableType":
    from rich.text import Text

    if seen.registry_away:
        return Text.assemble("registry  ", (seen.registry_away, "red"))
    table = _table(f"replicas of {seen.registry}", "state", "revision", "fetching", "troubles")
    for each in seen.replicas:
        style = {"ready": "green", "failed": "red", "away": "dim"}.get(each.state, "yellow")
        revision = "–" if each.revision is None else str(each.revision)
        troubles = Text("; ".join(each.troubles))
        table.add_row(Text(each.name), Text(each.state, style=style), revision, str(each.fetching), troubles)
    return table


def _tasks(tasks: "Sequence[Task]") -> "Table":
    table = _table("task", "requests", "requests/s", "tokens/s", "TTFT", "ITL")
    for each in tasks:
        table.add_row(
            each.task or "(plain model)",
            str(each.requests),
            _shown(each.requests_per_s),
            _shown(each.tokens_per_s),
            _ms(each.ttft_ms),
            _ms(each.itl_ms),
        )
    return table


def _away(url: str, why: str) -> "Text":
    from rich.text import Text

    return Text(f"{url.removesuffix('/metrics')}: {why}", style="red")


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} ms"
