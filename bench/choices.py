"""n choices of one prompt: the KV blocks they take, the time of their hand-off at decode, and of a step.

In this process, with the decode service's own engine. "shared": one hand-off of n choices, which share the
blocks that the prompt fills. "copies": n hand-offs of one choice each, so each has the prompt's KV to itself,
as all choices had before they shared it.
"""

import statistics
from functools import partial
from typing import Any

from bench.engine import LoadedEngine
from bench.flags import Choices
from bench.model import load
from bench.rounds import interleaved, seconds
from prad.lm import LanguageModel


def run(arguments: Choices) -> dict[str, Any]:
    model = load(arguments)
    rows = [row for choices in arguments.choices for row in _rows(model, choices, arguments)]
    return {"model": arguments.model, "rows": rows}


def _rows(model: LanguageModel, choices: int, arguments: Choices) -> list[dict[str, Any]]:
    def engine(together: int) -> LoadedEngine:
        return LoadedEngine(model, choices, arguments.context, arguments.rounds + 2, choices=together)

    def admitted_s(together: int) -> float:
        return engine(together).admitted_s

    kinds = {"copies": 1, "shared": choices}
    what = f"{choices} choices"
    admitted = interleaved(
        {kind: partial(admitted_s, n) for kind, n in kinds.items()}, arguments.rounds, what
    )
    engines = {kind: engine(n) for kind, n in kinds.items()}
    mib = {kind: each.used_bytes / 2**20 for kind, each in engines.items()}
    steps = interleaved({k: seconds(e.step) for k, e in engines.items()}, arguments.rounds, what)
    return [
        {
            "choices": choices,
            "blocks": kind,
            "context": arguments.context,
            "kv_mib": round(mib[kind], 2),
            "hand_off_ms": round(1e3 * statistics.median(admitted.values[kind]), 2),
            "step_ms": round(1e3 * statistics.median(steps.values[kind]), 2),
            "rounds_hand_off_ms": [round(1e3 * s, 2) for s in admitted.values[kind]],
            "rounds_step_ms": [round(1e3 * s, 2) for s in steps.values[kind]],
        }
        for kind in kinds
    ]


def plot(result: dict[str, Any], figure: Any) -> None:
    rows = result["rows"]
    names = [f"{r['choices']}, {r['blocks']}" for r in rows]
    panels = zip(figure.subplots(1, 3), ("kv_mib", "hand_off_ms", "step_ms"), strict=True)
    for axes, column in panels:
        axes.bar(names, [r[column] for r in rows])
        axes.set(title=column)
        axes.tick_params(axis="x", rotation=60)
    figure.suptitle(f"Choices of a prompt of {rows[0]['context']} tokens")
