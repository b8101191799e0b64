"""Where a decode step's time goes: every kernel call of a step timed, the rest is Python, sampling and torch.

For each number of sequences, with the model's own weights, rounded to 8 bits, and in blocks of 4. A row's
parts are those of the round whose total is the median one.
"""

import time
from collections import Counter
from typing import Any

from bench.engine import LoadedEngine
from bench.flags import Step
from bench.model import load
from prad.lm import LanguageModel, ModelError
from prad.lm.kernels import Kind, Precision

PARTS = {
    Kind.LINEAR: "gemms_ms",
    Kind.ATTENTION: "attention_ms",
    Kind.NORM: "norms_ms",
    Kind.ROTATE: "rope_ms",
    Kind.ARGMAX: "argmax_ms",
}


def run(arguments: Step) -> dict[str, Any]:
    """Raises ModelError where the kernels are not in use: torch's calls cannot be told apart here."""
    precisions: tuple[Precision, ...] = ("full", "int8", "int4")
    models = {}
    for precision in precisions:
        model = models[precision] = load(arguments)
        if model.kernels is None:
            raise ModelError("only the kernels tell the parts of a step apart; is there a C++ compiler?")
        model.accelerate(model.kernels, precision)
    return {
        "model": arguments.model,
        "rows": [
            {"sequences": batch, "weights": precision} | _parts(model, batch, arguments)
            for batch in arguments.batches
            for precision, model in models.items()
        ],
    }


def _parts(model: LanguageModel, batch: int, arguments: Step) -> dict[str, float]:
    engine = LoadedEngine(model, batch, arguments.context, arguments.rounds + 2)
    engine.step()
    rounds = []
    kernels = model.kernels
    assert kernels is not None
    for _ in range(arguments.rounds):
        kernels.spent = Counter()
        started = time.perf_counter()
        engine.step()
        rounds.append((time.perf_counter() - started, kernels.spent))
    kernels.spent = None
    total, parts = sorted(rounds, key=lambda each: each[0])[len(rounds) // 2]
    row = {column: round(1e3 * parts[kind], 2) for kind, column in PARTS.items()}
    return {"step_ms": round(1e3 * total, 2), **row, "rest_ms": round(1e3 * (total - parts.total()), 2)}


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    names = [f"{row['sequences']}, {row['weights']}" for row in result["rows"]]
    left = [0.0] * len(names)
    for column in (*PARTS.values(), "rest_ms"):
        widths = [row[column] for row in result["rows"]]
        axes.barh(names, widths, left=left, label=column.removesuffix("_ms"))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="ms", ylabel="sequences, weights", title="Where a decode step's time goes")
    axes.invert_yaxis()
    axes.legend()
