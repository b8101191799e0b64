"""How times grow: a decode step with its sequences and with their context, prompt passes with their tokens
and with the number of tasks, all of it with the size of the model.

    sequences  a step of as many, each with a short context
    context    a step of 8 sequences
    prompts    a pass of as many tokens: in prompts of 64, and in a single one
    tasks      passes of 64 prompts of as many tasks in turn, and getting their adapters, of which 256 stay in
               memory
    weights    the default model and random Llamas: steps of 1 and of 64 in bf16 and in blocks of 4 bits
               (--weights int4), a pass of 1,024 tokens

In this process, without HTTP and gRPC. A curve's exponent is the slope of a straight line through the
logarithms of its points, by least squares: 1 is in proportion, 0 is for nothing. `upper` is that of the upper
half of the points, where what is fixed counts less.
"""

import asyncio
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.adapters import random_adapters
from bench.decode import by_batch, by_context
from bench.engine import LoadedEngine
from bench.flags import Decode, Growth, Prefill
from bench.grown_models import random_llama
from bench.limits import Hardware
from bench.model import load
from bench.prefill import grown
from bench.rounds import interleaved, seconds
from prad.adapters import Adapter, PromptAdaptation, load_adapter, save_parameters
from prad.artefact import AdapterRecord, Artefact, BaseModelRef, read_artefact, write_record
from prad.lm import LanguageModel, ModelError, PackedBatch
from prefill_service.engine import Residents

_TOGETHER = 64  # prompts of a pass by tasks
_CONTEXT = 100

Curve = dict[float, float]
"""Milliseconds by what grows."""


