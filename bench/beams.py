"""What a token of a beam search takes: one step of searches beside one of as many plain sequences.

In this process, with the decode service's own engine. "plain": the greedy choices of the same prompts, which
share their blocks, too. "beams": candidates of every row, ranking, and blocks copied where hypotheses part.
"ratio": of the two kinds of step, of the rounds' ratios the median.
"""

import statistics
from typing import Any

from bench.engine import LoadedEngine
from bench.flags import Beams
from bench.model import load
from bench.own_engine import prompt_kv
from bench.prompts import random_prompts
from bench.rounds import interleaved, ratio, seconds
from prad.core import search
from prad.core.sampling import Token
from prad.lm import LanguageModel, likeliest


def run(arguments: Beams) -> dict[str, Any]:
    model = load(arguments)
    rows = [row for searches in arguments.searches for row in _rows(model, searches, arguments)]
    return {"model": arguments.model, "rows": rows}


def _rows(model: LanguageModel, searches: int, arguments: Beams) -> list[dict[str, Any]]:
    beams, context, steps = arguments.beams, arguments.context, arguments.rounds + 2
    prompts = random_prompts(searches, context, model.vocab_size, 1)
    logits, kv = prompt_kv(model, prompts, None)
    count = search.Beams(beams).candidates(frozenset())
    first = [Token(top[0][0], None, tuple(top)) for top in likeliest(logits.log_softmax(-1), count)]
    engines = {
        kind: LoadedEngine(model, searches * beams, context, steps, kv, choices=beams, candidates=candidates)
        for kind, candidates in {"plain": None, "beams": first}.items()
    }
    what = f"{searches} searches"
    took = interleaved({k: seconds(e.step) for k, e in engines.items()}, arguments.rounds, what).values
    slower = {"plain": 1.0, "beams": ratio(took["beams"], took["plain"])}
    return [
        {
            "searches": searches,
            "beams": beams,
            "context": context,
            "kind": kind,
            "step_ms": round(1e3 * statistics.median(took[kind]), 2),
            "ratio": round(slower[kind], 3),
            "rounds_step_ms": [round(1e3 * s, 2) for s in took[kind]],
        }
        for kind in engines
    ]


def plot(result: dict[str, Any], figure: Any) -> None:
    rows, axes = result["rows"], figure.subplots()
    axes.bar([f"{r['searches']}, {r['kind']}" for r in rows], [r["step_ms"] for r in rows])
    axes.set(ylabel="ms", title=f"A step of searches with {rows[0]['beams']} beams, and without")
