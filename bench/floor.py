"""The floor of a decode step on this machine, and what it is made of.

GEMMs: every weight matrix of the model once, with q/k/v and gate/up joined, packed beforehand: as oneDNN
likes them (torch's prepacked linear; plain linear where torch has none), and by our own kernels; the
faster of the two counts. KV: every byte in use read once. Raw memory bandwidth: one read of a buffer far
larger than the caches. Nothing else of a step is counted: norms, softmax, RoPE, sampling, Python and gRPC are
what a real step pays on top.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.model import add_model_arguments, load
from bench.rounds import interleaved, seconds
from prad.lm import LanguageModel
from prad.lm.kernels import Out, PackedLinear

SMOKE = {"batches": [1, 8], "rounds": 2, "bandwidth_mib": 64}
_JOINED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bandwidth-mib", type=int, default=1024, help="size of the buffer that is read")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return measure(load(arguments), arguments.batches, arguments.rounds, arguments.bandwidth_mib)


def measure(model: LanguageModel, batches: Sequence[int], rounds: int, bandwidth_mib: int) -> dict[str, Any]:
    """Everything in milliseconds, but bandwidth in GB/s; `gemms` by batch size as stored and packed."""
    reader = torch.ones(bandwidth_mib << 18, dtype=torch.float32, device=model.device)
    weights = weight_matrices(model)
    kinds: dict[tuple[str, int], Callable[[], float]] = {("read", 0): seconds(reader.sum)}
    for batch in batches:
        kinds["stored", batch] = seconds(_gemms(model, weights, batch, packed=False))
        kinds["packed", batch] = seconds(_gemms(model, weights, batch, packed=True))
        kinds["own", batch] = seconds(_own_gemms(model, weights, batch))
    with torch.inference_mode():
        measured = interleaved(kinds, rounds, "floor")
    bandwidth = reader.nbytes / measured["read", 0]
    weight_bytes = sum(w.nbytes for w in weights)
    return {
        "bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "weight_bytes": weight_bytes,
        "weights_read_ms": round(1e3 * weight_bytes / bandwidth, 3),
        "kv_bytes_per_token": model.layout.bytes_per_token,
        "kv_read_ms_per_token": 1e3 * model.layout.bytes_per_token / bandwidth,
        "gemms": [
            {
                "batch": batch,
                "stored_ms": round(1e3 * measured["stored", batch], 3),
                "packed_ms": round(1e3 * measured["packed", batch], 3),
                "own_ms": round(1e3 * measured["own", batch], 3),
            }
            for batch in batches
        ],
    }


def step_floor_ms(floor: dict[str, Any], batch: int, context: int) -> float:
    """The fastest GEMMs plus one read of the KV in use, for `batch` sequences of `context` tokens."""
    (gemms,) = (min(g["packed_ms"], g["own_ms"]) for g in floor["gemms"] if g["batch"] == batch)
    return float(gemms) + batch * context * float(floor["kv_read_ms_per_token"])


def contest_floor(model: LanguageModel, prompts: int, length: int, output: int) -> tuple[float, float]:
    """Seconds of a prompt pass of `prompts` prompts, and of one decode step half-way through the output.

    A prompt pass multiplies every row with every matrix but the vocabulary's, which takes last rows only.
    """
    ground = measure(model, [prompts], rounds=5, bandwidth_mib=256)
    weights = weight_matrices(model)
    body = [w for w in weights if w.shape[0] != model.vocab_size]
    head = [w for w in weights if w.shape[0] == model.vocab_size]
    parts = {
        "body": seconds(_gemms(model, body, prompts * length, packed=True)),
        "head": seconds(_gemms(model, head, prompts, packed=True)),
        "own body": seconds(_own_gemms(model, body, prompts * length)),
        "own head": seconds(_own_gemms(model, head, prompts)),
    }
    with torch.inference_mode():
        took = interleaved(parts, 5, "floor")
    step_ms = step_floor_ms(ground, prompts, length + output // 2)
    return sum(min(took[part], took[f"own {part}"]) for part in ("body", "head")), step_ms / 1e3


def weight_matrices(model: LanguageModel) -> list[Tensor]:
    """All [out, in] matrices that a decode step multiplies with; those that share an input joined."""
    groups: dict[str, list[Tensor]] = {}
    for path, module in model.module.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
        elif type(module).__name__ == "Conv1D":  # GPT-2's linear, stored [in, out]
            weight = module.weight.t().contiguous()
        else:
            continue
        parent, _, name = path.rpartition(".")
        groups.setdefault(f"{parent}.{_JOINED.get(name, name)}", []).append(weight)
    return [each[0] if len(each) == 1 else torch.cat(each) for each in groups.values()]


def _gemms(
    model: LanguageModel, weights: Sequence[Tensor], batch: int, *, packed: bool
) -> Callable[[], None]:
    inputs = {
        width: torch.randn(batch, width, device=model.device).to(model.dtype)
        for width in {w.shape[1] for w in weights}
    }
    if packed and model.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ready = [torch.ops.mkldnn._reorder_linear_weight(w, batch) for w in weights]

        def linear(x: Tensor, w: Tensor) -> Any:
            return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")

    else:
        ready = list(weights)

        def linear(x: Tensor, w: Tensor) -> Any:
            return torch.nn.functional.linear(x, w)

    pairs = [(inputs[w.shape[1]], p) for w, p in zip(weights, ready, strict=True)]

    def once() -> None:
        for x, w in pairs:
            linear(x, w)

    return once


def _own_gemms(model: LanguageModel, weights: Sequence[Tensor], batch: int) -> Callable[[], None]:
    """By the kernels; as packed for oneDNN where there are none."""
    kernels = model.kernels
    if kernels is None:
        return _gemms(model, weights, batch, packed=True)
    calls = [
        (
            PackedLinear.of(w),
            torch.randn(batch, w.shape[1]).to(w.dtype),
            torch.empty(batch, w.shape[0], dtype=w.dtype),
        )
        for w in weights
    ]

    def once() -> None:
        for packed, x, out in calls:
            kernels.linear(packed, x, out, Out.STORE)

    return once


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    batches = [g["batch"] for g in result["gemms"]]
    for kind, label in (("stored", "weights stored"), ("packed", "weights packed"), ("own", "own kernels")):
        axes.plot(batches, [g[f"{kind}_ms"] for g in result["gemms"]], marker="o", label=label)
    axes.axhline(result["weights_read_ms"], linestyle=":", color="gray", label="weights read once")
    axes.set(xscale="log", xlabel="sequences", ylabel="ms", title="GEMMs of a decode step", ylim=(0, None))
    axes.legend()
