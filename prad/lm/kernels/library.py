"""The built library, and the threads that it computes with."""

import ctypes
from collections import Counter
from ctypes import POINTER, c_double, c_int32, c_int64, c_void_p
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prad.lm.kernels.build import BuildError
from prad.lm.kernels.calls import ARGUMENTS, Call, Calls, Kind, LowRankSpan, PagedView, PromptSpan
from prad.lm.kernels.packed import LinearStruct

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "prad_pool": (c_void_p, [c_int32]),
    "prad_pool_free": (None, [c_void_p]),
    "prad_multiplies_bf16": (c_int32, []),
    "prad_sizes": (None, [POINTER(c_int64)]),
    "prad_run": (
        None,
        [c_void_p, POINTER(Call), c_int64, c_int64, POINTER(PagedView), POINTER(c_double)],
    ),
}

_STRUCTS = (Call, PagedView, LowRankSpan, PromptSpan, LinearStruct, *ARGUMENTS.values())


class Kernels(Calls):
    """The built kernels; every call runs at once and releases the GIL."""

    def __init__(self, library: Path, threads: int) -> None:
        try:
            self._c = ctypes.CDLL(str(library))
        except OSError as error:
            library.unlink(missing_ok=True)
            raise BuildError(
                f"the kernels cannot be loaded, the next start builds them anew: {error}"
            ) from error
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = result, arguments
        self.threads = threads
        self.spent: Counter[Kind] | None = None  # where to add the seconds that calls take, if anywhere
        self.multiplies_bf16 = bool(self._c.prad_multiplies_bf16())
        sizes = (c_int64 * len(_STRUCTS))()
        self._c.prad_sizes(sizes)
        for struct, size in zip(_STRUCTS, sizes, strict=True):
            assert ctypes.sizeof(struct) == size, f"{struct.__name__} is declared otherwise in C"

    def suits(self, dtype: torch.dtype) -> bool:
        """Whether they are the faster way for more rows than a decode step's, which in bfloat16 want a CPU
        that multiplies it: AMX, AVX-512 BF16."""
        return self.multiplies_bf16 or dtype is torch.float32

    @cached_property
    def _pool(self) -> int:
        """Threads take their priority from whoever starts them: the first that computes."""
        return int(self._c.prad_pool(self.threads))

    def __del__(self) -> None:
        if "_pool" in self.__dict__:
            self._c.prad_pool_free(self._pool)

    def empty(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, width, dtype=dtype)

    def _take(self, call: Call, rows: int, used: tuple[Any, ...], view: PagedView | None) -> None:
        self.run((Call * 1)(call), rows, view)

    def run(self, calls: Any, rows: int, view: PagedView | None = None) -> None:
        """An array of calls in order; `view` is for the attention among them."""
        if self.spent is None:
            self._c.prad_run(self._pool, calls, len(calls), rows, view, None)
            return
        seconds = (c_double * len(calls))()
        self._c.prad_run(self._pool, calls, len(calls), rows, view, seconds)
        for call, took in zip(calls, seconds, strict=True):
            self.spent[Kind(call.kind)] += took

    def argmax(self, logits: Tensor) -> list[int]:
        """The lowest id of each row's largest logit."""
        out = torch.empty(len(logits), dtype=torch.long)
        self._do(
            Kind.ARGMAX,
            logits.dtype is torch.bfloat16,
            len(logits),
            (logits.data_ptr(), out.data_ptr(), logits.shape[1]),
            (logits, out),
        )
        return out.tolist()
