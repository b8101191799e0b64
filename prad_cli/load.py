"""`prad bench load`: a running server under load, and what its clients feel.

Any OpenAI-compatible one: nothing is asked of it beyond streamed completions, or chats, with usage.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prad import __version__
from prad.core.errors import PradError
from prad.core.json_text import json_lines
from prad.http.asking import DEFAULT_API, api_client, listed
from prad_cli.bench import app
from prad_cli.extras import require_extra
from prad_cli.operating import Json, credential, print_json, progress_console

if TYPE_CHECKING:
    from rich.console import Console

    from prad.http.load import Answer, Run

_EXAMPLES = (
    "Examples:\n\nprad bench load --concurrency 16 --requests 200\n\n"
    "prad bench load --rate 8 --tasks all --ttft-ms 500 --itl-ms 50 --plot load.png\n\n"
    "prad bench load --url https://api.example.com/v1 --chat --tasks my-model --prompts questions.jsonl"
)
_WORDS = (
    "river stone window garden letter morning table winter paper market bridge summer forest candle harbour "
    "engine mirror pocket kitchen valley signal basket copper velvet thunder orchard lantern"
)
_SHOWN_ERRORS = 5


class LoadError(PradError):
    """The server cannot be put under load: it is not reached, or there is nothing to ask it."""


@dataclass(frozen=True)
class Limits:
    """What a request has to keep for it to count as good, in milliseconds; None: nothing."""

    ttft_ms: float | None
    itl_ms: float | None

    @property
    def any(self) -> bool:
        return self.ttft_ms is not None or self.itl_ms is not None

    def kept(self, answer: "Answer") -> bool:
        """By its time to the first token, and the mean time of each one behind it."""
        in_time = self.ttft_ms is None or 1e3 * answer.first_s <= self.ttft_ms
        return not answer.error and in_time and self._flows(answer)

    def _flows(self, answer: "Answer") -> bool:
        return self.itl_ms is None or 1e3 * answer.mean_between_s <= self.itl_ms

    def __str__(self) -> str:
        named = {"TTFT": self.ttft_ms, "ITL": self.itl_ms}
        return ", ".join(f"{name} ≤ {most:g} ms" for name, most in named.items() if most is not None)


@app.command("load", epilog=_EXAMPLES)
def load_command(
    url: Annotated[str, typer.Option(envvar="PRAD_API_URL", help="URL of the running server.")] = DEFAULT_API,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests a second, at random moments (Poisson), whatever the server does.", min=1e-3
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(help="Requests under way at once, instead of a rate.  \\[default: 8]", min=1),
    ] = None,
    requests: Annotated[int, typer.Option(help="How many in all.", min=1)] = 100,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks or models that are asked in turn, separated by commas; all: every one that the "
            "server lists; left out: the first one."
        ),
    ] = "",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='File of prompts, lines of {"prompt"} or of text, taken in turn; random words if left out.',
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    words: Annotated[int, typer.Option(help="Of a random prompt.", min=1)] = 48,
    max_tokens: Annotated[int, typer.Option(help="Of an answer, at most.", min=1)] = 64,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos", help="Answers as long as --max-tokens; not every server knows the field."
        ),
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Ask /v1/chat/completions.")] = False,
    ttft_ms: Annotated[
        float | None, typer.Option(help="A good request's time to the first token, at most.", min=0)
    ] = None,
    itl_ms: Annotated[
        float | None, typer.Option(help="A good request's mean time between tokens, at most.", min=0)
    ] = None,
    warm_up: Annotated[int, typer.Option(help="Requests before it, which do not count.", min=0)] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.", min=0.001)] = 300.0,
    seed: Annotated[int, typer.Option(help="Of random words and moments.", min=0)] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this PNG.", dir_okay=False)] = None,
    api_key: Annotated[
        str,
        typer.Option(help="API key. Others on this machine can read flags: rather set PRAD_API_KEY."),
    ] = "",
    as_json: Json = False,
) -> None:
    """Put a running server under load: time to the first token, between tokens and to the end, and goodput
    under limits (--ttft-ms, --itl-ms). Exit status 1 if a request failed."""
    if rate is not None and concurrency is not None:
        raise typer.BadParameter("give --rate or --concurrency, not both")
    if plot is not None:
        require_extra("bench", "matplotlib")
    from prad.http.load import poisson_arrivals

    key = api_key or credential("PRAD_API_KEY")
    asked = _texts(prompts, words, requests + warm_up, seed)
    names = _names(url, tasks, key)
    more = {"max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
    more |= {"ignore_eos": True} if ignore_eos else {}
    bodies = [_body(text, name, chat) | more for text, name in zip(asked, cycle(names), strict=False)]
    at_s = None if rate is None else list(islice(poisson_arrivals(rate, seed), requests))
    at_once = (concurrency or 8) if rate is None else 1 << 20
    run = _run(url, bodies, warm_up, at_s, at_once, chat=chat, key=key, timeout=timeout)
    limits = Limits(ttft_ms, itl_ms)
    told = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "url": url,
        "tasks": len(names),
        "load": f"{rate:g} requests/s" if rate is not None else f"{at_once} at once",
        **figures(run, limits),
    }
    if plot is not None:
        _draw(run, limits, told, plot)
    if as_json:
        print_json(told)
    else:
        _show(told, limits)
    if told["failed"]:
        raise typer.Exit(1)


def figures(run: "Run", limits: Limits) -> dict[str, Any]:
    """Of one run: what clients felt, how many were served well, and what went wrong, the commonest first."""
    from prad.http.load import latencies

    wrong: dict[str, int] = {}
    for answer in run.answers:
        if answer.error:
            wrong[answer.error] = wrong.get(answer.error, 0) + 1
    good = sum(map(limits.kept, run.answers))
    goodput = {
        "limits": str(limits),
        "requests_per_s": round(good / run.wall_s, 2),
        "share": round(good / len(run.answers), 4),
    }
    return {
        "requests": len(run.answers),
        "failed": sum(wrong.values()),
        "seconds": round(run.wall_s, 2),
        **latencies(run),
        "goodput": goodput if limits.any else None,
        "errors": dict(sorted(wrong.items(), key=lambda pair: -pair[1])[:_SHOWN_ERRORS]),
    }


def _texts(path: Path | None, words: int, count: int, seed: int) -> list[str]:
    if path is None:
        chosen, known = random.Random(seed), _WORDS.split()
        return [" ".join(chosen.choices(known, k=words)) for _ in range(count)]
    found = [_prompt(path, number, line) for number, line in json_lines(path)]
    if not found:
        raise LoadError(f'{path} holds no prompts: expected lines of text, or of {{"prompt"}}')
    return list(islice(cycle(found), count))


def _prompt(path: Path, number: int, line: bytes) -> str:
    text = line.decode("utf-8", errors="replace")
    if not text.startswith("{"):
        return text
    try:
        return str(json.loads(text)["prompt"])
    except (ValueError, KeyError) as error:
        raise LoadError(f'{path}:{number}: expected a text, or {{"prompt": text}}') from error


def _names(url: str, wanted: str, key: str) -> list[str]:
    """What is asked in turn. Raises LoadError."""
    with api_client(url, 1, LoadError, key=key) as client:
        there = listed(client, LoadError)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if names == ["all"]:
        names = there
    elif not names:
        names = there[:1]
    if not names:
        raise LoadError(f"{url} lists no model: name some with --tasks, or show a key that may use one")
    return names


def _body(text: str, name: str, chat: bool) -> dict[str, Any]:
    asked: Mapping[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    return {"model": name, **asked}


def _run(
    url: str,
    bodies: Sequence[Mapping[str, Any]],
    warm_up: int,
    at_s: Sequence[float] | None,
    at_once: int,
    *,
    chat: bool,
    key: str,
    timeout: float,
) -> "Run":
    from prad.http.load import COMPLETIONS, LoadClient

    client = LoadClient(
        url.rstrip("/").removesuffix("/v1"),
        path="/v1/chat/completions" if chat else COMPLETIONS,
        headers={"authorization": f"Bearer {key}"} if key else {},
        timeout_s=timeout,
    )
    with client, progress_console().status(f"{len(bodies)} requests"):
        if warm_up:
            client.run(bodies[:warm_up], at_once=at_once)
        return client.run(bodies[warm_up:], at_s=at_s, at_once=at_once)


def _show(told: Mapping[str, Any], limits: Limits) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True)
    done = told["requests"] - told["failed"]
    console.print(f"{done} of {told['requests']} requests answered in {told['seconds']} s, {told['load']}")
    if done:
        _show_times(console, told, limits)
    for error, count in told["errors"].items():
        console.print(f"[red]{count} failed:[/] ", end="")
        console.print(error, markup=False)
    if told["client_cpu_share"] > 0.8:
        console.print("[yellow]the client was busy itself[/]: give it a machine of its own, or ask for less")


def _show_times(console: "Console", told: Mapping[str, Any], limits: Limits) -> None:
    from rich.table import Table

    table = Table("ms", "p50", "p90", "p99", box=None, header_style="bold", pad_edge=False)
    for key, name in (("ttft_ms", "first token"), ("itl_ms", "between tokens"), ("e2e_ms", "whole answer")):
        table.add_row(name, *(f"{told[key][part]:.1f}" for part in ("p50", "p90", "p99")))
    console.print(table)
    console.print(f"throughput {told['requests_per_s']} requests/s, {told['tokens_per_s']} tokens/s")
    if (good := told["goodput"]) is not None:
        console.print(f"goodput    {good['requests_per_s']} requests/s ({good['share']:.1%}) with {limits}")


def _draw(run: "Run", limits: Limits, told: Mapping[str, Any], path: Path) -> None:
    """Times to the first token as requests came; how both kinds of latencies are spread."""
    from matplotlib.figure import Figure

    whole = [answer for answer in run.answers if not answer.error]
    first = [1e3 * answer.first_s for answer in whole]
    between = [1e3 * each for answer in whole for each in answer.between_s]
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].plot([answer.sent_s for answer in whole], first, ".", alpha=0.6)
    axes[0].set(xlabel="sent at, s", ylabel="time to the first token, ms")
    panels = (("time to the first token", first, limits.ttft_ms), ("between tokens", between, limits.itl_ms))
    for at, (name, values, most) in zip(axes[1:], panels, strict=True):
        at.ecdf(values or [0.0])
        if most is not None:
            at.axvline(most, color="tab:red", linestyle="--", label="limit")
            at.legend()
        at.set(xlabel=f"{name}, ms", ylabel="share")
    figure.suptitle(f"{told['requests']} requests, {told['load']}, {told['tokens_per_s']} tokens/s")
    figure.savefig(path, dpi=120)
