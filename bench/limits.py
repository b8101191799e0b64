"""The limits of a machine, measured on it: products a second, and bytes read a second, by all of its cores.

limits.cpp has loops of nothing but products of what is in registers, and a read of memory by as many threads.
torch's sum of the same memory is measured beside that read; the faster is the bandwidth.
"""

import ctypes
import subprocess
from collections.abc import Callable
from ctypes import c_char_p, c_double, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from bench.rounds import Samples, seconds
from prad.lm.kernels import HugePages
from prad.lm.kernels.cpus import FLAGS, SOURCES, CompileError, compiler

Products = Literal["float32", "bf16", "int8"]
PRODUCTS: tuple[Products, ...] = ("float32", "bf16", "int8")
"""In limits.cpp's order."""

_OF_DTYPE: dict[torch.dtype, Products] = {torch.float32: "float32", torch.bfloat16: "bf16"}

_SOURCE = Path(__file__).with_name("limits.cpp")
_LOOP_S = 0.03
_BUILD_S = 120.0


def products_of(dtype: torch.dtype) -> Products:
    return _OF_DTYPE[dtype]


class Limits:
    """Those of this machine, with as many threads as torch has."""

    def __init__(self, library: Path) -> None:
        self._c = ctypes.CDLL(str(library))
        self._c.limits_by.restype, self._c.limits_by.argtypes = c_char_p, [c_int32]
        self._c.limits_rate.restype = self._c.limits_read.restype = c_double
        self._c.limits_rate.argtypes = [c_int32, c_int32, c_double]
        self._c.limits_read.argtypes = [c_void_p, c_int64, c_int32]
        found = {name: self._c.limits_by(number).decode() for number, name in enumerate(PRODUCTS)}
        self.by: dict[Products, str] = {name: by for name, by in found.items() if by}

    def giga(self, products: Products) -> Callable[[], float]:
        """Seconds of 10^9 operations at this moment, a product that is added being two; of what `by` has."""
        number = PRODUCTS.index(products)

        def measure() -> float:
            return 1e9 / float(self._c.limits_rate(number, torch.get_num_threads(), _LOOP_S))

        return measure

    def read(self, memory: Tensor) -> Callable[[], float]:
        """Seconds of one read from end to end."""
        assert memory.is_contiguous()

        def measure() -> float:
            return float(self._c.limits_read(memory.data_ptr(), memory.nbytes, torch.get_num_threads()))

        return measure


class Hardware:
    """What is to be measured in the same rounds as what it bounds: `kinds`. Without a compiler the bandwidth
    alone is known."""

    def __init__(self, bandwidth_mib: int) -> None:
        memory = HugePages().zeros(bandwidth_mib << 18, dtype=torch.float32).fill_(1)
        self._nbytes = memory.nbytes
        self._limits = limits()
        self.kinds: dict[tuple[str, int], Callable[[], float]] = {("sum", 0): seconds(memory.sum)}
        if self._limits is not None:
            self.kinds["read", 0] = self._limits.read(memory)
            self.kinds |= {(name, 0): self._limits.giga(name) for name in self._limits.by}

    def read_s(self, took: Samples[Any], nbytes: int) -> list[float]:
        """Of so many bytes, by round."""
        kind = min((k for k in ("read", "sum") if (k, 0) in self.kinds), key=lambda k: took[k, 0])
        return [nbytes / self._nbytes * each for each in took.values[kind, 0]]

    def giga_s(self, took: Samples[Any], products: Products) -> list[float] | None:
        """Of 10^9 operations on such numbers, by round; None where that is not known."""
        name = self._best(took, products)
        return None if name is None else took.values[name, 0]

    def figures(self, took: Samples[Any], products: Products) -> dict[str, Any]:
        """What can be had of the machine; which of it is the peak for `products`."""
        rows: list[dict[str, Any]] = []
        if self._limits is not None:
            rows = [
                {"what": f"{name} operations", "giga_per_s": round(1 / took[name, 0], 1), "by": by}
                for name, by in self._limits.by.items()
            ]
            rows.append({"what": "bytes read", "giga_per_s": self._gb_s("read", took), "by": "a loop"})
        rows.append({"what": "bytes read", "giga_per_s": self._gb_s("sum", took), "by": "torch's sum"})
        best = self._best(took, products)
        return {
            "machine": rows,
            "bandwidth_gb_s": max(row["giga_per_s"] for row in rows if row["what"] == "bytes read"),
            "peak_of": None if best is None or self._limits is None else self._limits.by[best],
        }

    def _gb_s(self, kind: str, took: Samples[Any]) -> float:
        return round(self._nbytes / took[kind, 0] / 1e9, 2)

    def _best(self, took: Samples[Any], products: Products) -> Products | None:
        """What the CPU does not multiply is float32's, once it is widened."""
        able = [] if self._limits is None else [n for n in self._limits.by if n in ("float32", products)]
        return min(able, key=lambda name: took[name, 0], default=None)


@cache
def limits() -> Limits | None:
    """None where no compiler is at hand."""
    with TemporaryDirectory() as folder:
        library = Path(folder) / "limits.so"
        try:
            build(library, "-march=native")
        except CompileError:
            return None
        return Limits(library)  # stays mapped


def build(library: Path, *flags: str) -> None:
    """Raises CompileError."""
    fused = "-ffp-contract=fast"  # here the rate counts, and no bits
    command = [compiler(), *FLAGS, fused, *flags, f"-I{SOURCES}", str(_SOURCE), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=_BUILD_S)
    if done.returncode:
        raise CompileError(f"the loops of the limits were not built:\n{done.stderr[-2000:]}")
