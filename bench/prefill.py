"""What adapters add to a prompt pass: 64 prompts of 64 tasks, uniform and ragged, against the plain pass; and
how the plain pass grows with its tokens, in short prompts and in one long one.

Kinds of pass take turns within a round; a figure is the median of its rounds. Beside each the least work that
the adapters are: `floor_gflop` and `floor_mb` (their weights once, the rows they read, and the rows they
change read and written).
"""

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.adapters import ready_adapters
from bench.flags import Prefill
from bench.model import load
from bench.rounds import ratio
from prad.adapters import Adapter, PromptAdaptation
from prad.lm import LanguageModel, PackedBatch
from prad.lm.kernels import Kind

METHODS = {"PA": "prad-pa", "LoRA": "prad-lora"}


def run(arguments: Prefill) -> dict[str, Any]:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, tasks = load(arguments), arguments.tasks
    shapes = {"uniform": [arguments.tokens] * tasks, "ragged": _ragged(tasks)}
    rows: list[dict[str, Any]] = []
    for r in arguments.ranks:
        sets = {f"{name} r={r}": ready_adapters(model, method, tasks, r) for name, method in METHODS.items()}
        for shape, lengths in shapes.items():
            measured = _measure(model, lengths, sets, arguments.rounds)
            rows += [{"shape": f"{shape}, r={r}", "tokens": sum(lengths)} | row for row in measured]
    growth = [grown(model, tokens, arguments) for tokens in arguments.growth]
    return {"model": arguments.model, "rows": rows, "growth": growth}


def grown(model: LanguageModel, tokens: int, arguments: Prefill) -> dict[str, Any]:
    """A pass of so many tokens, in prompts of the usual length and in a single one, and what is GEMMs."""
    shapes = {"short": [arguments.tokens] * max(1, tokens // arguments.tokens), "one": [tokens]}
    row: dict[str, Any] = {"tokens": tokens}
    passes: dict[str, list[_Spent]] = {name: [] for name in shapes}
    for number in range(arguments.rounds + 1):
        for name, lengths in shapes.items():
            spent = _timed_pass(model, lengths)
            if number:
                passes[name].append(spent)
    for name, each in passes.items():
        row[f"{name}_ms"] = round(1e3 * statistics.median(p.pass_s for p in each), 1)
        gemms = [p.gemms_s for p in each if p.gemms_s is not None]
        row[f"{name}_gemms_ms"] = round(1e3 * statistics.median(gemms), 1) if gemms else None
    return row | {"tokens_per_s": round(1e3 * sum(shapes["short"]) / row["short_ms"])}


@dataclass(frozen=True, slots=True)
class _Spent:
    """Of one pass; `gemms_s` None where torch computes."""

    pass_s: float
    gemms_s: float | None


def _timed_pass(model: LanguageModel, lengths: list[int]) -> _Spent:
    prompts = [[(100 + i) % model.vocab_size for i in range(n)] for n in lengths]
    batch = PackedBatch.of_sequences(prompts, device=model.device, kernels=model.kernels)
    spent: Counter[Kind] = Counter()
    if model.kernels is not None:
        model.kernels.spent = spent
    started = time.perf_counter()
    with torch.inference_mode():
        model.forward(batch)
    took = time.perf_counter() - started
    if model.kernels is not None:
        model.kernels.spent = None
    return _Spent(took, spent.get(Kind.LINEAR))  # the kernels may be there, and leave a pass to torch


def _measure(
    model: LanguageModel, lengths: list[int], sets: dict[str, list[Adapter]], rounds: int
) -> list[dict[str, Any]]:
    """Each kind of pass in turn, `rounds` times after a first one that warms up; a row for each kind."""
    random.seed(0)
    prompts = [[random.randrange(100, model.vocab_size) for _ in range(n)] for n in lengths]

    def a_pass(adapters: list[Adapter] | None) -> Callable[[], object]:
        def forward() -> object:
            adaptation = None
            if adapters is not None:
                adaptation = PromptAdaptation.of_prompts(
                    adapters, lengths, lengths, model.device, model.kernels
                )
            return model.forward(
                PackedBatch.of_sequences(prompts, device=model.device, kernels=model.kernels), adaptation
            )

        return forward

    passes = {"plain": a_pass(None)} | {name: a_pass(adapters) for name, adapters in sets.items()}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    cpu: dict[str, list[float]] = {name: [] for name in passes}
    with torch.inference_mode():
        for number in range(rounds + 1):
            names = list(passes)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                forward = passes[name]
                started, cpu_started = time.perf_counter(), time.process_time()
                forward()
                seconds[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - cpu_started)
    rows = []
    for name in passes:
        row = {
            "adapters": name,
            "median_s": round(statistics.median(seconds[name][1:]), 4),
            "cpu_s": round(statistics.median(cpu[name][1:]), 4),
            "of_plain": round(ratio(seconds[name][1:], seconds["plain"][1:]), 4),
            "rounds_s": [round(s, 3) for s in seconds[name][1:]],
            "cpu_of_plain": round(ratio(cpu[name][1:], cpu["plain"][1:]), 4),
            **(_floor(model, sets[name], sum(lengths)) if name in sets else {}),
        }
        rows.append(row)
        print(f"{sum(lengths):6} tokens  {row}", flush=True)
    return rows


def plot(result: dict[str, Any], figure: Any) -> None:
    axes, right = figure.subplots(1, 2)
    rows = [row for row in result["rows"] if row["adapters"] != "plain"][::-1]
    axes.barh([f"{row['shape']}: {row['adapters']}" for row in rows], [row["of_plain"] for row in rows])
    axes.axvline(1.0, linestyle="--", color="gray", label="no adapters")
    axes.set(xlabel="prompt pass, times the plain one", title="What adapters add to a prompt pass")
    figure.legend(loc="outside lower left")
    growth = result["growth"]
    for name, label in (("short_ms", "short prompts"), ("one_ms", "one prompt")):
        right.plot([g["tokens"] for g in growth], [g[name] for g in growth], marker="o", label=label)
    right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title="Prompt pass")
    right.legend()


def _floor(model: LanguageModel, adapters: list[Adapter], tokens: int) -> dict[str, float]:
    """Of low-rank matrices: a row meets each once, the first of a pair reads it, the second changes it."""
    matrices = {n: p for n, p in adapters[0].parameters.items() if p.dim() == 3}
    touched = sum(
        p[0].numel() // min(p.shape[1:]) * (1 if n.endswith("down") else 2) for n, p in matrices.items()
    )
    rows = tokens * model.num_layers * touched * model.dtype.itemsize
    return {
        "floor_gflop": round(2 * tokens * sum(p.numel() for p in matrices.values()) / 1e9, 2),
        "floor_mb": round((rows + sum(a.nbytes for a in adapters)) / 1e6, 1),
    }


def _ragged(tasks: int) -> list[int]:
    """16 to 256 tokens, in no order."""
    lengths: list[int] = torch.linspace(16, 256, tasks).int().tolist()
    random.Random(0).shuffle(lengths)
    return lengths
