"""A decode step's products by libraries that are made for such, beside ours: every weight matrix once.

Ours: by the kernels, recorded like a step and run by one call, in bfloat16, in float32, with 8 bits and in
blocks of 4 (ggml's Q4_1, the LM head in Q8_0). torch: packed for oneDNN, and its own dynamic 8 bits.
zentorch, which is for one release of torch each, in a process of its own where --zentorch-python names an
interpreter that has it: in bfloat16 with 8 bits, too, where the CPU has AVX-512 BF16, else in float32.
libxsmm, in float32, where --libxsmm names its libxsmm.a (a compiler finds the header): its kernels over
panels of 64 outputs, shared out by OpenMP. zentorch has random weights of the same shapes. What `peers` shows
of whole servers (OpenVINO, llama.cpp with ggml's products) is not repeated.
"""

import ctypes
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from ctypes import c_bool, c_char_p, c_int, c_void_p
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from bench.flags import Libraries
from bench.floor import Way, gemms, others_way, weight_matrices
from bench.model import load
from bench.peer import Peer
from bench.rounds import interleaved, ratio, seconds
from prad.core.errors import PradError
from prad.lm import LanguageModel
from prad.lm.blocks import Blocks
from prad.lm.kernels import HugePages, Kernels, Out, PackedLinear, Recording
from prad.lm.kernels.cpus import compiler

Measured = Callable[[int], Callable[[], float]]
"""What measures all products for so many rows once, in seconds."""

_OURS = "ours, bfloat16"
_SOURCE = Path(__file__).with_name("xsmm.cpp")


class LibraryError(PradError):
    """What was named is not what it should be, or does not compute here."""


def run(arguments: Libraries) -> dict[str, Any]:
    model = load(arguments)
    weights = weight_matrices(model)
    with _libraries(arguments, model, weights) as (libraries, versions):
        kinds = {(name, rows): of(rows) for name, of in libraries.items() for rows in arguments.batches}
        took = interleaved(kinds, arguments.rounds, "libraries")
    return {
        "versions": versions,
        "rows": [
            {"name": name}
            | {f"rows_{n}_ms": round(1e3 * took[name, n], 2) for n in arguments.batches}
            | {f"times_ours_{n}": _times(took.values, name, n) for n in arguments.batches}
            for name in libraries
        ],
    }


def _times(values: Mapping[Any, Sequence[float]], name: str, rows: int) -> float:
    return round(ratio(values[name, rows], values[_OURS, rows]), 2)


@contextmanager
def _libraries(
    arguments: Libraries, model: LanguageModel, weights: Sequence[Tensor]
) -> Iterator[tuple[dict[str, Measured], dict[str, Any]]]:
    """And the versions of those in other processes. Raises LibraryError."""
    if model.kernels is None or model.dtype is not torch.bfloat16:
        raise LibraryError("ours, which others are compared with, compute a model in bfloat16 by the kernels")
    with TemporaryDirectory() as name, ExitStack() as running:
        found = _ours(model.kernels, model, weights)
        if others_way(model) == "packed":
            found["torch, bfloat16"] = _torchs(model, weights, "packed")
        found["torch, float32"] = _torchs(model, weights, "packed_float32")
        if torch.backends.quantized.engine != "none":
            found["torch, int8"] = _torchs_int8(weights)
        versions = {}
        if arguments.zentorch_python is not None:
            for dtype in ("bfloat16", "int8") if torch.cpu._is_avx512_bf16_supported() else ("float32",):
                told = {"shapes": [list(w.shape) for w in weights], "rows": arguments.batches, "dtype": dtype}
                log = Path(name) / f"{dtype}.log"
                peer = running.enter_context(Peer("zentorch", arguments.zentorch_python, told, log))
                peer.wait_ready()
                called = f"zentorch, {dtype}"
                found[called], versions[called] = _asked(peer), peer.versions
        if arguments.libxsmm is not None:
            xsmm = Xsmm(arguments.libxsmm, Path(name), weights)
            found["libxsmm, float32"] = xsmm.measured
            versions["libxsmm, float32"] = {"libxsmm": xsmm.version}
        yield found, versions


