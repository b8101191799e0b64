"""The floor and the limit of a decode step on this machine, and what they are made of.

GEMMs: every weight matrix of the model once, with q/k/v and gate/up joined, packed beforehand: as oneDNN
likes them (torch's prepacked linear, in float32 where it packs no bfloat16; plain linear where it packs
nothing), one call each, and by our own kernels, in one call, as a step runs them; the faster of the two
counts. KV: every byte in use read once. Nothing else
of a step is counted: norms, softmax, RoPE, sampling, Python and gRPC are what a real step pays on top.

The limit is the hardware's, and nobody's library: the GEMMs' operations at the peak of loops of nothing but
products, or their weights read once at the bandwidth of a buffer far larger than the caches, whichever takes
longer, and the KV read once. How near our GEMMs come to it: `own_of_peak`, `own_of_bandwidth`.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench.flags import Floor
from bench.limits import Hardware, products_of
from bench.model import load
from bench.rounds import Samples, interleaved, ratio, seconds
from prad.lm import LanguageModel
from prad.lm.kernels import HugePages, Out, PackedLinear, Recording

_FEW, _MANY = 8, 64
"""Rows for which reading the weights takes longer, and for which computing with them does."""

_JOINED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def run(arguments: Floor) -> dict[str, Any]:
    ground = Ground(load(arguments), arguments.batches, arguments.bandwidth_mib, stored=True)
    return ground.figures(interleaved(ground.kinds, arguments.rounds, "floor"))


Way = Literal["stored", "packed", "packed_float32"]
"""How torch is asked: the weights as they lie, or packed for oneDNN, in their dtype or in float32."""
WAYS: dict[Way, str] = {
    "stored": "weights stored",
    "packed": "weights packed",
    "packed_float32": "weights packed, float32",
}

Part = tuple[str, int]
"""What is measured, and for how many rows."""


class Ground:
    """What floors are made of: `kinds` are to be measured in the same rounds as what stands on them.

    batches: rows of a GEMM, all weights once. stored: also with the weights as they lie in the model.
    """

    def __init__(
        self, model: LanguageModel, batches: Sequence[int], bandwidth_mib: int, *, stored: bool = False
    ) -> None:
        self._model = model
        self.weights = weight_matrices(model)
        self._own = _packed_once(model, self.weights)
        self.others = others_way(model)
        self._batches = batches
        self._kv_bytes = model.layout.bytes_per_token
        self.hardware = Hardware(bandwidth_mib)
        self.kinds: dict[Part, Callable[[], float]] = dict(self.hardware.kinds)
        ways: tuple[Way, ...] = ("stored", self.others) if stored else (self.others,)
        for batch in batches:
            for way in ways:
                self.kinds[way, batch] = seconds(gemms(model, self.weights, batch, way))
            self.kinds["own", batch] = seconds(self.own_gemms(batch, self.weights))

    def own_gemms(self, batch: int, weights: Sequence[Tensor]) -> Callable[[], None]:
        """By the kernels, with some of the weights, recorded like a step and run by one call; as others do
        where there are no kernels."""
        kernels = self._model.kernels
        if kernels is None:
            return gemms(self._model, weights, batch, self.others)
        recording = Recording(kernels)
        for w in weights:
            x, out = torch.randn(batch, w.shape[1]).to(w.dtype), torch.empty(batch, w.shape[0], dtype=w.dtype)
            recording.linear(self._own[id(w)], x, out, Out.STORE)
        return partial(recording.run, batch, None)

    def floors_s(self, took: Samples[Any], batch: int, context: int) -> list[float]:
        """By round: the GEMMs (those of the two that are faster by their medians) and one read of the KV in
        use, for `batch` sequences of `context` tokens."""
        faster = min((self.others, "own"), key=lambda kind: took[kind, batch])
        rounds = zip(took.values[faster, batch], self._kv_s(took, batch, context), strict=True)
        return [gemms + kv for gemms, kv in rounds]

    def limits_s(self, took: Samples[Any], batch: int, context: int) -> list[float] | None:
        """The same of the hardware, in the model's dtype; None where its peak is not known."""
        limits = self.gemms_limits_s(took, batch)
        if limits is None:
            return None
        return [a + b for a, b in zip(limits, self._kv_s(took, batch, context), strict=True)]

    def gemms_limits_s(self, took: Samples[Any], batch: int) -> list[float] | None:
        computed = self.computed_s(took, batch)
        read = self.hardware.read_s(took, self._weight_bytes)
        return None if computed is None else [max(each) for each in zip(computed, read, strict=True)]

    def computed_s(self, took: Samples[Any], batch: int) -> list[float] | None:
        """The GEMMs' operations at the peak, by round."""
        operations = 2e-9 * batch * sum(w.numel() for w in self.weights)
        per_giga = self.hardware.giga_s(took, products_of(self._model.dtype))
        return None if per_giga is None else [operations * each for each in per_giga]

    def _kv_s(self, took: Samples[Any], batch: int, context: int) -> list[float]:
        return self.hardware.read_s(took, batch * context * self._kv_bytes)

    @property
    def _weight_bytes(self) -> int:
        return sum(w.nbytes for w in self.weights)

    def figures(self, took: Samples[Any]) -> dict[str, Any]:
        """In milliseconds, but bandwidth in GB/s and peaks in 10^9 operations/s."""
        names = [name for name in (*WAYS, "own") if (name, self._batches[0]) in self.kinds]
        return {
            **self.hardware.figures(took, products_of(self._model.dtype)),
            "weight_bytes": self._weight_bytes,
            "weights_read_ms": _ms(self.hardware.read_s(took, self._weight_bytes)),
            "kv_bytes_per_token": self._kv_bytes,
            "kv_read_ms_per_token": _ms(self.hardware.read_s(took, self._kv_bytes), digits=9),
            "gemms": [
                {"batch": batch}
                | {f"{name}_ms": round(1e3 * took[name, batch], 3) for name in names}
                | self._shares(took, batch)
                for batch in self._batches
            ],
        }

    def _shares(self, took: Samples[Any], batch: int) -> dict[str, Any]:
        """Of the peak where there are many rows, of the bandwidth where there are few, in percent."""
        own, limits = took.values["own", batch], self.gemms_limits_s(took, batch)
        row: dict[str, Any] = {} if limits is None else {"limit_ms": _ms(limits)}
        if batch <= _FEW:
            read = self.hardware.read_s(took, self._weight_bytes)
            row["own_of_bandwidth"] = round(100 * ratio(read, own), 1)
        if batch >= _MANY and (computed := self.computed_s(took, batch)) is not None:
            row["own_of_peak"] = round(100 * ratio(computed, own), 1)
        return row


