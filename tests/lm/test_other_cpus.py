"""The kernels on a CPU of another type than this machine's, by an emulator: they say what ours say.

All that their calls point to lies in a file, which both processes map at the same address.
"""

import ctypes
import mmap
import platform
import shutil
import subprocess
from ctypes import Array, Structure
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from near import DTYPES, ROWS, assert_near, some
from torch import Tensor

from prad.lm.blocks import Blocks
from prad.lm.kernels import (
    Activation,
    Calls,
    Kernels,
    LowRankSpan,
    Out,
    PackedLinear,
    PagedView,
    PromptSpan,
    Weights,
    view_of,
)
from prad.lm.kernels.cpus import FLAGS, SOURCES
from prad.lm.kernels.operations import ArgmaxCall, Call, Operation

ADDRESS, SIZE, JOBS = 0x2000_0000_0000, 64 << 20, 1 << 16
"""Where the file is mapped, its bytes, and those at its beginning that are for jobs."""
NOT_OVER_OTHERS = 0x100000  # MAP_FIXED_NOREPLACE, which has no name in Python
LENGTHS = (1, 15, 16, 17, 33, 100)

pytestmark = pytest.mark.long
Laid = TypeVar("Laid", bound=Structure | Array[Any])


class Job(Structure):
    """As in emulated.cpp."""

    _fields_ = (("call", ctypes.c_void_p), ("rows", ctypes.c_int64), ("view", ctypes.c_void_p))


