"""What PARA's vectors add to a decode step, and to a prompt pass: beside PrAd-PARA and the plain model.

In this process, with the decode service's own engine and one adapter per sequence. PrAd-PARA acts on the
prompt only, so its step is the plain one; PARA brings a vector per layer and site, by which its rows are
multiplied. "half" is a batch in which every second sequence has such vectors. Variants take turns; a ratio is
the median of those within a round.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.adapters import ready_adapters
from bench.engine import LoadedEngine
from bench.flags import Para
from bench.model import load
from bench.own_engine import prompt_kv
from bench.prompts import random_prompts
from bench.rounds import Samples, interleaved, seconds
from prad.adapters import Adapter, PromptAdaptation
from prad.lm import LanguageModel, PackedBatch

PLAIN = "plain"


def run(arguments: Para) -> dict[str, Any]:
    model, count = load(arguments), arguments.sequences
    prompts = random_prompts(count, arguments.context, model.vocab_size, seed=0)
    none: list[Adapter | None] = [None] * count
    prompt_only, para = (
        ready_adapters(model, method, count, arguments.r) for method in ("prad-para", "para")
    )
    half = [adapter if i % 2 else None for i, adapter in enumerate(para)]
    variants: dict[str, Sequence[Adapter | None]] = {PLAIN: none, "prad-para": prompt_only, "para": para}
    with torch.inference_mode():
        passes = {name: seconds(_pass(model, prompts, adapters)) for name, adapters in variants.items()}
        prompt_passes = interleaved(passes, arguments.passes, "prompt passes")
        variants["para, half"] = half
        engines = {
            name: _engine(model, prompts, each, arguments.rounds + 2) for name, each in variants.items()
        }
    steps = interleaved({name: seconds(e.step) for name, e in engines.items()}, arguments.rounds, "steps")
    state_bytes = model.num_layers * sum(para[0].state_widths.values()) * model.dtype.itemsize
    return {
        "model": arguments.model,
        "state_bytes_per_request": state_bytes,
        "steps": _rows(steps),
        "passes": _rows(prompt_passes),
    }


def _adaptation(
    model: LanguageModel, prompts: Sequence[Sequence[int]], adapters: Sequence[Adapter | None]
) -> PromptAdaptation | None:
    lengths = [len(ids) for ids in prompts]
    return PromptAdaptation.of_prompts(adapters, lengths, lengths, model.device, model.kernels)


def _pass(
    model: LanguageModel, prompts: Sequence[Sequence[int]], adapters: Sequence[Adapter | None]
) -> Callable[[], object]:
    """The prompt pass, with the vectors that it leaves behind."""

    def forward() -> None:
        adaptation = _adaptation(model, prompts, adapters)
        model.forward(
            PackedBatch.of_sequences(prompts, device=model.device, kernels=model.kernels), adaptation
        )
        if adaptation is not None:
            adaptation.states()

    return forward


def _engine(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[Adapter | None],
    steps: int,
) -> LoadedEngine:
    adaptation = _adaptation(model, prompts, adapters)
    _, kv = prompt_kv(model, prompts, adaptation)
    states = {} if adaptation is None else adaptation.states()
    context = len(prompts[0])
    of_each = [states.get(i * context, {}) for i in range(len(prompts))]
    return LoadedEngine(model, len(prompts), context, steps, kv, of_each)


def _rows(samples: Samples[str]) -> list[dict[str, Any]]:
    plain = samples.values[PLAIN]
    return [
        {
            "variant": name,
            "ms": round(1e3 * samples[name], 2),
            "of_plain": round(statistics.median(a / b for a, b in zip(own, plain, strict=True)), 3),
            "rounds_ms": [round(1e3 * value, 2) for value in own],
        }
        for name, own in samples.values.items()
    ]


def plot(result: dict[str, Any], figure: Any) -> None:
    for axes, (what, title) in zip(
        figure.subplots(1, 2), (("steps", "A decode step"), ("passes", "A prompt pass")), strict=True
    ):
        axes.bar([row["variant"] for row in result[what]], [row["ms"] for row in result[what]])
        axes.set(ylabel="ms", title=title)
