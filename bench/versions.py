"""One decode batch under one, two, ... versions of a task: what a decode step takes.

PrAd server   through HTTP, each request for `task@N`; the step as the decode service measures it
our engine    the same in-process, with a LoRA for each version at every generated token, as others do
PEFT          LoRA in its mixed-adapter batch; a step is what one token more takes

Every batch has the same number of sequences; only how many versions they are of differs.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

from bench.adapters import ready_adapters, write_artefacts, write_peft_lora
from bench.flags import Versions
from bench.kinds import named_dtypes
from bench.model import load, model_folder
from bench.own_engine import OwnEngine
from bench.peer import Peer
from bench.prompts import random_prompts
from bench.rounds import interleaved
from bench.serving import Served, served
from prad.lm import LanguageModel

TASK = "versions"
OURS, OWN, PEFT = "PrAd server", "LoRA at every token, our engine", "LoRA at every token, PEFT"
_LABELS = {OURS: f"{OURS}: adapters on the prompt only"}


def run(arguments: Versions) -> dict[str, Any]:
    model = load(arguments)
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        root = Path(name)
        server = running.enter_context(_serving(arguments, model, root))
        variants = {(OURS, k): _ours(server, model, arguments, k) for k in arguments.versions}
        lora = ready_adapters(model, "prad-lora", max(arguments.versions), arguments.r)
        for k in arguments.versions:
            engine = OwnEngine(model, list(islice(cycle(lora[:k]), arguments.requests)))
            variants[OWN, k] = _step(engine.generate, [None] * arguments.requests, model, arguments)
        versions = {}
        if not arguments.skip_peft:
            folders = write_peft_lora(root / "lora", model, max(arguments.versions), arguments.r)
            options = {"model": str(model_folder(arguments)), "adapters": folders}
            for dtype, called in named_dtypes(arguments.requests).items():
                log = root / f"{dtype}.log"
                peft = running.enter_context(Peer("transformers", None, options | {"dtype": dtype}, log))
                peft.wait_ready()
                versions = peft.versions
                for k in arguments.versions:
                    named = list(islice(cycle(list(folders)[:k]), arguments.requests))
                    variants[f"{PEFT}{called}", k] = _step(peft.generate, named, model, arguments)
        took = interleaved(variants, arguments.rounds, "versions")
    first = {engine: 1e3 * took[engine, arguments.versions[0]] for engine, _ in variants}
    rows = [
        {
            "engine": engine,
            "versions": k,
            "step_ms": round(1e3 * took[engine, k], 2),
            "times_first": round(1e3 * took[engine, k] / first[engine], 3),
            "rounds_ms": [round(1e3 * s, 2) for s in took.values[engine, k]],
        }
        for engine, k in variants
    ]
    return {"model": arguments.model, "peers": versions, "sequences": arguments.requests, "rows": rows}


@contextmanager
def _serving(arguments: Versions, model: LanguageModel, root: Path) -> Iterator[Served]:
    """The stack, with so many versions of one task."""
    folders = root / "versions"
    names = write_artefacts(folders, model, "prad-lora", max(arguments.versions), arguments.r)
    with served(arguments, model, {}) as server:
        for name in names:
            server.push_version(folders / name, TASK)
        yield server


def _ours(server: Served, model: LanguageModel, arguments: Versions, versions: int) -> Callable[[], float]:
    tasks = [f"{TASK}@{1 + i % versions}" for i in range(arguments.requests)]
    seeds = count(versions << 20)

    def measure() -> float:
        before = server.steps()
        prompts = random_prompts(arguments.requests, arguments.prompt, model.vocab_size, next(seeds))
        server.generate(prompts, arguments.output, tasks)
        steps = server.steps() - before
        return steps.seconds / steps.count

    return measure


def _step(
    generate: Callable[[Sequence[Sequence[int]], int, Sequence[str | None]], float],
    adapters: Sequence[str | None],
    model: LanguageModel,
    arguments: Versions,
) -> Callable[[], float]:
    """Seconds that a token more takes, of some."""
    more = arguments.steps

    def measure() -> float:
        prompts = random_prompts(arguments.requests, arguments.prompt, model.vocab_size, 0)
        return (generate(prompts, 1 + more, adapters) - generate(prompts, 1, adapters)) / more

    return measure


def plot(result: dict[str, Any], figure: Any) -> None:
    at = figure.subplots()
    engines = list(dict.fromkeys(row["engine"] for row in result["rows"]))
    counts = list(dict.fromkeys(row["versions"] for row in result["rows"]))
    for engine in engines:
        rows = [row for row in result["rows"] if row["engine"] == engine]
        medians = [row["step_ms"] for row in rows]
        spread = [
            [median - min(row["rounds_ms"]) for row, median in zip(rows, medians, strict=True)],
            [max(row["rounds_ms"]) - median for row, median in zip(rows, medians, strict=True)],
        ]
        label = _LABELS.get(engine, engine)
        at.errorbar([row["versions"] for row in rows], medians, spread, marker="o", capsize=3, label=label)
        below = engine == engines[0]
        for row in rows:
            value = row["step_ms"]
            at.annotate(
                f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
                (row["versions"], value),
                (0, -9 if below else 9),
                textcoords="offset points",
                ha="center",
                va="top" if below else "bottom",
            )
    at.set(
        xscale="log",
        yscale="log",
        xlabel=f"versions of a task in one decode batch of {result['sequences']}",
        ylabel="decode step, ms",
        title="What versions of an adapter cost a decode step",
    )
    at.set_xticks(counts, [str(k) for k in counts])
    at.minorticks_off()
    at.margins(y=0.15)
    figure.legend(loc="outside lower center", ncols=min(3, len(engines)))