class Emulated(Calls):
    """Keeps calls, and lays out what they read and write where another process finds it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with file.open("wb+") as opened:
            opened.truncate(SIZE)
            place = ctypes.CDLL(None, use_errno=True).mmap
            place.restype = ctypes.c_void_p
            place.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
            flags = mmap.MAP_SHARED | NOT_OVER_OTHERS
            found = place(ADDRESS, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, opened.fileno(), 0)
        assert found == ADDRESS, f"mmap: {ctypes.get_errno()}"
        self.bytes = torch.frombuffer((ctypes.c_uint8 * SIZE).from_address(ADDRESS), dtype=torch.uint8)
        self._end = JOBS
        self._jobs: list[Job] = []
        self.results: list[tuple[str, Tensor, float]] = []

    def _room(self, size: int) -> int:
        """Where so many bytes begin, a line of memory."""
        at = self._end
        self._end += -(-size // 64) * 64
        assert self._end <= SIZE
        return at

    def tensor(self, given: Tensor) -> Tensor:
        at = self._room(given.nbytes)
        return self.bytes[at : at + given.nbytes].view(given.dtype).view(given.shape).copy_(given)

    def some(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        return self.tensor(some(*shape, dtype=dtype, seed=seed))

    def result(self, what: str, given: Tensor, tolerance: float) -> Tensor:
        """One to be compared; of the largest number, 0: the bits."""
        self.results.append((what, laid := self.tensor(given), tolerance))
        return laid

    def laid(self, given: Laid) -> Laid:
        copy = type(given).from_address(ADDRESS + self._room(ctypes.sizeof(given)))
        ctypes.memmove(ctypes.addressof(copy), ctypes.addressof(given), ctypes.sizeof(given))
        return copy

    def linear_of(self, packed: PackedLinear) -> PackedLinear:
        sizes = {n: getattr(packed.struct, n) for n in ("in_features", "out_features", "paired")}
        own = {name: None if x is None else self.tensor(x) for name, x in packed.tensors.items()}
        placed = PackedLinear.placed(**own, **sizes, kind=Weights(packed.struct.weights))  # type: ignore[arg-type]
        return replace(placed, struct=self.laid(placed.struct))

    def empty(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return self.result(name, torch.full((rows, width), 7.0, dtype=dtype), 2 * DTYPES[dtype])

    def _take(self, call: Call, arguments: Operation, rows: int, view: PagedView | None) -> None:
        kept = Call(kind=call.kind, half=call.half, arguments=self.laid(arguments))
        seen = None if view is None else ctypes.addressof(self.laid(view))
        self._jobs.append(Job(ctypes.addressof(self.laid(kept)), rows, seen))

    def run_by(self, kernels: Kernels) -> None:
        for job in self._jobs:
            view = None if job.view is None else PagedView.from_address(job.view)
            kernels.run((Call * 1).from_address(job.call), job.rows, view)

    def run_elsewhere(self, *program: str | Path) -> None:
        jobs = (Job * len(self._jobs))(*self._jobs)
        assert ctypes.sizeof(jobs) <= JOBS
        ctypes.memmove(ADDRESS, ctypes.addressof(jobs), ctypes.sizeof(jobs))
        subprocess.run([*program, self.file, *map(str, (ADDRESS, SIZE, len(jobs)))], check=True)


def test_arm(kernels: Kernels, tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if platform.machine() == "aarch64":
        pytest.skip("this is one: all other tests of kernels say more")
    if compiler is None or emulator is None:
        pytest.skip(
            "needs aarch64-linux-gnu-g++ and qemu-aarch64-static (g++-aarch64-linux-gnu, qemu-user-static)"
        )
    program = tmp_path / "emulated"
    flags = [flag for flag in FLAGS if flag not in ("-fPIC", "-shared")]
    source = Path(__file__).with_name("emulated.cpp")
    flags.append("-O2")  # as there
    subprocess.run([compiler, *flags, "-static", "-I", SOURCES, source, "-o", program], check=True)
    calls = Emulated(tmp_path / "calls")
    for put in (products, attention, prompts, rows_alone, adapters):
        for dtype in DTYPES:
            put(calls, dtype)
    given = calls.bytes.clone()
    calls.run_by(kernels)
    expected = [laid.clone() for _, laid, _ in calls.results]
    calls.bytes.copy_(given)
    calls.run_elsewhere(emulator, program)
    for (what, found, tolerance), ours in zip(calls.results, expected, strict=True):
        assert not ours.isnan().any(), what
        if tolerance:
            assert_near(found, ours, tolerance)
        else:
            assert torch.equal(found, ours), what


def products(calls: Emulated, dtype: torch.dtype) -> None:
    columns, depth = 50, 96
    weight, bias = some(columns, depth, dtype=dtype, seed=1), some(columns, seed=2)
    packed = {"full": PackedLinear.of(weight, bias)}
    paired = PackedLinear.of(weight, bias, paired=True)
    if dtype is torch.bfloat16:
        packed["int8"] = PackedLinear.of(weight, bias, precision="int8")
        packed |= {
            f"blocks of {n}": PackedLinear.of_blocks([Blocks.rounded(weight, n)], bias) for n in (4, 8)
        }  # type: ignore[arg-type]
    gate = calls.linear_of(paired)
    for name, own in packed.items():
        linear, tolerance = calls.linear_of(own), 1e-5
        for rows in ROWS[:-2]:
            what, x = f"{rows} rows, {name}, {dtype}", calls.some(rows, depth, dtype=dtype, seed=rows)
            out = calls.result(f"{what}, stored", torch.full((rows, columns), 7, dtype=dtype), DTYPES[dtype])
            calls.linear(linear, x, out, Out.STORE)
            calls.linear(linear, x, calls.result(f"{what}, added", some(rows, columns), tolerance), Out.ADD)
            inner = calls.result(
                f"{what}, gated", torch.zeros(rows, columns // 2, dtype=dtype), DTYPES[dtype]
            )
            calls.linear(gate, x, inner, Out.GATED, Activation.SILU)


def attention(calls: Emulated, dtype: torch.dtype) -> None:
    for heads, kv_heads, key_dim, value_dim in ((9, 3, 64, 64), (10, 2, 80, 80), (6, 2, 24, 12)):
        for block_size, window in ((16, None), (5, 40)):
            width = max(LENGTHS) // block_size + 1
            table = torch.randperm(width * len(LENGTHS)).view(len(LENGTHS), width)
            pools = (
                calls.some(table.numel(), block_size, kv_heads, key_dim, dtype=dtype, seed=3),
                calls.some(table.numel(), block_size, kv_heads, value_dim, dtype=dtype, seed=4),
            )
            query, key, value = (
                calls.some(len(LENGTHS), n, dim, dtype=dtype, seed=n)
                for n, dim in ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
            )
            view = view_of(calls.tensor(table), calls.tensor(torch.tensor(LENGTHS)))
            calls.paged_attention(query, key, value, pools, view, 0.3, window)


def prompts(calls: Emulated, dtype: torch.dtype) -> None:
    slots = calls.tensor(torch.randperm(300)[:70])
    for heads, kv_heads, key_dim, value_dim in ((9, 3, 64, 64), (6, 2, 24, 12), (2, 1, 5, 7)):
        shapes = ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
        rows = sum(LENGTHS)
        query, key, value = (calls.some(rows, *shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
        pools = calls.some(300, *shapes[1], dtype=dtype), calls.some(300, *shapes[2], dtype=dtype)
        starts = torch.tensor((0, *LENGTHS)).cumsum(0).tolist()
        spans = [
            PromptSpan(
                start=start,
                rows=n,
                slots=slots if n % 2 else None,
                stored=len(slots) if n % 2 else 0,
                answered=n // 3,
            )
            for start, n in zip(starts, LENGTHS, strict=False)
        ]
        for window in (None, 40):
            laid = calls.laid((PromptSpan * len(spans))(*spans))
            calls.prompt_attention(query, key, value, laid, pools, 0.3, window)


def rows_alone(calls: Emulated, dtype: torch.dtype) -> None:
    near, rows = DTYPES[dtype], 19
    for width in (48, 100):
        x, weight, bias = calls.some(rows, width), calls.some(width, seed=1), calls.some(width, seed=2)
        for own in (None, bias):
            out = calls.result("norm", torch.zeros(rows, width, dtype=dtype), near)
            calls.norm(x, weight, own, own is not None, 1e-5, out)
        for activation in Activation:
            out = calls.result("activation", torch.zeros(rows, width // 2, dtype=dtype), near)
            calls.activate(x, out, activation)
    heads, dim = 5, 8
    cosine, sine = calls.some(rows, dim, seed=3), calls.some(rows, dim, seed=4)
    norms = calls.some(dim, seed=5), calls.some(dim, seed=6)
    for own_norms in (None, norms):
        turned = calls.result("turned", some(rows, heads * dim, dtype=dtype), near)
        calls.rotate(turned, 4, 3, dim, cosine, sine, own_norms, 1e-6)
    logits = calls.some(rows, 500, dtype=dtype)
    places = calls.result("places", torch.zeros(rows, dtype=torch.long), 0)
    calls._do(ArgmaxCall(x=logits, out=places, width=500), logits)


def adapters(calls: Emulated, dtype: torch.dtype) -> None:
    near, rows, width = DTYPES[dtype], 40, 48
    bounds = calls.tensor(torch.tensor([[1, 2], [4, 20], [20, 33]]))
    vectors = [calls.some(3, width, seed=seed) for seed in range(3)]
    at = calls.tensor(torch.tensor([vector.data_ptr() for vector in vectors]))
    calls.affine(calls.result("affine", some(rows, width, dtype=dtype), near), bounds, at, at, 2)
    means = calls.result("mean", torch.zeros(3, width, dtype=dtype), near)
    calls.mean(calls.some(rows, width, dtype=dtype), bounds, means)
    own = calls.some(3, width, dtype=dtype)
    addresses = calls.tensor(torch.tensor([[own.data_ptr() if i % 3 else 0 for i in range(rows)]]))
    view = view_of(bounds, bounds, addresses)
    calls.scale(calls.result("scaled", some(rows, width, dtype=dtype), near), 0, 1, view, dtype)
    down, up = calls.some(3, width, 37, dtype=dtype), calls.some(3, 37, 21, dtype=dtype)
    bias = calls.some(3, 37)
    spans = [
        LowRankSpan(start=start, stop=stop, down=down, bias=own, up=up, r=37, factor=0.5)
        for start, stop, own in ((0, 1, None), (2, 40, bias))
    ]
    value = calls.result("low rank", some(rows, 21, dtype=dtype), near)
    laid = calls.laid((LowRankSpan * 2)(*spans))
    calls.low_rank(value, calls.some(rows, width, dtype=dtype), laid, 1, True, dtype)
