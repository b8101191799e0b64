"""The kernels' operations on tensors: run at once by `Kernels`, or kept by a `Recording` to be run again.

Each is a call of the built library: a kind, a struct of arguments (structs.py), a number of rows.
"""

import ctypes
from abc import ABC, abstractmethod
from collections import Counter
from ctypes import POINTER, c_double, c_int32, c_int64, c_void_p
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prad.lm.kernels.build import BuildError
from prad.lm.kernels.structs import (
    ARGUMENTS,
    Activation,
    Call,
    Kind,
    LinearStruct,
    LowRankSpan,
    Out,
    PackedLinear,
    PagedView,
    PromptSpan,
)


class Calls(ABC):
    """What the kernels can do.

    Tensors are contiguous in their last dimension, on the CPU, bfloat16 or float32; nothing here checks that.
    """

    @abstractmethod
    def empty(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Memory for a result [rows, width] that is used up before the next one of that name is made."""

    @abstractmethod
    def _take(self, call: Call, rows: int, used: tuple[Any, ...], view: PagedView | None) -> None:
        """One call on `rows` rows; `used`: what it points into. `view` is for attention, which needs one."""

    def _do(
        self,
        kind: Kind,
        like: Tensor,
        *arguments: Any,
        view: PagedView | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """One call on as many rows as `like` has, in its dtype or the one given; tensors and structs go as
        their addresses."""
        struct = ARGUMENTS[kind](*map(_address, arguments))
        call = Call(kind, (dtype or like.dtype) is torch.bfloat16, ctypes.addressof(struct))
        self._take(call, len(like), (struct, *arguments), view)

    def linear(
        self, weights: PackedLinear, x: Tensor, out: Tensor, mode: Out, act: Activation = Activation.NONE
    ) -> None:
        """x [rows, in] to out [rows, out] as `mode` says."""
        self._do(Kind.LINEAR, x, weights, x, out, x.stride(0), out.stride(0), mode, act)

    def norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, center: bool, eps: float, out: Tensor
    ) -> None:
        """x float32 [rows, width], RMSNorm or (`center`) LayerNorm, to out."""
        self._do(Kind.NORM, out, x, weight, bias, out, x.shape[1], center, eps)

    def rotate(
        self,
        x: Tensor,
        heads: int,
        queries: int,
        dim: int,
        cosine: Tensor,
        sine: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
    ) -> None:
        """RoPE in place on the first `heads` heads of x's rows; cosine and sine float32 [rows, dim].

        `norms`: RMSNorm weights [dim] of the first `queries` heads and of the others, applied before.
        """
        normed = norms or (None, None)
        self._do(Kind.ROTATE, x, x, cosine, sine, *normed, x.stride(0), heads, queries, dim, eps)

    def paged_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pools: tuple[Tensor, Tensor],
        view: PagedView,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Stores each sequence's new key and value in its last slot, and attends.

        query [B, heads, key_dim], key and value [B, kv_heads, dim]; pools [blocks, block_size, kv_heads,
        dim]. Returns [B, heads, value_dim].
        """
        heads, dim = query.shape[1], value.shape[2]
        query, key, value = (_whole_rows(x) for x in (query, key, value))
        out = self.empty("attended", len(query), heads * dim, query.dtype)
        strides = query.stride(0), key.stride(0), value.stride(0)
        sizes = heads, key.shape[1], key.shape[2], dim, pools[0].shape[1], window or 0
        states = query, key, value
        self._do(Kind.ATTENTION, query, *states, *strides, *pools, out, *sizes, scale, view=view)
        return out.view(len(query), heads, dim)

    def prompt_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: Any,
        pools: tuple[Tensor, Tensor] | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Causal attention within each span: an array of `PromptSpan`, together all rows.

        query [T, heads, key_dim], key and value [T, kv_heads, dim]; pools [slots, kv_heads, dim] if any span
        has stored tokens; scale positive. Returns [T, heads, value_dim].
        """
        assert scale > 0, "scores are compared before they are scaled"
        heads, dim = query.shape[1], value.shape[2]
        query, key, value = (_whole_rows(x) for x in (query, key, value))
        out = self.empty("attended", len(query), heads * dim, query.dtype)
        strides = query.stride(0), key.stride(0), value.stride(0)
        sizes = heads, key.shape[1], key.shape[2], dim, window or 0
        states = query, key, value, *(pools or (None, None))
        self._do(Kind.PROMPT, query, *states, out, spans, len(spans), *strides, *sizes, scale)
        return out.view(len(query), heads, dim)

    def low_rank(
        self, value: Tensor, source: Tensor, spans: Any, layer: int, relu: bool, dtype: torch.dtype
    ) -> None:
        """value [T, out] += factor · f(source down + bias) up in each span's rows; source [T, in].

        spans: an array of `LowRankSpan` with matrices of `dtype`, no two of which share a row; f is ReLU or
        nothing. value alone, or value and source, may be float32 beside bfloat16 matrices.
        """
        strides, widths = (value.stride(0), source.stride(0)), (source.shape[1], value.shape[1])
        wide = value.dtype is torch.float32, source.dtype is torch.float32
        arguments = value, source, spans, len(spans), *strides, *widths, layer, relu, *wide
        self._do(Kind.LOW_RANK, value, *arguments, dtype=dtype)

    def affine(
        self, x: Tensor, bounds: Tensor, gains: Tensor | None, shifts: Tensor | None, layer: int
    ) -> None:
        """x [T, width] = x · gain + shift in the rows of each piece.

        bounds int64 [n, 2]: their rows, [start, stop), no two of which overlap; gains and shifts int64 [n]:
        where the vectors float32 [layers, width] lie.
        """
        self._do(Kind.AFFINE, x, x, bounds, gains, shifts, len(bounds), x.stride(0), x.shape[1], layer)

    def mean(self, x: Tensor, bounds: Tensor, out: Tensor) -> None:
        """x [T, width] to out [n, width]: the means of rows [start, stop) of bounds int64 [n, 2]."""
        self._do(Kind.MEAN, x, x, out, bounds, len(bounds), x.stride(0), x.shape[1])

    def scale(self, x: Tensor, site: int, layer: int, view: PagedView, dtype: torch.dtype) -> None:
        """x [B, width] *= 1 + the vector of each row's sequence at the view's site `site`, if it has one.

        dtype: the vectors'; x may be float32 whatever they are.
        """
        arguments = x, x.stride(0), x.shape[1], site, layer, x.dtype is torch.float32
        self._do(Kind.SCALE, x, *arguments, view=view, dtype=dtype)

    def activate(self, x: Tensor, out: Tensor, act: Activation) -> None:
        """x [rows, width] to out = act(x), or x [rows, 2 width] to act(first half) * second half.

        x may be float32 whatever out is.
        """
        gated, wide = x.shape[1] != out.shape[1], x.dtype is torch.float32
        self._do(Kind.ACTIVATE, out, x, out, out.shape[1], act, gated, wide)


def _address(argument: Any) -> Any:
    """As a struct's field takes it; numbers and None are what they are."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, PackedLinear):
        return ctypes.addressof(argument.struct)
    return ctypes.addressof(argument) if isinstance(argument, ctypes.Array) else argument


def _whole_rows(x: Tensor) -> Tensor:
    """x [T, heads, dim] with each row's heads side by side, as the kernels read them."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


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
            raise BuildError(f"the kernels cannot be loaded: {error}") from error
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = result, arguments
        self._library = library
        self.threads = threads
        self.spent: Counter[Kind] | None = None  # where to add the seconds that calls take, if anywhere
        self.multiplies_bf16 = bool(self._c.prad_multiplies_bf16())
        sizes = (c_int64 * len(_STRUCTS))()
        self._c.prad_sizes(sizes)
        for struct, size in zip(_STRUCTS, sizes, strict=True):
            assert ctypes.sizeof(struct) == size, f"{struct.__name__} is declared otherwise in C"

    def beside(self, threads: int) -> "Kernels":
        """The same with threads of their own: who computes with these waits for nobody."""
        return Kernels(self._library, threads)

    def supports(self, dtype: torch.dtype) -> bool:
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
        self._do(Kind.ARGMAX, logits, logits, out, logits.shape[1])
        return out.tolist()


class Recording(Calls):
    """Keeps calls instead of running them.

    Whatever they read and write stays theirs; `run` may be given fewer rows than were recorded.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._memory: dict[str, Tensor] = {}
        self._calls: list[Call] = []
        self.latest: Any = None  # the arguments of the latest call
        self._used: list[Any] = []
        self._list: Any = None

    def empty(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """The same memory for every result of that name."""
        if name not in self._memory:
            self._memory[name] = torch.empty(rows, width, dtype=dtype)
        kept = self._memory[name]
        assert kept.shape == (rows, width), f"{name} changed its shape from {tuple(kept.shape)}"
        return kept

    def _take(self, call: Call, rows: int, used: tuple[Any, ...], view: PagedView | None) -> None:
        self._calls.append(call)
        self._used += used
        self.latest = used[0]

    def run(self, rows: int, view: PagedView) -> None:
        """All calls in order, on the first `rows` rows of what they were recorded with."""
        if self._list is None:
            self._list = (Call * len(self._calls))(*self._calls)
        self._kernels.run(self._list, rows, view)