class ContestGround:
    """The floor of a contest: a prompt pass of `prompts` prompts of `length` tokens, then decode steps.

    A prompt pass multiplies every row with every matrix but the vocabulary's, which takes last rows only.
    """

    def __init__(self, model: LanguageModel, prompts: int, length: int, output: int) -> None:
        self._prompts, self._middle = prompts, length + output // 2
        self._step = Ground(model, [prompts], bandwidth_mib=256)
        body = [w for w in self._step.weights if w.shape[0] != model.vocab_size]
        head = [w for w in self._step.weights if w.shape[0] == model.vocab_size]
        self.kinds: dict[Part, Callable[[], float]] = dict(self._step.kinds)
        for part, weights, rows in (("body", body, prompts * length), ("head", head, prompts)):
            self.kinds[f"others {part}", 0] = seconds(gemms(model, weights, rows, self._step.others))
            self.kinds[f"own {part}", 0] = seconds(self._step.own_gemms(rows, weights))

    def floor_s(self, took: Samples[Any]) -> tuple[float, float]:
        """Of the prompt pass, and of one decode step half-way through the output."""
        prefill = sum(
            min(took[f"{name} {part}", 0] for name in ("others", "own")) for part in ("body", "head")
        )
        return prefill, statistics.median(self._step.floors_s(took, self._prompts, self._middle))


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


def others_way(model: LanguageModel) -> Way:
    """How torch multiplies these weights the fastest. It packs no bfloat16 without AVX-512 (or
    AVX-NE-CONVERT): float32 is what somebody with such a CPU would choose."""
    operations = torch.ops.mkldnn
    if model.device.type != "cpu" or not hasattr(operations, "_linear_pointwise"):
        return "stored"
    if model.dtype is not torch.bfloat16 or operations._is_mkldnn_bf16_supported():
        return "packed"
    return "packed_float32"


def gemms(model: LanguageModel, weights: Sequence[Tensor], batch: int, way: Way) -> Callable[[], None]:
    """By torch."""
    dtype = torch.float32 if way == "packed_float32" else model.dtype
    inputs = {
        width: torch.randn(batch, width, device=model.device).to(dtype)
        for width in {w.shape[1] for w in weights}
    }
    if way == "stored":
        ready = list(weights)

        def linear(x: Tensor, w: Tensor) -> Any:
            return torch.nn.functional.linear(x, w)

    else:
        ready = [torch.ops.mkldnn._reorder_linear_weight(w.to(dtype), batch) for w in weights]

        def linear(x: Tensor, w: Tensor) -> Any:
            return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")

    pairs = [(inputs[w.shape[1]], p) for w, p in zip(weights, ready, strict=True)]

    @torch.inference_mode()
    def once() -> None:
        for x, w in pairs:
            linear(x, w)

    return once


def _packed_once(model: LanguageModel, weights: Sequence[Tensor]) -> dict[int, PackedLinear]:
    """By the matrices' ids; their order is the same for every number of rows."""
    memory = HugePages()  # as those that are served lie, where the system can
    return {} if model.kernels is None else {id(w): PackedLinear.of(w, memory=memory) for w in weights}


def _ms(seconds_: Sequence[float], digits: int = 3) -> float:
    return round(1e3 * statistics.median(seconds_), digits)


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    batches = [g["batch"] for g in result["gemms"]]
    for kind, label in (WAYS | {"own": "own kernels"}).items():
        if f"{kind}_ms" in result["gemms"][0]:
            axes.plot(batches, [g[f"{kind}_ms"] for g in result["gemms"]], marker="o", label=label)
    axes.axhline(result["weights_read_ms"], linestyle=":", color="gray", label="weights read once")
    if "limit_ms" in result["gemms"][0]:
        limits = [g["limit_ms"] for g in result["gemms"]]
        axes.plot(batches, limits, linestyle="--", color="black", label="limit of the hardware")
    axes.set(xscale="log", yscale="log", xlabel="sequences", ylabel="ms", title="GEMMs of a decode step")
    axes.legend()
