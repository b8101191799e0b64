"""Time of one decode step, by number of sequences, by context and by number of tasks; memory by sequences.

In this process, with the decode service's own engine: schedule, forward, sampling and booking, without HTTP
and gRPC. The floor (packed GEMMs plus one read of the KV in use) and the limit (the hardware's: see `floor`)
are measured in the same rounds. Tasks: the
sequences' KV comes from adapted prompts of so many tasks, all adapters in memory, no prompt pass running.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from bench import floor
from bench.adapters import ready_adapters
from bench.engine import LoadedEngine
from bench.flags import Decode
from bench.model import load
from bench.own_engine import prompt_kv
from bench.rounds import interleaved, ratio, seconds
from prad.adapters import PromptAdaptation
from prad.lm import LanguageModel


def run(arguments: Decode) -> dict[str, Any]:
    model = load(arguments)
    return {
        "model": arguments.model,
        "by_batch": by_batch(model, arguments),
        "by_context": by_context(model, arguments),
        "by_tasks": _by_tasks(model, arguments),
    }


def by_batch(model: LanguageModel, arguments: Decode) -> list[dict[str, Any]]:
    context = arguments.batch_context
    engines = {
        batch: LoadedEngine(model, batch, context, arguments.rounds + 2) for batch in arguments.batches
    }
    ground = floor.Ground(model, arguments.batches, arguments.bandwidth_mib)
    steps = {("step", batch): seconds(engine.step) for batch, engine in engines.items()}
    took = interleaved(steps | ground.kinds, arguments.rounds, "batches")
    return [
        {"sequences": batch, "context": context, "kv_mib": round(engines[batch].kv_bytes / 2**20, 2)}
        | _step(
            took.values["step", batch],
            ground.floors_s(took, batch, context),
            ground.limits_s(took, batch, context),
        )
        for batch in arguments.batches
    ]


def by_context(model: LanguageModel, arguments: Decode) -> list[dict[str, Any]]:
    batch = arguments.context_batch
    longest = model.max_context - arguments.rounds - 2
    contexts = [min(context, longest) for context in arguments.contexts]
    engines = {c: LoadedEngine(model, batch, c, arguments.rounds + 2) for c in contexts}
    ground = floor.Ground(model, [batch], arguments.bandwidth_mib)
    steps = {("step", c): seconds(engine.step) for c, engine in engines.items()}
    took = interleaved(ground.kinds | steps, arguments.rounds, "contexts")
    return [
        {"context": c, "sequences": batch}
        | _step(took.values["step", c], ground.floors_s(took, batch, c), ground.limits_s(took, batch, c))
        for c in contexts
    ]


def _by_tasks(model: LanguageModel, arguments: Decode) -> list[dict[str, Any]]:
    """The same prompts under adapters of ever more tasks, all in memory; a step applies none of them."""
    length = 64
    prompts = [[100 + i] * length for i in range(arguments.sequences)]
    most = max(arguments.tasks)
    adapters = ready_adapters(model, "prad-pa", most, arguments.r)
    engines = {}
    for tasks in arguments.tasks:
        chosen = [adapters[i % tasks] if tasks else None for i in range(len(prompts))]
        adaptation = PromptAdaptation.of_prompts(
            chosen, [length] * len(prompts), [length] * len(prompts), model.device, model.kernels
        )
        _, kv = prompt_kv(model, prompts, adaptation)
        engines[tasks] = LoadedEngine(model, len(prompts), length, arguments.rounds + 2, kv)
    steps = interleaved({t: seconds(e.step) for t, e in engines.items()}, arguments.rounds, "tasks")
    return [
        {"tasks": tasks, "sequences": len(prompts)} | _step(steps.values[tasks]) for tasks in arguments.tasks
    ]


def _step(
    took_s: Sequence[float],
    floors_s: Sequence[float] | None = None,
    limits_s: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Of each round's step, floor and limit: medians, and the medians of the rounds' ratios."""
    row: dict[str, Any] = {"step_ms": round(1e3 * statistics.median(took_s), 3)}
    for name, each in (("floor", floors_s), ("limit", limits_s)):
        if each is not None:
            row[f"{name}_ms"] = round(1e3 * statistics.median(each), 3)
            row[f"times_{name}"] = round(ratio(took_s, each), 2)
    return row | {"rounds_ms": [round(1e3 * s, 3) for s in took_s]}


def plot(result: dict[str, Any], figure: Any) -> None:
    from matplotlib.ticker import LogLocator, ScalarFormatter

    axes = figure.subplots(1, 4)
    for at, (name, x) in zip(axes, (("by_batch", "sequences"), ("by_context", "context")), strict=False):
        rows = result[name]
        at.plot([r[x] for r in rows], [r["step_ms"] for r in rows], marker="o", label="step")
        at.plot([r[x] for r in rows], [r["floor_ms"] for r in rows], linestyle="--", label="floor")
        if "limit_ms" in rows[0]:
            at.plot([r[x] for r in rows], [r["limit_ms"] for r in rows], linestyle=":", label="limit")
        at.set(xscale="log", yscale="log", xlabel=x, ylabel="ms")
        at.set_xticks([r[x] for r in rows], [str(r[x]) for r in rows], rotation=60)
        at.minorticks_off()
        at.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        at.yaxis.set_major_formatter(ScalarFormatter())
        at.legend()
    rows = result["by_tasks"]
    axes[2].bar([str(r["tasks"] or "plain") for r in rows], [r["step_ms"] for r in rows])
    axes[2].set(xlabel=f"tasks ({rows[0]['sequences']} sequences)", ylabel="ms")
    rows = result["by_batch"]
    axes[3].plot([r["sequences"] for r in rows], [r["kv_mib"] for r in rows], marker="o")
    axes[3].set(xlabel="sequences", ylabel="KV reserved, MiB")
    figure.suptitle("One decode step")