def run(arguments: Growth) -> dict[str, Any]:
    """Raises ModelError where the kernels are not in use."""
    model = load(arguments)
    told = arguments.model_dump(include={"model", "cache_dir", "contexts", "rounds", "bandwidth_mib"})
    steps = Decode.model_validate(told | {"batches": arguments.sequences, "context_batch": 8})
    passes = Prefill.model_validate({"rounds": arguments.passes})
    rows: list[dict[str, Any]] = []

    def tell(what: str, x: str, curve: Curve) -> None:
        rows.append(curve_row(what, x, curve))
        row = rows[-1]
        Console(stderr=True).print(f"{what}: exponent {row['exponent']}, upper half {row['upper']}")

    sequences = by_batch(model, steps)
    tell("a step", "sequences", {r["sequences"]: r["step_ms"] for r in sequences})
    context = by_context(model, steps)
    tell("a step of 8", "context", {r["context"]: r["step_ms"] for r in context})
    hardware = Hardware(arguments.bandwidth_mib)
    tokens = [grown(model, number, passes, hardware) for number in arguments.prompts]
    for kind, what in (("short", "a pass, prompts of 64"), ("one", "a pass, one prompt")):
        tell(what, "tokens", {r["tokens"]: r[f"{kind}_ms"] for r in tokens})
    what = f"a pass of {_TOGETHER} prompts, {arguments.resident} adapters in memory"
    tell(what, "tasks", _by_tasks(model, arguments))
    for what, curve in _by_size(model, arguments).items():
        tell(what, "weights", curve)
    return {
        "model": arguments.model,
        "rows": rows,
        "kv_mib": {r["sequences"]: r["kv_mib"] for r in sequences},
    }


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope through the logarithms."""
    xs, ys = ([math.log(point[axis]) for point in points] for axis in (0, 1))
    return statistics.linear_regression(xs, ys).slope


def curve_row(what: str, x: str, curve: Curve) -> dict[str, Any]:
    points = sorted(curve.items())
    (first, first_ms), (last, last_ms) = points[0], points[-1]
    upper = points[min(len(points) // 2, len(points) - 2) :]
    return {
        "what": what,
        "by": x,
        "first": first,
        "last": last,
        "first_ms": round(first_ms, 2),
        "last_ms": round(last_ms, 2),
        "exponent": round(exponent(points), 2),
        "upper": round(exponent(upper), 2),
        "points": [[number, round(ms, 3)] for number, ms in points],
    }


def _by_tasks(model: LanguageModel, arguments: Growth) -> Curve:
    """Each number of tasks in a turn of its own: the one before leaves nothing in memory."""
    lengths = [arguments.task_prompt] * _TOGETHER
    prompts = [[100 + i] * length for i, length in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as name:
        artefacts = _written(Path(name), model, max(arguments.tasks))

        def load_one(artefact: Artefact) -> Adapter:
            return load_adapter(artefact, model)

        async def one_pass(residents: Residents, chosen: Sequence[Artefact]) -> None:
            async with AsyncExitStack() as held:
                adapters = await asyncio.gather(
                    *(held.enter_async_context(residents.pinned(artefact)) for artefact in chosen)
                )
                adaptation = PromptAdaptation.of_prompts(
                    adapters, lengths, lengths, model.device, model.kernels
                )
                with torch.inference_mode():
                    model.forward(
                        PackedBatch.of_sequences(prompts, device=model.device, kernels=model.kernels),
                        adaptation,
                    )

        async def passes(tasks: int) -> list[float]:
            size = artefacts[0].nbytes(model.dtype.itemsize)
            residents = Residents(load_one, arguments.resident * size, model.dtype.itemsize)
            full = max(1, min(tasks, arguments.resident) // _TOGETHER)  # passes until memory is full
            took = []
            for number in range(full + arguments.rounds):
                chosen = [artefacts[(number * _TOGETHER + i) % tasks] for i in range(_TOGETHER)]
                started = asyncio.get_running_loop().time()
                await one_pass(residents, chosen)
                took.append(1e3 * (asyncio.get_running_loop().time() - started))
            return took[full:]

        return {tasks: statistics.median(asyncio.run(passes(tasks))) for tasks in arguments.tasks}


def _written(folder: Path, model: LanguageModel, count: int) -> list[Artefact]:
    """So many adapters that differ in one number."""
    (adapter,) = random_adapters(model, "prad-pa", 1, 8)
    base = BaseModelRef(
        name="bench", architecture=model.fingerprint.architecture, weights=model.fingerprint.weights
    )
    record = AdapterRecord(method="prad-pa", config=adapter.config.model_dump(), base=base)
    parameter = next(iter(adapter.parameters.values()))
    artefacts = []
    for number in range(count):
        path = folder / str(number)
        path.mkdir()
        parameter.view(-1)[:2] = torch.tensor([number % 128, number // 128])
        save_parameters(adapter.parameters, path, model.dtype)
        write_record(path, record)
        artefacts.append(read_artefact(path))
    return artefacts


def _by_size(model: LanguageModel, arguments: Growth) -> dict[str, Curve]:
    if model.kernels is None:
        raise ModelError("4 bits need the kernels; is there a C++ compiler?")
    curves: dict[str, Curve] = {}
    for size in ("", *arguments.sizes):
        one = random_llama(size, model.kernels) if size else model
        weights = sum(p.numel() for p in one.module.parameters())
        for precision in ("full", "int4"):
            one.accelerate(model.kernels, precision)
            took = interleaved(_works(one, precision, arguments), arguments.rounds, f"{weights:,} weights")
            for what in took.values:
                curves.setdefault(what, {})[weights] = 1e3 * took[what]
    return curves


def _works(model: LanguageModel, precision: str, arguments: Growth) -> dict[str, Callable[[], float]]:
    called = {"full": "bf16", "int4": "4 bits"}[precision]
    engines = {n: LoadedEngine(model, n, _CONTEXT, arguments.rounds + 2) for n in arguments.size_sequences}
    works = {f"a step of {n}, {called}": seconds(engine.step) for n, engine in engines.items()}
    if precision == "full":
        prompts = [[100 + i for i in range(64)]] * max(1, arguments.size_tokens // 64)

        @torch.inference_mode()
        def forward() -> object:
            return model.forward(
                PackedBatch.of_sequences(prompts, device=model.device, kernels=model.kernels)
            )

        works[f"a pass of {arguments.size_tokens} tokens, {called}"] = seconds(forward)
    return works


def plot(result: dict[str, Any], figure: Any) -> None:
    panels = {"sequences": "a step", "context": "a step", "tokens": "a prompt pass"}
    panels |= {"tasks": "a prompt pass", "weights": "by size of the model"}
    figure.set_size_inches(11, 7)
    grid = figure.subplots(2, 3).flatten()
    shown: list[str] = []  # one legend for all: no two lines of a colour
    for at, (by, title) in zip(grid, panels.items(), strict=False):
        for row in (row for row in result["rows"] if row["by"] == by):
            xs, ys = zip(*row["points"], strict=True)
            label = f"by {by}, {row['what']}: {row['exponent']:g}, {row['upper']:g}"
            at.plot(xs, ys, marker="o", markersize=4, label=label, color=f"C{len(shown)}")
            shown.append(label)
        at.set(xscale="log", yscale="log", xlabel=by, ylabel="ms", title=title)
        if by == "weights":
            at.set_xticks(xs, [f"{x / 1e6:,.0f} M" for x in xs])
            at.minorticks_off()
        at.margins(y=0.1)
        at.set_ylim(bottom=min(at.get_ylim()[0], at.get_ylim()[1] / 100))
    handles = [at.get_legend_handles_labels() for at in grid[:5]]
    grid[5].axis("off")
    grid[5].legend(
        [line for lines, _ in handles for line in lines],
        [label for _, labels in handles for label in labels],
        loc="center",
        fontsize=8,
        title="exponent of all points, and of the upper half",
    )
