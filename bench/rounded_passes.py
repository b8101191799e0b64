"""What rounded weights take of a prompt pass: 64 tokens a prompt, no adapters, each of the models in turn."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.rounds import interleaved, ratio, seconds
from prad.lm import LanguageModel, PackedBatch

TOKENS = 64


def pass_rows(variants: Mapping[str, LanguageModel], prompts: list[int], rounds: int) -> list[dict[str, Any]]:
    """A row for so many prompts and each of `variants`; the first is what the others are compared with."""
    rows: list[dict[str, Any]] = []
    for count in prompts:
        passes = {name: seconds(_a_pass(model, count)) for name, model in variants.items()}
        with torch.inference_mode():
            took = interleaved(passes, rounds, f"passes of {count} prompts")
        exact = took.values[next(iter(variants))]
        rows += [
            {
                "prompts": count,
                "tokens": TOKENS * count,
                "weights": name,
                "pass_ms": round(1e3 * took[name], 1),
                "of_exact": round(ratio(took.values[name], exact), 3),
                "rounds_ms": [round(1e3 * each, 1) for each in took.values[name]],
            }
            for name in variants
        ]
    return rows


def _a_pass(model: LanguageModel, count: int) -> Callable[[], object]:
    prompts = [[(100 + i + j) % model.vocab_size for i in range(TOKENS)] for j in range(count)]
    return lambda: model.forward(
        PackedBatch.of_sequences(prompts, device=model.device, kernels=model.kernels)
    )
