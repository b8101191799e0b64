"""Weights in the order in which the kernels read them: panels of 16 output columns (linear.h)."""

from collections.abc import Sequence
from ctypes import Structure, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

COLUMNS, DEPTH = 16, 32
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

Precision = Literal["full", "int8"]


class LinearStruct(Structure):
    _fields_: ClassVar[list[Any]] = [
        ("panels", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("weights", c_int32),
        ("paired", c_int32),
    ]


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A linear layer y = x W^T + b for the kernels; `struct` points into the tensors beside it."""

    panels: Tensor
    scales: Tensor | None
    bias: Tensor | None
    struct: LinearStruct

    @property
    def out_features(self) -> int:
        return int(self.struct.out_features)

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        precision: Precision = "full",
        paired: bool = False,
    ) -> "PackedLinear":
        """weight [out, in] in bfloat16 (in: a multiple of 32) or float32.

        precision int8: weights rounded to 8 bits, one scale per output column. `paired`: the panels of the
        first and of the second half of the columns alternate, for gate and up.
        """
        out_features, in_features = weight.shape
        scales = None
        if precision == "int8":
            scales = (weight.float().abs().amax(dim=1) / 127).clamp_min(1e-12)
            weight = (weight.float() / scales[:, None]).round().to(torch.int8)
        panels = _columns(weight, paired)  # [panels, 16, in]
        if weight.dtype is torch.float32:
            panels = panels.transpose(1, 2).contiguous()
        else:
            pairs = panels.view(len(panels), COLUMNS, in_features // DEPTH, DEPTH // 2, 2)
            panels = pairs.permute(0, 2, 3, 1, 4).contiguous()
        scales, bias = (
            None if x is None else _columns(x.float()[:, None], paired).flatten().contiguous()
            for x in (scales, bias)
        )
        struct = LinearStruct(
            panels.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
            in_features,
            out_features,
            _KINDS[panels.dtype],
            paired,
        )
        return cls(panels, scales, bias, struct)


def fits(weights: Sequence[Tensor]) -> bool:
    """Whether the kernels can take these weights [out, in]."""
    return all(w.dtype is torch.float32 or w.shape[1] % DEPTH == 0 for w in weights)


def _columns(rows: Tensor, paired: bool) -> Tensor:
    """rows [out, n] -> [panels, 16, n], padded with zeros; paired: panels of both halves in turn."""
    if paired:
        gate, up = (_columns(half, paired=False) for half in rows.chunk(2))
        return torch.stack((gate, up), dim=1).flatten(0, 1)
    padded = pad(rows, (0, 0, 0, -len(rows) % COLUMNS))
    return padded.view(-1, COLUMNS, rows.shape[1])
