"""The server under load, through HTTP, from a light client in a process of its own.

tasks      N requests at once: of N tasks, of one task, of the plain model, of N tasks while others are
           pushed, of N out of all loaded tasks in turn (more than fit in memory, if --adapters-mib says
           so); the decode step in each, and how many sequences it had.
closed     so many streaming clients at a time, each asking again as soon as it is answered.
open       streaming requests that arrive at random (Poisson), whatever the server does.
streaming  N streaming clients at once against the engine's own tokens/s: as the decode service counts it
           in the same seconds, and alone in this process. The client's own CPU time is subtracted.

Decode makes no drafts: prompts are random ids, and what a model makes of them is guessed too often. What
drafts bring is for `speculation` to say.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count, cycle, islice, takewhile
from pathlib import Path
from typing import Any

import psutil

from bench.adapters import write_artefacts
from bench.engine import LoadedEngine
from bench.flags import Serve
from bench.latency import steady_tokens_per_s
from bench.model import load
from bench.prompts import random_prompts
from bench.rounds import interleaved, ratio, seconds
from bench.serving import NO_DRAFTS, Served, Steps, bodies, served
from prad.http.load import latencies, poisson_arrivals
from prad.lm import LanguageModel

_PUSHED = 64  # adapters for a round at most


def run(arguments: Serve) -> dict[str, Any]:
    model = load(arguments)
    room = ["--adapters-mib", str(arguments.adapters_mib)]
    with served(arguments, model, {"prad-pa": arguments.loaded}, prefill=room, decode=NO_DRAFTS) as server:
        prompts = _Prompts(model, arguments)
        return {
            "model": arguments.model,
            "tasks": _tasks(server, model, prompts, arguments),
            "closed": [_closed(server, prompts, clients, arguments) for clients in arguments.clients],
            "open": [_open(server, prompts, rate, arguments) for rate in arguments.rates],
            "streaming": [_streaming(server, model, prompts, arguments)],
        }


class _Prompts:
    """Fresh random prompts at every call: no cache knows them."""

    def __init__(self, model: LanguageModel, arguments: Serve) -> None:
        self._length, self._vocabulary = arguments.prompt, model.vocab_size
        self._seeds = count()

    def take(self, number: int) -> list[list[int]]:
        return random_prompts(number, self._length, self._vocabulary, next(self._seeds))


def _tasks(server: Served, model: LanguageModel, prompts: _Prompts, arguments: Serve) -> list[dict[str, Any]]:
    number, names = arguments.requests, server.tasks["prad-pa"]
    in_turn = cycle(names)
    few = f"{number} tasks"
    pushed = f"{few}, adapters pushed meanwhile"
    kinds: dict[str, Callable[[], Sequence[str | None]]] = {
        few: lambda: names[:number],
        "one task": lambda: [names[0]] * number,
        "plain model": lambda: [None] * number,
        pushed: lambda: names[:number],
        f"{number} of {len(names)} tasks in turn": lambda: list(islice(in_turn, number)),
    }
    steps: dict[str, list[Steps]] = {name: [] for name in kinds}
    met: dict[str, list[int]] = {name: [] for name in kinds}

    def variant(name: str) -> Callable[[], float]:
        def measure() -> float:
            asked = prompts.take(number), arguments.output, kinds[name]()
            with _pushing(server, next(new)) if name == pushed else nullcontext(Pushes()) as pushes:
                before = server.steps()
                took = server.generate(*asked)
                steps[name].append(server.steps() - before)
                pushes.wanted = False
            met[name].append(pushes.done)
            return took

        return measure

    with _new_adapters(model, len(names), arguments) as new:
        took = interleaved({name: variant(name) for name in kinds}, arguments.rounds, "tasks")
    return [
        {
            "name": name,
            "total_s": round(took[name], 3),
            "tokens_per_s": round(number * arguments.output / took[name], 1),
            # the first one warms up
            "step_ms": round(statistics.median(1e3 * s.seconds / s.count for s in steps[name][1:]), 2),
            "sequences_per_step": round(statistics.median(s.tokens / s.count for s in steps[name][1:]), 1),
            "adapters_pushed": statistics.median(met[name][1:]),
            "rounds_s": [round(s, 3) for s in took.values[name]],
            "rounds_step_ms": [round(1e3 * s.seconds / s.count, 2) for s in steps[name][1:]],
        }
        for name in kinds
    ]


@contextmanager
def _new_adapters(model: LanguageModel, first: int, arguments: Serve) -> Iterator[Iterator[Path]]:
    """Folders of adapters that the server does not know, numbered from `first` on; one for every round."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(arguments.rounds + 1)]
        for at, folder in enumerate(folders):
            write_artefacts(folder, model, "prad-pa", _PUSHED, arguments.r, first + at * _PUSHED)
        yield iter(folders)


