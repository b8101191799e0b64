"""The kernels' operations on tensors: run at once by `Kernels`, or kept by a `Recording` to be run again.

Each is a call of the built library: a struct of arguments (operations.py) and a number of rows.
"""

import ctypes
from abc import ABC, abstractmethod
from collections import Counter
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_void_p
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prad.lm.kernels import operations
from prad.lm.kernels.build import BuildError
from prad.lm.kernels.declared import digest
from prad.lm.kernels.operations import (
    ActivateCall,
    Activation,
    AffineCall,
    ArgmaxCall,
    AttentionCall,
    Call,
    Kind,
    LinearCall,
    LowRankCall,
    MeanCall,
    NormCall,
    Operation,
    Out,
    PagedView,
    PromptCall,
    RotateCall,
    ScaleCall,
)
from prad.lm.kernels.weights import PackedLinear


class Calls(ABC):
    """What the kernels can do.

    Tensors are contiguous in their last dimension, on the CPU, bfloat16 or float32; nothing here checks that.
    """

    @abstractmethod
    def empty(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Memory for a result [rows, width] that is used up before the next one of that name is made."""

    @abstractmethod
    def _take(self, call: Call, arguments: Operation, rows: int, view: PagedView | None) -> None:
        """One call on `rows` rows. `view` is for attention, which needs one."""

    def _do(
        self,
        arguments: Operation,
        like: Tensor,
        *,
        view: PagedView | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """One call on as many rows as `like` has, in its dtype or the one given."""
        half = (dtype or like.dtype) is torch.bfloat16
        self._take(Call(kind=arguments.kind, half=half, arguments=arguments), arguments, len(like), view)

    def linear(
        self, weights: PackedLinear, x: Tensor, out: Tensor, mode: Out, act: Activation = Activation.NONE
    ) -> None:
        """x [rows, in] to out [rows, out] as `mode` says."""
        arguments = LinearCall(
            weights=weights.struct,
            x=x,
            out=out,
            x_stride=x.stride(0),
            out_stride=out.stride(0),
            mode=mode,
            act=act,
        )
        self._do(arguments, x)

    def norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, center: bool, eps: float, out: Tensor
    ) -> None:
        """x float32 [rows, width], RMSNorm or (`center`) LayerNorm, to out."""
        arguments = NormCall(
            x=x, weight=weight, bias=bias, out=out, width=x.shape[1], center=center, epsilon=eps
        )
        self._do(arguments, out)

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
        q_norm, k_norm = norms or (None, None)
        arguments = RotateCall(
            x=x,
            cosine=cosine,
            sine=sine,
            q_norm=q_norm,
            k_norm=k_norm,
            stride=x.stride(0),
            heads=heads,
            queries=queries,
            dim=dim,
            epsilon=eps,
        )
        self._do(arguments, x)

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
        arguments = AttentionCall(
            query=query,
            key=key,
            value=value,
            query_stride=query.stride(0),
            key_stride=key.stride(0),
            value_stride=value.stride(0),
            keys=pools[0],
            values=pools[1],
            out=out,
            heads=heads,
            kv_heads=key.shape[1],
            key_dim=key.shape[2],
            value_dim=dim,
            block_size=pools[0].shape[1],
            window=window or 0,
            scale=scale,
        )
        self._do(arguments, query, view=view)
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
        keys, values = pools or (None, None)
        arguments = PromptCall(
            query=query,
            key=key,
            value=value,
            keys=keys,
            values=values,
            out=out,
            spans=spans,
            count=len(spans),
            query_stride=query.stride(0),
            key_stride=key.stride(0),
            value_stride=value.stride(0),
            heads=heads,
            kv_heads=key.shape[1],
            key_dim=key.shape[2],
            value_dim=dim,
            window=window or 0,
            scale=scale,
        )
        self._do(arguments, query)
        return out.view(len(query), heads, dim)

    def low_rank(
        self, value: Tensor, source: Tensor, spans: Any, layer: int, relu: bool, dtype: torch.dtype
    ) -> None:
        """value [T, out] += factor · f(source down + bias) up in each span's rows; source [T, in].

        spans: an array of `LowRankSpan` with matrices of `dtype`, no two of which share a row; f is ReLU or
        nothing. value alone, or value and source, may be float32 beside bfloat16 matrices.
        """
        arguments = LowRankCall(
            value=value,
            source=source,
            spans=spans,
            count=len(spans),
            value_stride=value.stride(0),
            source_stride=source.stride(0),
            width_in=source.shape[1],
            width_out=value.shape[1],
            layer=layer,
            relu=relu,
            wide_value=value.dtype is torch.float32,
            wide_source=source.dtype is torch.float32,
        )
        self._do(arguments, value, dtype=dtype)

    def affine(
        self, x: Tensor, bounds: Tensor, gains: Tensor | None, shifts: Tensor | None, layer: int
    ) -> None:
        """x [T, width] = x · gain + shift in the rows of each piece.

        bounds int64 [n, 2]: their rows, [start, stop), no two of which overlap; gains and shifts int64 [n]:
        where the vectors float32 [layers, width] lie.
        """
        arguments = AffineCall(
            x=x,
            bounds=bounds,
            gains=gains,
            shifts=shifts,
            count=len(bounds),
            stride=x.stride(0),
            width=x.shape[1],
            layer=layer,
        )
        self._do(arguments, x)

    def mean(self, x: Tensor, bounds: Tensor, out: Tensor) -> None:
        """x [T, width] to out [n, width]: the means of rows [start, stop) of bounds int64 [n, 2]."""
        arguments = MeanCall(
            x=x, out=out, bounds=bounds, count=len(bounds), stride=x.stride(0), width=x.shape[1]
        )
        self._do(arguments, x)

    def scale(self, x: Tensor, site: int, layer: int, view: PagedView, dtype: torch.dtype) -> None:
        """x [B, width] *= 1 + the vector of each row's sequence at the view's site `site`, if it has one.

        dtype: the vectors'; x may be float32 whatever they are.
        """
        wide = x.dtype is torch.float32
        arguments = ScaleCall(x=x, stride=x.stride(0), width=x.shape[1], site=site, layer=layer, wide=wide)
        self._do(arguments, x, view=view, dtype=dtype)

    def activate(self, x: Tensor, out: Tensor, act: Activation) -> None:
        """x [rows, width] to out = act(x), or x [rows, 2 width] to act(first half) * second half.

        x may be float32 whatever out is.
        """
        gated, wide = x.shape[1] != out.shape[1], x.dtype is torch.float32
        arguments = ActivateCall(x=x, out=out, width=out.shape[1], act=act, gated=gated, wide=wide)
        self._do(arguments, out)


def _whole_rows(x: Tensor) -> Tensor:
    """x [T, heads, dim] with each row's heads side by side, as the kernels read them."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "prad_pool": (c_void_p, [c_int32]),
    "prad_pool_free": (None, [c_void_p]),
    "prad_declared": (c_char_p, []),
    "prad_run": (
        None,
        [c_void_p, POINTER(Call), c_int64, c_int64, POINTER(PagedView), POINTER(c_double)],
    ),
}


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
        declared = self._c.prad_declared().decode()
        assert declared == digest(operations), "other operations are compiled: python -m deploy.kernel_header"

    def beside(self, threads: int) -> "Kernels":
        """The same with threads of their own: who computes with these waits for nobody."""
        return Kernels(self._library, threads)

    @cached_property
    def _pool(self) -> int:
        """Threads take their priority from whoever starts them: the first that computes."""
        return int(self._c.prad_pool(self.threads))

    def __del__(self) -> None:
        if "_pool" in self.__dict__:
            self._c.prad_pool_free(self._pool)

    def empty(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, width, dtype=dtype)

    def _take(self, call: Call, arguments: Operation, rows: int, view: PagedView | None) -> None:
        self.run((Call * 1)(call), rows, view)

    def run(self, calls: Any, rows: int, view: PagedView | None = None) -> None:
        """An array of calls in order; the attention and the scales among them need a view."""
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
        self._do(ArgmaxCall(x=logits, out=out, width=logits.shape[1]), logits)
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
        self._list: Any = None

    def empty(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """The same memory for every result of that name."""
        if name not in self._memory:
            self._memory[name] = torch.empty(rows, width, dtype=dtype)
        kept = self._memory[name]
        assert kept.shape == (rows, width), f"{name} changed its shape from {tuple(kept.shape)}"
        return kept

    def _take(self, call: Call, arguments: Operation, rows: int, view: PagedView | None) -> None:
        self._calls.append(call)
        self.latest = arguments

    def run(self, rows: int, view: PagedView | None) -> None:
        """All calls in order, on the first `rows` rows of what they were recorded with; the attention and the
        scales among them need a view."""
        if self._list is None:
            self._list = (Call * len(self._calls))(*self._calls)
        self._kernels.run(self._list, rows, view)


def view_of(
    table: Tensor, lengths: Tensor, vectors: Tensor | None = None, *, drafted: bool = False
) -> PagedView:
    """Of block table [sequences, width], lengths [sequences] and addresses of request state."""
    width = table.shape[1]
    return PagedView(table=table, lengths=lengths, width=width, vectors=vectors, drafted=drafted)
