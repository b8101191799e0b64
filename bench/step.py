"""Where a decode step's time goes: every kernel call of a step timed, the rest is Python, sampling and torch.

For each number of sequences, with the model's own weights, rounded to 8 bits, and in blocks of 4. Steps whose
calls are timed take turns with steps that nobody looks into: `step_ms` and what is beside the kernels
(`beside_ms`) are of these. `limit_ms` is what the hardware needs at least (see `floor`): the products at its
peak, or their weights read once, and the KV. It multiplies rounded weights by 8 bits.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from bench.engine import LoadedEngine
from bench.flags import Step
from bench.limits import Hardware, products_of
from bench.model import load
from bench.rounds import Samples, interleaved, ratio, seconds
from prad.lm import LanguageModel, ModelError
from prad.lm.kernels import Kind, Precision

PARTS = {
    Kind.LINEAR: "gemms_ms",
    Kind.ATTENTION: "attention_ms",
    Kind.NORM: "norms_ms",
    Kind.ROTATE: "rope_ms",
    Kind.ARGMAX: "argmax_ms",
}

_BUFFER_MIB = 256  # of the bandwidth


def run(arguments: Step) -> dict[str, Any]:
    """Raises ModelError where the kernels are not in use: torch's calls cannot be told apart here."""
    precisions: tuple[Precision, ...] = ("full", "int8", "int4")
    models = {}
    for precision in precisions:
        model = models[precision] = load(arguments)
        if model.kernels is None:
            raise ModelError("only the kernels tell the parts of a step apart; is there a C++ compiler?")
        model.accelerate(model.kernels, precision)
    hardware = Hardware(_BUFFER_MIB)
    return {
        "model": arguments.model,
        "rows": [
            {"sequences": batch, "weights": precision} | _parts(model, batch, hardware, arguments)
            for batch in arguments.batches
            for precision, model in models.items()
        ],
    }


def _parts(model: LanguageModel, batch: int, hardware: Hardware, arguments: Step) -> dict[str, Any]:
    engine = LoadedEngine(model, batch, arguments.context, 2 * arguments.rounds + 4)
    engine.step()
    kernels = model.kernels
    assert kernels is not None
    watched: list[Counter[Kind]] = []
    a_step = seconds(engine.step)

    def timed_step() -> float:
        kernels.spent = Counter()
        took = a_step()
        watched.append(kernels.spent)
        kernels.spent = None
        return took

    steps = {("step", 0): a_step, ("watched", 0): timed_step}
    took = interleaved(steps | hardware.kinds, arguments.rounds, f"{batch} sequences")
    calls = watched[1:]  # the first one warms up
    row: dict[str, Any] = {"step_ms": round(1e3 * took["step", 0], 2)}
    row |= {column: _ms([parts[kind] for parts in calls]) for kind, column in PARTS.items()}
    for column, kind in (("rest_ms", "watched"), ("beside_ms", "step")):
        whole = took.values[kind, 0]
        row[column] = _ms([all_ - parts.total() for all_, parts in zip(whole, calls, strict=True)])
    return row | _limit(model, batch, hardware, took, arguments.context)


def _limit(
    model: LanguageModel, batch: int, hardware: Hardware, took: Samples[Any], context: int
) -> dict[str, float]:
    fused = model.fused
    assert fused is not None
    linears = [x for layer in fused.layers for x in (layer.qkv, layer.o, layer.up, layer.down)] + [fused.head]
    weights = sum(x.struct.in_features * x.struct.out_features for x in linears)
    per_giga = hardware.giga_s(took, products_of(model.dtype) if fused.precision == "full" else "int8")
    if per_giga is None:
        return {}
    read = hardware.read_s(took, sum(x.nbytes for x in linears))
    kv = hardware.read_s(took, batch * context * model.layout.bytes_per_token)
    limits = [
        max(2e-9 * batch * weights * giga, once) + keys
        for giga, once, keys in zip(per_giga, read, kv, strict=True)
    ]
    return {"limit_ms": _ms(limits), "times_limit": round(ratio(took.values["step", 0], limits), 2)}


def _ms(rounds_s: Sequence[float]) -> float:
    return round(1e3 * median(rounds_s), 2)


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