@dataclass(slots=True)
class Pushes:
    """How many were done, and whether there shall be more."""

    done: int = 0
    wanted: bool = True


@contextmanager
def _pushing(server: Served, folder: Path) -> Iterator[Pushes]:
    """Pushes the adapters of a folder one after the other, each probed and made ready by prefill, from the
    start of what is inside until no more are wanted. Who pushes steps back: operators have machines of their
    own, and it is the server's doing that is measured."""
    pushes = Pushes()

    def push() -> None:
        for adapter in sorted(folder.iterdir()):
            if not pushes.wanted:
                return
            server.push_version(adapter, adapter.name)
            pushes.done += pushes.wanted

    with ThreadPoolExecutor(1, initializer=_wait_for_idle_cores) as pool:
        pushed = pool.submit(push)
        yield pushes
        pushed.result()


def _wait_for_idle_cores() -> None:
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _closed(server: Served, prompts: _Prompts, clients: int, arguments: Serve) -> dict[str, Any]:
    number = max(2 * clients, 16)
    tasks = list(islice(cycle(server.tasks["prad-pa"]), number))
    asked = bodies(prompts.take(number), arguments.output, tasks, stream=True)
    done = server.run(asked, at_once=clients)
    return {"clients": clients, "requests": number, **latencies(done), "memory_mib": server.memory_mib()}


def _open(server: Served, prompts: _Prompts, rate: float, arguments: Serve) -> dict[str, Any]:
    arrivals = _arrivals(rate, arguments.open_seconds)
    tasks = list(islice(cycle(server.tasks["prad-pa"]), len(arrivals)))
    asked = bodies(prompts.take(len(arrivals)), arguments.output, tasks, stream=True)
    done = server.run(asked, at_s=arrivals)
    return {"rate": rate, "requests": len(arrivals), **latencies(done)}


def _arrivals(rate: float, within_s: float) -> list[float]:
    """Within so many seconds; one at least."""
    return list(takewhile(lambda at: at < within_s, poisson_arrivals(rate, seed=1))) or [0.0]


def _streaming(server: Served, model: LanguageModel, prompts: _Prompts, arguments: Serve) -> dict[str, Any]:
    number, tasks = arguments.requests, server.tasks["prad-pa"][: arguments.requests]
    per_engine: list[float] = []
    client_cpu: list[float] = []

    def through_http() -> float:
        before = server.steps()
        asked = bodies(prompts.take(number), arguments.output, tasks, stream=True)
        done = server.run(asked)
        steps = server.steps() - before
        per_engine.append(steps.tokens / steps.seconds)
        client_cpu.append(done.cpu_s / done.wall_s)
        return steady_tokens_per_s(done, psutil.cpu_count() or 1)

    def alone() -> float:
        engine = LoadedEngine(model, number, arguments.prompt, arguments.output)

        def steps() -> None:
            for _ in range(arguments.output):
                engine.step()

        return float(number * arguments.output / seconds(steps)())

    rates = interleaved({"http": through_http, "alone": alone}, arguments.rounds, "streaming")
    http, in_service = rates.values["http"], per_engine[1:]  # the first one warms up
    return {
        "clients": number,
        "http_tokens_per_s": round(rates["http"], 1),
        "engine_in_service_tokens_per_s": round(statistics.median(in_service), 1),
        "engine_alone_tokens_per_s": round(rates["alone"], 1),
        "of_engine_in_service": round(ratio(http, in_service), 3),
        "of_engine_alone": round(ratio(http, rates.values["alone"]), 3),
        "client_cpu_share": round(statistics.median(client_cpu[1:]), 3),
        "rounds_tokens_per_s": rates.figures(1),
    }


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots(1, 3)
    axes[0].barh([r["name"] for r in result["tasks"]], [r["step_ms"] for r in result["tasks"]])
    axes[0].set(xlabel="decode step, ms")
    for at, (name, x, scale) in zip(
        axes[1:], (("closed", "clients", "log"), ("open", "rate", "linear")), strict=True
    ):
        for kind in ("ttft", "itl"):
            for part, line in (("p50", "-"), ("p99", "--")):
                rows = result[name]
                at.plot(
                    [r[x] for r in rows],
                    [r[f"{kind}_ms"][part] for r in rows],
                    line,
                    marker="o",
                    label=f"{kind} {part}",
                )
        at.set(
            xscale=scale,
            yscale="log",
            xlabel={"rate": "requests/s"}.get(x, x),
            ylabel="ms",
            title=f"{name} loop",
        )
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower right", ncols=4)
