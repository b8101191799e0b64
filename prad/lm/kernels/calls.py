"""The kernels' operations as calls: a kind, a struct of arguments (kernels.cpp), a number of rows.

`Calls` makes them of tensors; `Kernels` (library.py) runs each, `Recording` (recording.py) keeps them.
"""

import ctypes
from abc import ABC, abstractmethod
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from prad.lm.kernels.packed import PackedLinear


class Out(IntEnum):
    """What becomes of a linear layer's result."""

    STORE = 0
    """Written in the activations' dtype."""
    ADD = 1
    """Added to float32 rows."""
    GATED = 2
    """Columns in pairs: act(first half) * second half."""
    WIDE = 3
    """Written in float32, as it was summed, without an activation."""


class Activation(IntEnum):
    NONE = 0
    SILU = 1
    GELU_TANH = 2
    RELU = 3


class Kind(IntEnum):
    LINEAR = 0
    NORM = 1
    ROTATE = 2
    ATTENTION = 3
    ARGMAX = 4
    LOW_RANK = 5
    SCALE = 6
    ACTIVATE = 7
    PROMPT = 8
    AFFINE = 9
    MEAN = 10


class Call(Structure):
    _fields_: ClassVar[list[Any]] = [("kind", c_int32), ("half", c_int32), ("arguments", c_void_p)]


class PagedView(Structure):
    """Where a step's sequences lie: block table int64 [B, width] and lengths int64 [B] with the new token;
    and their request state, for `scale`: addresses int64 [sites, B] of vectors [layers, width of the site], 0
    for none."""

    _fields_: ClassVar[list[Any]] = [
        ("table", c_void_p),
        ("lengths", c_void_p),
        ("width", c_int64),
        ("vectors", c_void_p),
    ]

    @classmethod
    def of(cls, table: Tensor, lengths: Tensor, vectors: Tensor | None = None) -> "PagedView":
        """The tensors must outlive it."""
        state = None if vectors is None else vectors.data_ptr()
        return cls(table.data_ptr(), lengths.data_ptr(), table.shape[1], state)


def _struct(name: str, **fields: Any) -> Any:
    return type(name, (Structure,), {"_fields_": list(fields.items())})


