"""What adapters add to a prompt pass: 64 prompts of 64 tasks, uniform and ragged, against the plain pass.

    python -m bench.prefill             # rounds in turn, medians; minutes
    python -m bench.prefill --smoke     # the same, small; seconds

The result goes to bench/results/prefill.json, with the least work that the adapters are: `floor_gflop` and
`floor_mb` (their weights once, the rows they read, and the rows they change read and written).
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.record import write_result
from prad.adapters import Adapter, PromptAdaptation, find_method, new_adapter
from prad.lm import DEFAULT_MODEL, LanguageModel, PackedBatch, resolve_model

METHODS = {"PA": "prad-pa", "LoRA": "prad-lora"}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures and returns the figures; writes bench/results/prefill.json unless it is a smoke run."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = LanguageModel.load(resolve_model(arguments.model, Path("~/.cache/prad")))
    tasks = 4 if arguments.smoke else arguments.tasks
    rounds = 1 if arguments.smoke else arguments.rounds
    shapes = {"uniform": [arguments.tokens] * tasks, "ragged": _ragged(tasks)}
    figures: dict[str, Any] = {}
    for r in (16,) if arguments.smoke else (16, 108):
        sets = {f"{name} r={r}": _adapters(model, method, r, tasks) for name, method in METHODS.items()}
        for shape, lengths in shapes.items():
            figures[f"{shape}, r={r}"] = _measure(model, lengths, sets, rounds)
    result = {"model": arguments.model, "tasks": tasks, "rounds": rounds, "figures": figures}
    if not arguments.smoke:
        write_result("prefill", result)
    return result


def _measure(
    model: LanguageModel, lengths: list[int], sets: dict[str, list[Adapter]], rounds: int
) -> dict[str, Any]:
    """Each kind of pass in turn, `rounds` times after a first one that warms up."""
    random.seed(0)
    prompts = [[random.randrange(100, model.vocab_size) for _ in range(n)] for n in lengths]

    def a_pass(adapters: list[Adapter] | None) -> Callable[[], object]:
        def forward() -> object:
            adaptation = None
            if adapters is not None:
                adaptation = PromptAdaptation.of_prompts(adapters, lengths, lengths, model.device)
            return model.forward(PackedBatch.of_sequences(prompts, device=model.device), adaptation)

        return forward

    passes = {"plain": a_pass(None)} | {name: a_pass(adapters) for name, adapters in sets.items()}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    cpu: dict[str, list[float]] = {name: [] for name in passes}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, forward in passes.items():
                started, cpu_started = time.perf_counter(), time.process_time()
                forward()
                seconds[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - cpu_started)
    figures: dict[str, Any] = {"tokens": sum(lengths)}
    for name in passes:
        # a ratio within its own round: what disturbs a shared machine disturbs neighbours in time alike
        ratios = [own / plain for own, plain in zip(seconds[name][1:], seconds["plain"][1:], strict=True)]
        figures[name] = {
            "median_s": round(statistics.median(seconds[name][1:]), 4),
            "cpu_s": round(statistics.median(cpu[name][1:]), 4),
            "of_plain": round(statistics.median(ratios), 4),
            "cpu_of_plain": round(statistics.median(cpu[name][1:]) / statistics.median(cpu["plain"][1:]), 4),
            "rounds_s": [round(s, 4) for s in seconds[name][1:]],
            **(_floor(model, sets[name], sum(lengths)) if name in sets else {}),
        }
        print(f"{sum(lengths):6} tokens  {name:12} {figures[name]}", flush=True)
    return figures


def _floor(model: LanguageModel, adapters: list[Adapter], tokens: int) -> dict[str, float]:
    """Of low-rank matrices: a row meets each once, the first of a pair reads it, the second changes it."""
    matrices = {n: p for n, p in adapters[0].parameters.items() if p.dim() == 3}
    touched = sum(
        p[0].numel() // min(p.shape[1:]) * (1 if n.endswith(("down", "lora_A")) else 2)
        for n, p in matrices.items()
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


def _adapters(model: LanguageModel, method: str, r: int, count: int) -> list[Adapter]:
    """Random parameters: their work is that of trained ones."""
    found = find_method(method)
    config = found.configure({"r": r})
    made = []
    for seed in range(count):
        fresh = new_adapter(found, config, model, seed)
        generator = torch.Generator().manual_seed(seed)
        parameters = {
            name: (p + 0.01 * torch.randn(p.shape, generator=generator)).to(model.device, model.dtype)
            for name, p in fresh.parameters.items()
        }
        made.append(Adapter(found, config, parameters))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="per prompt of the uniform pass")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="torch's own choice if left out")
    parser.add_argument("--smoke", action="store_true", help="small, in seconds")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
