"""Several servers at the same work in turn: N prompts at once, prefill alone and all of it."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from rich.console import Console
from rich.progress import track

from bench import floor
from bench.flags import ShapeFlags
from bench.prompts import random_prompts
from bench.rounds import interleaved, ratio
from prad.lm import LanguageModel

_PATIENCE_S = 30.0  # what takes longer is asked once: `rounds_s` shows it
_WARM_UP_TOKENS = 3  # a prompt pass and decode steps: the slow ones take minutes for all of theirs

Generate = Callable[[Sequence[Sequence[int]], int, Sequence[str | None]], float]
"""Prompts, how many tokens each gets, the adapter of each; returns seconds until all have them."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """`adapters`: the name of each prompt's adapter, None for the plain model. `major_faults`: so far, of the
    process that decodes, where that is told."""

    generate: Generate
    adapters: Sequence[str | None]
    major_faults: Callable[[], int | None] = lambda: None


def contest(
    contestants: Mapping[str, Contestant], arguments: ShapeFlags, model: LanguageModel, what: str
) -> list[dict[str, Any]]:
    """One row per contestant, and the floor's: prefill is the time to one token each, decode the rest.

    Everybody gets the same prompts in a round; the two measurements get different ones, for the sake of
    prefix caches. All contestants have equally many prompts.
    """
    (number,) = {len(contestant.adapters) for contestant in contestants.values()}
    faults: dict[str, dict[str, list[int]]] = {name: {"prefill": [], "total": []} for name in contestants}

    def variant(name: str, kind: str, output: int, parity: int) -> Callable[[], float]:
        seeds = count(number * 1000 + parity, 2)  # contests of other sizes share no prompt either
        contestant = contestants[name]

        def measure() -> float:
            prompts = random_prompts(number, arguments.prompt, model.vocab_size, next(seeds))
            before = contestant.major_faults()
            took = contestant.generate(prompts, output, contestant.adapters)
            after = contestant.major_faults()
            if before is not None and after is not None:
                faults[name][kind].append(after - before)
            return took

        return measure

    variants: dict[tuple[str, Any], Callable[[], float]] = {}
    for name in contestants:
        variants[name, "prefill"] = variant(name, "prefill", 1, 0)
        variants[name, "total"] = variant(name, "total", arguments.output, 1)
    for contestant in track(contestants.values(), "warm-up", console=Console(stderr=True), transient=True):
        prompts = random_prompts(number, arguments.prompt, model.vocab_size, seed=1 << 20)
        contestant.generate(prompts, _WARM_UP_TOKENS, contestant.adapters)
    ground = floor.ContestGround(model, number, arguments.prompt, arguments.output)
    for measure in ground.kinds.values():
        measure()
    took = interleaved(variants | ground.kinds, arguments.rounds, what, warm_up=0, patience_s=_PATIENCE_S)
    prefill, step = ground.floor_s(took)
    decode = step * (arguments.output - 1)
    rows = []
    for name in contestants:
        row = _row(name, took[name, "prefill"], took[name, "total"], arguments.output)
        row["rounds_s"] = {
            kind: [round(s, 3) for s in took.values[name, kind]] for kind in ("prefill", "total")
        }
        row["times_asked"] = len(took.values[name, "total"])
        if each := faults[name]["total"]:
            row["major_faults"] = statistics.median(each)
            row["rounds_major_faults"] = faults[name]
        rows.append(row)
    return [*rows, _row("floor", prefill, prefill + decode, arguments.output)]


def times(row: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times the other's total; of the rounds that both were asked in, if neither is the floor."""
    if "rounds_s" not in row or "rounds_s" not in other:
        return float(row["total_s"] / other["total_s"])
    return ratio(row["rounds_s"]["total"], other["rounds_s"]["total"])


def _row(name: str, prefill: float, total: float, output: int) -> dict[str, Any]:
    return {
        "name": name,
        "prefill_s": round(prefill, 3),
        "decode_s": round(total - prefill, 3),
        "total_s": round(total, 3),
        "step_ms": round(1e3 * (total - prefill) / (output - 1), 1),
    }