def _fields(names: str, kind: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


ARGUMENTS: dict[Kind, Any] = {
    Kind.LINEAR: _struct(
        "LinearCall",
        **_fields("weights x out", c_void_p),
        **_fields("x_stride out_stride", c_int64),
        **_fields("mode act", c_int32),
    ),
    Kind.NORM: _struct(
        "NormCall",
        **_fields("x weight bias out", c_void_p),
        width=c_int64,
        center=c_int32,
        epsilon=c_float,
    ),
    Kind.ROTATE: _struct(
        "RotateCall",
        **_fields("x cosine sine q_norm k_norm", c_void_p),
        **_fields("stride heads queries dim", c_int64),
        epsilon=c_float,
    ),
    Kind.ATTENTION: _struct(
        "AttentionCall",
        **_fields("query key value", c_void_p),
        **_fields("query_stride key_stride value_stride", c_int64),
        **_fields("keys values out", c_void_p),
        **_fields("heads kv_heads key_dim value_dim block_size window", c_int64),
        scale=c_float,
    ),
    Kind.ARGMAX: _struct("ArgmaxCall", **_fields("x out", c_void_p), width=c_int64),
    Kind.LOW_RANK: _struct(
        "LowRankCall",
        **_fields("value source spans", c_void_p),
        **_fields("count value_stride source_stride width_in width_out layer", c_int64),
        **_fields("relu wide_value wide_source", c_int32),
    ),
    Kind.SCALE: _struct("ScaleCall", x=c_void_p, **_fields("stride width site layer", c_int64), wide=c_int32),
    Kind.ACTIVATE: _struct(
        "ActivateCall", **_fields("x out", c_void_p), width=c_int64, **_fields("act gated wide", c_int32)
    ),
    Kind.PROMPT: _struct(
        "PromptCall",
        **_fields("query key value keys values out spans", c_void_p),
        **_fields("count query_stride key_stride value_stride heads kv_heads", c_int64),
        **_fields("key_dim value_dim window", c_int64),
        scale=c_float,
    ),
    Kind.AFFINE: _struct(
        "AffineCall",
        **_fields("x bounds gains shifts", c_void_p),
        **_fields("count stride width layer", c_int64),
    ),
    Kind.MEAN: _struct(
        "MeanCall", **_fields("x out bounds", c_void_p), **_fields("count stride width", c_int64)
    ),
}


class LowRankSpan(Structure):
    """Rows [start, stop); down [layers, in, r], bias float32 [layers, r] or none, up [layers, r, out]."""

    _fields_: ClassVar[list[Any]] = [
        *((name, c_int64) for name in ("start", "stop")),
        *((name, c_void_p) for name in ("down", "bias", "up")),
        ("r", c_int64),
        ("factor", c_float),
    ]


class PromptSpan(Structure):
    """A sequence: rows [start, start + rows) of a pass, behind tokens that lie at slots int64 [stored]."""

    _fields_: ClassVar[list[Any]] = [
        ("start", c_int64),
        ("rows", c_int64),
        ("slots", c_void_p),
        ("stored", c_int64),
    ]


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
        half: bool,
        rows: int,
        arguments: tuple[Any, ...],
        used: tuple[Any, ...],
        view: PagedView | None = None,
    ) -> None:
        struct = ARGUMENTS[kind](*arguments)
        self._take(Call(kind, half, ctypes.addressof(struct)), rows, (struct, *used), view)

    def linear(
        self, weights: PackedLinear, x: Tensor, out: Tensor, mode: Out, act: Activation = Activation.NONE
    ) -> None:
        """x [rows, in] to out [rows, out] as `mode` says."""
        self._do(
            Kind.LINEAR,
            x.dtype is torch.bfloat16,
            len(x),
            (
                ctypes.addressof(weights.struct),
                x.data_ptr(),
                out.data_ptr(),
                x.stride(0),
                out.stride(0),
                mode,
                act,
            ),
            (weights, x, out),
        )

    def norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, center: bool, eps: float, out: Tensor
    ) -> None:
        """x float32 [rows, width], RMSNorm or (`center`) LayerNorm, to out."""
        self._do(
            Kind.NORM,
            out.dtype is torch.bfloat16,
            len(x),
            (
                x.data_ptr(),
                weight.data_ptr(),
                None if bias is None else bias.data_ptr(),
                out.data_ptr(),
                x.shape[1],
                center,
                eps,
            ),
            (x, weight, bias, out),
        )

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
        q_norm, k_norm = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
        self._do(
            Kind.ROTATE,
            x.dtype is torch.bfloat16,
            len(x),
            (
                x.data_ptr(),
                cosine.data_ptr(),
                sine.data_ptr(),
                q_norm,
                k_norm,
                x.stride(0),
                heads,
                queries,
                dim,
                eps,
            ),
            (x, cosine, sine, norms),
        )

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
        self._do(
            Kind.ATTENTION,
            query.dtype is torch.bfloat16,
            len(query),
            (
                query.data_ptr(),
                key.data_ptr(),
                value.data_ptr(),
                query.stride(0),
                key.stride(0),
                value.stride(0),
                pools[0].data_ptr(),
                pools[1].data_ptr(),
                out.data_ptr(),
                heads,
                key.shape[1],
                key.shape[2],
                dim,
                pools[0].shape[1],
                window or 0,
                scale,
            ),
            (query, key, value, pools, out),
            view,
        )
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
        stored = (None, None) if pools is None else (pools[0].data_ptr(), pools[1].data_ptr())
        self._do(
            Kind.PROMPT,
            query.dtype is torch.bfloat16,
            len(query),
            (
                query.data_ptr(),
                key.data_ptr(),
                value.data_ptr(),
                *stored,
                out.data_ptr(),
                ctypes.addressof(spans),
                len(spans),
                query.stride(0),
                key.stride(0),
                value.stride(0),
                heads,
                key.shape[1],
                key.shape[2],
                dim,
                window or 0,
                scale,
            ),
            (query, key, value, pools, spans, out),
        )
        return out.view(len(query), heads, dim)

    def low_rank(
        self, value: Tensor, source: Tensor, spans: Any, layer: int, relu: bool, dtype: torch.dtype
    ) -> None:
        """value [T, out] += factor · f(source down + bias) up in each span's rows; source [T, in].

        spans: an array of `LowRankSpan` with matrices of `dtype`, no two of which share a row; f is ReLU or
        nothing. value alone, or value and source, may be float32 beside bfloat16 matrices.
        """
        self._do(
            Kind.LOW_RANK,
            dtype is torch.bfloat16,
            len(value),
            (
                value.data_ptr(),
                source.data_ptr(),
                ctypes.addressof(spans),
                len(spans),
                value.stride(0),
                source.stride(0),
                source.shape[1],
                value.shape[1],
                layer,
                relu,
                value.dtype is torch.float32,
                source.dtype is torch.float32,
            ),
            (value, source, spans),
        )

    def affine(
        self, x: Tensor, bounds: Tensor, gains: Tensor | None, shifts: Tensor | None, layer: int
    ) -> None:
        """x [T, width] = x · gain + shift in the rows of each piece.

        bounds int64 [n, 2]: their rows, [start, stop), no two of which overlap; gains and shifts int64 [n]:
        where the vectors float32 [layers, width] lie.
        """
        self._do(
            Kind.AFFINE,
            x.dtype is torch.bfloat16,
            len(x),
            (
                x.data_ptr(),
                bounds.data_ptr(),
                None if gains is None else gains.data_ptr(),
                None if shifts is None else shifts.data_ptr(),
                len(bounds),
                x.stride(0),
                x.shape[1],
                layer,
            ),
            (x, bounds, gains, shifts),
        )

    def mean(self, x: Tensor, bounds: Tensor, out: Tensor) -> None:
        """x [T, width] to out [n, width]: the means of rows [start, stop) of bounds int64 [n, 2]."""
        self._do(
            Kind.MEAN,
            x.dtype is torch.bfloat16,
            len(x),
            (x.data_ptr(), out.data_ptr(), bounds.data_ptr(), len(bounds), x.stride(0), x.shape[1]),
            (x, out, bounds),
        )

    def scale(self, x: Tensor, site: int, layer: int, view: PagedView, dtype: torch.dtype) -> None:
        """x [B, width] *= 1 + the vector of each row's sequence at the view's site `site`, if it has one.

        dtype: the vectors'; x may be float32 whatever they are.
        """
        self._do(
            Kind.SCALE,
            dtype is torch.bfloat16,
            len(x),
            (x.data_ptr(), x.stride(0), x.shape[1], site, layer, x.dtype is torch.float32),
            (x,),
            view,
        )

    def activate(self, x: Tensor, out: Tensor, act: Activation) -> None:
        """x [rows, width] to out = act(x), or x [rows, 2 width] to act(first half) * second half.

        x may be float32 whatever out is.
        """
        gated, wide = x.shape[1] != out.shape[1], x.dtype is torch.float32
        self._do(
            Kind.ACTIVATE,
            out.dtype is torch.bfloat16,
            len(x),
            (x.data_ptr(), out.data_ptr(), out.shape[1], act, gated, wide),
            (x, out),
        )


def _whole_rows(x: Tensor) -> Tensor:
    """x [T, heads, dim] with each row's heads side by side, as the kernels read them."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