def _ours(kernels: Kernels, model: LanguageModel, weights: Sequence[Tensor]) -> dict[str, Measured]:
    memory = HugePages()
    four = [Blocks.rounded(w, 8 if len(w) == model.vocab_size else 4) for w in weights]
    packed = {
        _OURS: [PackedLinear.of(w, memory=memory) for w in weights],
        "ours, int8": [PackedLinear.of(w, precision="int8", memory=memory) for w in weights],
        "ours, int4": [PackedLinear.of_blocks([blocks], memory=memory) for blocks in four],
        "ours, float32": [PackedLinear.of(w.float(), memory=memory) for w in weights],
    }

    def recorded(name: str, rows: int) -> Callable[[], float]:
        recording = Recording(kernels)
        dtype = torch.float32 if name == "ours, float32" else torch.bfloat16
        for each, w in zip(packed[name], weights, strict=True):
            x, out = torch.randn(rows, w.shape[1]).to(dtype), torch.empty(rows, len(w), dtype=dtype)
            recording.linear(each, x, out, Out.STORE)
        return seconds(partial(recording.run, rows, None))

    return {name: partial(recorded, name) for name in packed}


def _torchs(model: LanguageModel, weights: Sequence[Tensor], way: Way) -> Measured:
    return lambda rows: seconds(gemms(model, weights, rows, way))


def _torchs_int8(weights: Sequence[Tensor]) -> Measured:
    """In torch's own way: weights rounded by output, rows as they come."""
    packed = []
    for w in weights:
        scales = (w.float().abs().amax(dim=1) / 127).clamp_min(1e-12)
        zeros = torch.zeros(len(w), dtype=torch.int64)
        with warnings.catch_warnings(
            action="ignore"
        ):  # it will be gone from torch; nothing there replaces it
            rounded = torch.quantize_per_channel(w.float(), scales, zeros, 0, torch.qint8)
        packed.append((torch.ops.quantized.linear_prepack(rounded, None), w.shape[1]))

    def measured(rows: int) -> Callable[[], float]:
        inputs = {width: torch.randn(rows, width) for width in {width for _, width in packed}}

        @torch.inference_mode()
        def once() -> None:
            for each, width in packed:
                torch.ops.quantized.linear_dynamic(inputs[width], each)

        return seconds(once)

    return measured


def _asked(peer: Peer) -> Measured:
    """By its own clock."""
    return lambda rows: partial(peer.ask, {"rows": rows})


class Xsmm:
    """libxsmm's kernels over all of `weights`, in float32."""

    def __init__(self, archive: Path, folder: Path, weights: Sequence[Tensor]) -> None:
        """Raises LibraryError, CompileError."""
        if not archive.is_file():
            raise LibraryError(f"there is no {archive}; Debian's package libxsmm-dev has /usr/lib/libxsmm.a")
        library = folder / "xsmm.so"
        flags = ["-O2", "-std=c++17", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        archives = [
            str(archive),
            str(archive.with_name("libxsmmnoblas.a")),
        ]  # no BLAS for what it does not take
        command = [compiler(), *flags, str(_SOURCE), *archives, "-ldl", "-lpthread", "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            raise LibraryError(f"libxsmm's products were not built:\n{done.stderr[-2000:]}")
        self._c = ctypes.CDLL(str(library))
        self._c.xsmm_version.restype, self._c.xsmm_pack.restype = c_char_p, c_void_p
        self._c.xsmm_multiply.restype = c_bool
        self._c.xsmm_pack.argtypes = [c_void_p, c_int, c_int]
        self._c.xsmm_multiply.argtypes = [c_void_p, c_void_p, c_void_p, c_int, c_int]
        self.version: str = self._c.xsmm_version().decode()
        self._matrices = [
            (self._packed(w.float().contiguous()), *w.shape) for w in weights
        ]  # stay to the end

    def measured(self, rows: int) -> Callable[[], float]:
        inputs = {width: torch.randn(rows, width) for _, _, width in self._matrices}
        return seconds(partial(self.multiply, inputs, self.room(rows)))

    def room(self, rows: int) -> list[Tensor]:
        """For what `multiply` makes of each matrix."""
        return [torch.empty(rows, out) for _, out, _ in self._matrices]

    def multiply(self, inputs: Mapping[int, Tensor], to: Sequence[Tensor]) -> None:
        """Each matrix [out, in] with the rows [n, in] of its width, to its [n, out]. Raises LibraryError."""
        for (matrix, out, width), y in zip(self._matrices, to, strict=True):
            x = inputs[width].data_ptr()
            if not self._c.xsmm_multiply(matrix, x, y.data_ptr(), len(y), torch.get_num_threads()):
                raise LibraryError(f"libxsmm has no kernel for {out} outputs of {width} inputs")

    def _packed(self, weight: Tensor) -> int:
        return int(self._c.xsmm_pack(weight.data_ptr(), *weight.shape))


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    for row in result["rows"]:
        rows = [int(key.split("_")[1]) for key in row if key.startswith("rows_")]
        axes.plot(rows, [row[f"rows_{n}_ms"] for n in rows], marker="o", label=row["name"])
    axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="ms", title="Products of a decode step")
    axes.legend()
