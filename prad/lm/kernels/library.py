"""The kernels' C interface. See kernels.cpp and the headers beside it for what each computes."""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from prad.lm.kernels.build import BuildError
from prad.lm.kernels.packed import LinearStruct, PackedLinear


class Out(IntEnum):
    """What becomes of a linear layer's result."""

    STORE = 0
    """Written in the activations' dtype."""
    ADD = 1
    """Added to float32 rows."""
    GATED = 2
    """Columns in pairs: act(first half) * second half."""


class Activation(IntEnum):
    NONE = 0
    SILU = 1
    GELU_TANH = 2
    RELU = 3


class PagedStruct(Structure):
    _fields_: ClassVar[list[Any]] = [
        *((name, c_void_p) for name in ("query", "key", "value")),
        *((f"{name}_stride", c_int64) for name in ("query", "key", "value")),
        *((name, c_void_p) for name in ("keys", "values", "table", "lengths", "out")),
        *(
            (name, c_int64)
            for name in (
                "sequences",
                "width",
                "heads",
                "kv_heads",
                "key_dim",
                "value_dim",
                "block_size",
                "window",
            )
        ),
        ("scale", c_float),
    ]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "prad_pool": (c_void_p, [c_int32]),
    "prad_pool_free": (None, [c_void_p]),
    "prad_has_amx": (c_int32, []),
    "prad_paged_size": (c_int64, []),
    "prad_linear": (
        None,
        [c_void_p, POINTER(LinearStruct), c_void_p, c_int64, c_int64, c_int32, c_int32, c_void_p, c_int64],
    ),
    "prad_norm": (
        None,
        [c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int32, c_float, c_void_p],
    ),
    "prad_rotate": (
        None,
        [c_void_p, c_int32, c_void_p, *[c_int64] * 5, c_void_p, c_void_p, c_void_p, c_void_p, c_float],
    ),
    "prad_paged_attention": (None, [c_void_p, c_int32, POINTER(PagedStruct)]),
    "prad_argmax": (None, [c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p]),
}


class Kernels:
    """The built kernels and the threads they compute with. Calls release the GIL.

    Tensors are contiguous in their last dimension, on the CPU, bfloat16 or float32; nothing here checks that.
    """

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
        self.has_amx = bool(self._c.prad_has_amx())
        assert self._c.prad_paged_size() == ctypes.sizeof(PagedStruct), "PagedStruct is not struct Paged"

    @cached_property
    def _pool(self) -> int:
        """Threads take their priority from whoever starts them: the first that computes."""
        return int(self._c.prad_pool(self.threads))

    def __del__(self) -> None:
        if "_pool" in self.__dict__:
            self._c.prad_pool_free(self._pool)

    def linear(
        self, weights: PackedLinear, x: Tensor, out: Tensor, mode: Out, act: Activation = Activation.NONE
    ) -> None:
        """x [rows, in] to out [rows, out] as `mode` says."""
        self._c.prad_linear(
            self._pool,
            weights.struct,
            x.data_ptr(),
            x.shape[0],
            x.stride(0),
            mode,
            act,
            out.data_ptr(),
            out.stride(0),
        )

    def norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, center: bool, eps: float, out: Tensor
    ) -> None:
        """x float32 [rows, width], RMSNorm or (`center`) LayerNorm, to out."""
        self._c.prad_norm(
            self._pool,
            _half(out),
            x.data_ptr(),
            *x.shape,
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            center,
            eps,
            out.data_ptr(),
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
        self._c.prad_rotate(
            self._pool,
            _half(x),
            x.data_ptr(),
            x.shape[0],
            x.stride(0),
            heads,
            queries,
            dim,
            cosine.data_ptr(),
            sine.data_ptr(),
            q_norm,
            k_norm,
            eps,
        )

    def paged_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pools: tuple[Tensor, Tensor],
        table: Tensor,
        lengths: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Stores each sequence's new key and value in its last slot, and attends.

        query [B, heads, key_dim], key and value [B, kv_heads, dim]; pools [blocks, block_size, kv_heads,
        dim], table int64 [B, width], lengths int64 [B] with the new token. Returns [B, heads, value_dim].
        """
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        paged = PagedStruct(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            query.stride(0),
            key.stride(0),
            value.stride(0),
            pools[0].data_ptr(),
            pools[1].data_ptr(),
            table.data_ptr(),
            lengths.data_ptr(),
            out.data_ptr(),
            len(table),
            table.shape[1],
            query.shape[1],
            key.shape[1],
            key.shape[2],
            value.shape[2],
            pools[0].shape[1],
            window or 0,
            scale,
        )
        self._c.prad_paged_attention(self._pool, _half(query), paged)
        return out

    def argmax(self, logits: Tensor) -> list[int]:
        """The lowest id of each row's largest logit."""
        out = torch.empty(len(logits), dtype=torch.long)
        self._c.prad_argmax(self._pool, _half(logits), logits.data_ptr(), *logits.shape, out.data_ptr())
        return out.tolist()


def _half(x: Tensor) -> int:
    return x.dtype is torch.bfloat16
