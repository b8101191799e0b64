"""Weights in the order in which the kernels read them: panels of 16 output columns (linear.h)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from prad.core.models import Precision
from prad.lm.blocks import INPUTS, Blocks
from prad.lm.kernels.memory import HugePages
from prad.lm.kernels.operations import Linear, Weights

COLUMNS, DEPTH = 16, 32
_TURNED, _ROW_OFFSET, _MOST_IN_BYTES = 64, 128, 65_536
_KINDS = {torch.float32: Weights.F32, torch.bfloat16: Weights.BF16, torch.int8: Weights.INT8}
_BLOCK_KINDS = {4: Weights.FOURS, 8: Weights.EIGHTS}


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A linear layer y = x W^T + b for the kernels; `struct` points into the tensors beside it."""

    panels: Tensor
    scales: Tensor | None
    offsets: Tensor | None
    bias: Tensor | None
    struct: Linear

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """What `struct` points into, in the order of `placed`."""
        return {"panels": self.panels, "scales": self.scales, "offsets": self.offsets, "bias": self.bias}

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors.values() if x is not None)

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        precision: Precision = "full",
        paired: bool = False,
        memory: HugePages | None = None,
    ) -> "PackedLinear":
        """weight [out, in] in bfloat16 (in: a multiple of 32) or float32.

        precision int8: weights turned and rounded to 8 bits, one scale per output column; in is at most
        65,536, so that sums of products are exact in 32 bits. `paired`: the panels of the first and of the
        second half of the columns alternate, for gate and up. `memory`: where the panels are to lie.
        """
        shape = weight.shape
        scales = offsets = None
        if precision == "int8":
            assert shape[1] <= _MOST_IN_BYTES
            turned = _turned(weight.float())
            scales = (turned.abs().amax(dim=1) / 127).clamp_min(1e-12)
            weight = (turned / scales[:, None]).round().to(torch.int8)
            offsets = _ROW_OFFSET * weight.sum(dim=1, dtype=torch.int32)
        panels, kind = _laid(_columns(weight, paired)), _KINDS[weight.dtype]
        return cls._with(panels, scales, offsets, bias, shape, kind, paired=paired, memory=memory)

    @classmethod
    def of_blocks(
        cls,
        blocks: Sequence[Blocks],
        bias: Tensor | None = None,
        *,
        paired: bool = False,
        memory: HugePages | None = None,
    ) -> "PackedLinear":
        """A weight whose outputs are those of `blocks` in turn, all of as many bits; for rows in bfloat16."""
        (bits,) = {each.bits for each in blocks}
        numbers = torch.cat([each.unpacked() for each in blocks])
        scales = [torch.cat([each.scale for each in blocks])]
        # [panels, in / 32, 8, 16 columns, 4 inputs]
        laid = _columns(numbers, paired).view(-1, COLUMNS, scales[0].shape[1], 8, 4).permute(0, 2, 3, 1, 4)
        if bits == 4:
            scales.append(torch.cat([each.least for each in blocks if each.least is not None]))
            laid = laid[:, :, ::2] | (laid[:, :, 1::2] << 4)
        else:
            laid = laid.view(torch.uint8) ^ 128
        beside = [_columns(scale, paired).transpose(1, 2).contiguous().view(torch.uint8) for scale in scales]
        panels = torch.cat((*beside, laid.flatten(2)), dim=2)
        kind = _BLOCK_KINDS[bits]
        return cls._with(panels, None, None, bias, numbers.shape, kind, paired=paired, memory=memory)

    @classmethod
    def _with(
        cls,
        panels: Tensor,
        scales: Tensor | None,
        offsets: Tensor | None,
        bias: Tensor | None,
        shape: torch.Size,
        kind: Weights,
        *,
        paired: bool,
        memory: HugePages | None,
    ) -> "PackedLinear":
        if memory is not None:
            panels = memory.copied(panels)
        scales, offsets, bias = (
            None if x is None else _columns(x[:, None], paired).flatten().contiguous()
            for x in (scales, offsets, None if bias is None else bias.float())
        )
        return cls.placed(panels, scales, offsets, bias, shape[1], shape[0], kind, paired)

    @classmethod
    def placed(
        cls,
        panels: Tensor,
        scales: Tensor | None,
        offsets: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        kind: Weights,
        paired: bool,
    ) -> "PackedLinear":
        """Of tensors as the kernels read them, where they lie. Raises ValueError if they are not as large as
        such a layer's."""
        columns, size = _size(in_features, out_features, kind, paired)
        beside = [x for x in (scales, offsets, bias) if x is not None]
        if panels.nbytes != size or any(x.nbytes != 4 * columns for x in beside):
            raise ValueError(f"these are no weights of kind {kind} of [{out_features}, {in_features}]")
        if (scales is not None, offsets is not None) != 2 * (kind is Weights.INT8,):
            raise ValueError("8 bits have scales and offsets, and nothing else has")
        struct = Linear(
            panels=panels,
            scales=scales,
            offsets=offsets,
            bias=bias,
            in_features=in_features,
            out_features=out_features,
            weights=kind,
            paired=paired,
        )
        return cls(panels, scales, offsets, bias, struct)


def _size(in_features: int, out_features: int, kind: Weights, paired: bool) -> tuple[int, int]:
    """The columns of a layer's panels, and the bytes of all of these."""
    parts = 2 if paired else 1
    columns = parts * -(-out_features // parts // COLUMNS) * COLUMNS
    if kind is Weights.INT8:
        return columns, columns * -(-in_features // _TURNED) * _TURNED
    if kind in _BLOCK_KINDS.values():  # a block of 4 bits has a scale and a least number, one of 8 a scale
        block = INPUTS // 2 + 4 if kind is Weights.FOURS else INPUTS + 2
        return columns, columns * in_features // INPUTS * block
    return columns, columns * in_features * (4 if kind is Weights.F32 else 2)


def can_pack(weights: Sequence[Tensor], precision: Precision) -> bool:
    """Whether the kernels can take these weights [out, in]."""
    if precision == "int8":
        return all(w.shape[1] <= _MOST_IN_BYTES for w in weights)
    if precision == "int4":
        return all(w.shape[1] % INPUTS == 0 for w in weights)
    return all(w.dtype is torch.float32 or w.shape[1] % DEPTH == 0 for w in weights)


def _turned(weight: Tensor) -> Tensor:
    """weight float32 [out, in], with zeros behind the inputs: every 64 inputs times the Hadamard matrix that
    bytes.h turns rows with, and 1 / 64."""
    turned = pad(weight, (0, -weight.shape[1] % _TURNED)) / _TURNED
    for distance in (1, 2, 4, 8, 16, 32):
        left, right = turned.view(-1, 2, distance).unbind(1)
        turned = torch.stack((left + right, left - right), dim=1)
    return turned.view(len(weight), -1)


def _laid(panels: Tensor) -> Tensor:
    """panels [n, 16, in] as linear.h reads them: as many inputs as 32 bits hold beside each other, column by
    column."""
    return panels.view(len(panels), COLUMNS, -1, 4 // panels.element_size()).transpose(1, 2).contiguous()


def _columns(rows: Tensor, paired: bool) -> Tensor:
    """rows [out, n] -> [panels, 16, n], padded with zeros; paired: panels of both halves in turn."""
    if paired:
        gate, up = (_columns(half, paired=False) for half in rows.chunk(2))
        return torch.stack((gate, up), dim=1).flatten(0, 1)
    padded = pad(rows, (0, 0, 0, -len(rows) % COLUMNS))
    return padded.view(-1, COLUMNS, rows.shape[1])
