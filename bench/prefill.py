"""What adapters add to a prompt pass: 64 prompts of 64 tasks, uniform and ragged, against the plain pass; and
how the plain pass grows with its tokens, in short prompts and in one long one, and how near it is to what its
products take at the peak of the hardware (`limit_ms`: see `floor`).

Kinds of pass take turns within a round; a figure is the median of its rounds. Beside each the least work that
the adapters are: `floor_gflop` and `floor_mb` (their weights once, the rows they read, and the rows they
change read and written).
"""

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from bench.adapters import ready_adapters
from bench.flags import Prefill
from bench.floor import weight_matrices
from bench.limits import Hardware, products_of
from bench.model import load
from bench.rounds import Samples, interleaved, ratio
from prad.adapters import Adapter, PromptAdaptation
from prad.lm import LanguageModel, PackedBatch
from prad.lm.kernels import Kind

_BUFFER_MIB = 256  # of the bandwidth
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
    hardware = Hardware(_BUFFER_MIB)
    growth = [grown(model, tokens, arguments, hardware) for tokens in arguments.growth]
    return {"model": arguments.model, "rows": rows, "growth": growth}


def grown(model: LanguageModel, tokens: int, arguments: Prefill, hardware: Hardware) -> dict[str, Any]:
    """A pass of so many tokens, in prompts of the usual length and in a single one, what of it is GEMMs and
    what attention, and what the products of the former take at least."""
    shapes = {"short": [arguments.tokens] * max(1, tokens // arguments.tokens), "one": [tokens]}
    spent: dict[str, list[Counter[Kind]]] = {name: [] for name in shapes}

    def variant(name: str) -> Callable[[], float]:
        def measure() -> float:
            took, calls = _timed_pass(model, shapes[name])
            spent[name].append(calls)
            return took

        return measure

    passes = {(name, 0): variant(name) for name in shapes}
    took = interleaved(passes | hardware.kinds, arguments.rounds, f"{tokens} tokens")
    row: dict[str, Any] = {"tokens": tokens}
    for name, calls in spent.items():
        row[f"{name}_ms"] = round(1e3 * took[name, 0], 1)
        for part, kind in (("gemms", Kind.LINEAR), ("attention", Kind.PROMPT)):
            # the kernels may be there, and leave a pass to torch
            known = [each[kind] for each in calls[1:] if kind in each]
            row[f"{name}_{part}_ms"] = round(1e3 * statistics.median(known), 1) if known else None
    row["tokens_per_s"] = round(1e3 * sum(shapes["short"]) / row["short_ms"])
    return row | _limit(model, shapes["short"], hardware, took)


def _limit(
    model: LanguageModel, lengths: list[int], hardware: Hardware, took: Samples[Any]
) -> dict[str, Any]:
    """Of the products alone; every row meets all matrices but the vocabulary's, which last rows meet."""
    per_giga = hardware.giga_s(took, products_of(model.dtype))
    if per_giga is None:
        return {}
    matrices = weight_matrices(model)
    rows = [len(lengths) if w.shape[0] == model.vocab_size else sum(lengths) for w in matrices]
    giga = 2e-9 * sum(n * w.numel() for n, w in zip(rows, matrices, strict=True))
    read = hardware.read_s(took, sum(w.nbytes for w in matrices))
    limits = [max(giga * each, once) for each, once in zip(per_giga, read, strict=True)]
    return {
        "limit_ms": round(1e3 * statistics.median(limits), 1),
        "times_limit": round(ratio(took.values["short", 0], limits), 2),
    }


def _timed_pass(model: LanguageModel, lengths: list[int]) -> tuple[float, Counter[Kind]]:
    """Its seconds, and those of the kernels' calls: none where torch computes."""
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
    return took, spent


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
    if "limit_ms" in growth[0]:
        right.plot([g["tokens"] for g in growth], [g["limit_ms"] for g in growth], "--", label="limit, GEMMs")
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
