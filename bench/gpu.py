"""What a GPU makes of it, where torch computes: a prompt pass of 64 prompts of 64 tasks, and decode steps.

Random Llamas in bfloat16, made on the GPU. `limit_ms` is what the hardware
needs at least: the products at the rate of one large product of square matrices, or their weights read once
at the bandwidth of a buffer far larger than the caches, whichever takes longer, and for a step one read of
the KV; adapters' own products are not in it. What is timed begins and ends with an idle device. Nothing is
compiled or recorded as a graph.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.adapters import ready_adapters
from bench.engine import LoadedEngine
from bench.flags import Gpu
from bench.floor import weight_matrices
from bench.grown_models import random_llama
from bench.prefill import METHODS
from bench.rounds import Samples, interleaved, ratio, seconds
from prad.adapters import Adapter, PromptAdaptation
from prad.lm import LanguageModel, PackedBatch
from prad.lm.device import require_device

Part = tuple[str, str | int]


def run(arguments: Gpu) -> dict[str, Any]:
    """Raises DeviceError."""
    require_device(arguments.device)
    passes: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    hardware = _Hardware(arguments)
    for size in arguments.sizes:
        of_pass, of_steps = _measured(random_llama(size, device=arguments.device), hardware, arguments)
        passes += [{"size": size} | row for row in of_pass]
        steps += [{"size": size} | row for row in of_steps]
    return {"hardware": hardware.figures(), "passes": passes, "steps": steps}


class _Hardware:
    """What bounds both: `kinds` are measured in the same rounds."""

    def __init__(self, told: Gpu) -> None:
        self._memory = torch.ones(told.mib << 18, dtype=torch.float32, device=told.device)
        square = torch.randn(told.wide, told.wide, device=told.device).to(torch.bfloat16)
        self._giga = 2e-9 * told.wide**3
        self.kinds: dict[Part, Callable[[], float]] = {
            ("hardware", "read"): _timed(self._memory.sum, told.device),
            ("hardware", "product"): _timed(lambda: square @ square, told.device),
        }
        self._rates: list[tuple[float, float]] = []

    def note(self, took: Samples[Part]) -> None:
        """For `figures`."""
        reads, products = (took.values["hardware", kind] for kind in ("read", "product"))
        self._rates += [
            (self._memory.nbytes / r / 1e9, self._giga / p) for r, p in zip(reads, products, strict=True)
        ]

    def limits_s(self, took: Samples[Part], giga: float, nbytes: int, beside: int = 0) -> list[float]:
        """By round, of so many 10^9 operations on weights of so many bytes, and a read of others beside."""
        reads, products = (took.values["hardware", kind] for kind in ("read", "product"))
        each = [(r / self._memory.nbytes, p / self._giga) for r, p in zip(reads, products, strict=True)]
        return [max(giga * by_giga, nbytes * by_byte) + beside * by_byte for by_byte, by_giga in each]

    def figures(self) -> dict[str, float]:
        reads, products = zip(*self._rates, strict=True)
        return {
            "bandwidth_gb_s": round(statistics.median(reads), 1),
            "tflop_s": round(statistics.median(products) / 1e3, 1),
        }


def _measured(
    model: LanguageModel, hardware: _Hardware, told: Gpu
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of prompt passes, and of steps."""
    sets: dict[str, list[Adapter] | None] = {"plain": None}
    sets |= {name: ready_adapters(model, method, told.tasks, told.r) for name, method in METHODS.items()}
    passes: dict[Part, Callable[[], float]] = {
        ("pass", name): _timed(_a_pass(model, adapters, told), told.device) for name, adapters in sets.items()
    }
    engines = {
        batch: LoadedEngine(model, batch, told.context, told.rounds + _WARM_UP + 1) for batch in told.batches
    }
    steps: dict[Part, Callable[[], float]] = {
        ("step", batch): _timed(engine.step, told.device) for batch, engine in engines.items()
    }
    took = interleaved(hardware.kinds | passes | steps, told.rounds, "rounds", warm_up=_WARM_UP)
    hardware.note(took)
    matrices = weight_matrices(model)
    numbers, nbytes = sum(w.numel() for w in matrices), sum(w.nbytes for w in matrices)
    head = sum(w.numel() for w in matrices if w.shape[0] == model.vocab_size)
    rows = told.tasks * told.tokens
    giga = 2e-9 * (rows * (numbers - head) + told.tasks * head)
    limits = hardware.limits_s(took, giga, nbytes)
    of_pass = [
        _row(took.values["pass", name], limits)
        | {
            "adapters": name,
            "of_plain": round(ratio(took.values["pass", name], took.values["pass", "plain"]), 3),
        }
        for name in sets
    ]
    of_steps = []
    for batch in told.batches:
        kv = batch * told.context * model.layout.bytes_per_token
        limits = hardware.limits_s(took, 2e-9 * batch * numbers, nbytes, kv)
        of_steps.append({"sequences": batch} | _row(took.values["step", batch], limits))
    return of_pass, of_steps


_WARM_UP = 3


def _a_pass(model: LanguageModel, adapters: list[Adapter] | None, told: Gpu) -> Callable[[], object]:
    lengths = [told.tokens] * told.tasks
    prompts = [[(100 + i + j) % model.vocab_size for j in range(told.tokens)] for i in range(told.tasks)]

    @torch.inference_mode()
    def forward() -> object:
        adaptation = None
        if adapters is not None:
            adaptation = PromptAdaptation.of_prompts(adapters, lengths, lengths, model.device)
        return model.forward(PackedBatch.of_sequences(prompts, device=model.device), adaptation)

    return forward


def _timed(work: Callable[[], object], device: str) -> Callable[[], float]:
    """From an idle device to an idle device."""

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize(device)

    def all_of_it() -> None:
        work()
        wait()

    clock = seconds(all_of_it)

    def measure() -> float:
        wait()
        return clock()

    return measure


def _row(took_s: Sequence[float], limits_s: Sequence[float]) -> dict[str, Any]:
    return {
        "ms": round(1e3 * statistics.median(took_s), 3),
        "limit_ms": round(1e3 * statistics.median(limits_s), 3),
        "times_limit": round(ratio(took_s, limits_s), 2),
        "rounds_ms": [round(1e3 * s, 3) for s in took_s],
    }


def plot(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    rows = result["passes"][::-1]
    names = [f"{row['size']}, {row['adapters']}" for row in rows]
    left.barh(names, [row["ms"] for row in rows])
    left.plot([row["limit_ms"] for row in rows], names, "|", color="black", label="limit of the hardware")
    left.set(xlabel="ms", title="A prompt pass")
    left.legend()
    for size in dict.fromkeys(row["size"] for row in result["steps"]):
        steps = [row for row in result["steps"] if row["size"] == size]
        (line,) = right.plot(
            [r["sequences"] for r in steps], [r["ms"] for r in steps], marker="o", label=size
        )
        limits = [r["limit_ms"] for r in steps]
        right.plot([r["sequences"] for r in steps], limits, "--", color=line.get_color())
    right.set(xscale="log", yscale="log", xlabel="sequences", ylabel="ms", title="A step; dashed: its limit")
    right.legend(loc="center right")
