"""Weights in the order in which the kernels read them: panels of 16 output columns (linear.h)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from prad.core.models import Precision
from prad.lm.blocks import INPUTS, TOGETHER, Blocks
from prad.lm.kernels.memory import HugePages
from prad.lm.kernels.operations import Linear, Weights

COLUMNS, DEPTH = 16, 32
_TURNED, _ROW_OFFSET, _MOST_IN_BYTES = 64, 128, 65_536
_KINDS = {torch.float32: Weights.F32, torch.bfloat16: Weights.BF16, torch.int8: Weights.INT8}
_BLOCK_KINDS = {
    (4, False): Weights.FOURS,
    (8, False): Weights.EIGHTS,
    (4, True): Weights.K_FOURS,
    (6, True): Weights.K_SIXES,
}
_BLOCK_BITS = {  # of 32 inputs of a column, with what is beside the numbers
    Weights.FOURS: 4 * INPUTS + 2 * 16,
    Weights.EIGHTS: 8 * INPUTS + 16,
    Weights.K_FOURS: 4 * INPUTS + 2 * 8 + 2 * 16 * INPUTS // TOGETHER,
    Weights.K_SIXES: 6 * INPUTS + 2 * 8 + 16 * INPUTS // TOGETHER,
}


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A linear layer y = x W^T + b for the kernels; `struct` points into the tensors beside it."""

    panels: Tensor
    scales: Tensor | None
    offsets: Tensor | None
    bias: Tensor | None
    places: Tensor | None
    struct: Linear

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """What `struct` points into, in the order of `placed`."""
        names = ("panels", "scales", "offsets", "bias", "places")
        return {name: getattr(self, name) for name in names}

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
        """A weight whose outputs are those of `blocks` in turn; for rows in bfloat16."""
        assert can_pack_blocks(blocks, paired=paired)
        shape = torch.Size((sum(len(each.scale) for each in blocks), blocks[0].unpacked().shape[1]))
        if len({each.kind for each in blocks}) == 1:
            joined = Blocks.joined(blocks)
            panels, kind = _block_panels(joined, paired), _BLOCK_KINDS[joined.kind]
            return cls._with(panels, None, None, bias, shape, kind, paired=paired, memory=memory)
        laid = [_block_panels(each, paired=False) for each in blocks]
        kinds = torch.cat(
            [torch.full((len(p),), _BLOCK_KINDS[b.kind]) for p, b in zip(laid, blocks, strict=True)]
        )
        if paired:  # as many of both
            panels, kinds = torch.cat(laid, dim=1), kinds.view(2, -1).T.flatten()
        else:
            panels = torch.cat([each.flatten() for each in laid])
        places = _places(kinds, shape[1])
        return cls._with(
            panels.flatten(), None, None, bias, shape, Weights.MIXED, places, paired=paired, memory=memory
        )

    @classmethod
    def _with(
        cls,
        panels: Tensor,
        scales: Tensor | None,
        offsets: Tensor | None,
        bias: Tensor | None,
        shape: torch.Size,
        kind: Weights,
        places: Tensor | None = None,
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
        return cls.placed(panels, scales, offsets, bias, places, shape[1], shape[0], kind, paired)

    @classmethod
    def placed(
        cls,
        panels: Tensor,
        scales: Tensor | None,
        offsets: Tensor | None,
        bias: Tensor | None,
        places: Tensor | None,
        in_features: int,
        out_features: int,
        kind: Weights,
        paired: bool,
    ) -> "PackedLinear":
        """Of tensors as the kernels read them, where they lie. Raises ValueError if they are not as large as
        such a layer's."""
        columns, size = _size(in_features, out_features, kind, places, paired)
        beside = [x for x in (scales, offsets, bias) if x is not None]
        if panels.nbytes != size or any(x.nbytes != 4 * columns for x in beside):
            raise ValueError(f"these are no weights of kind {kind} of [{out_features}, {in_features}]")
        if (places is not None) != (kind is Weights.MIXED):
            raise ValueError("mixed weights have places, and nothing else has")
        if (scales is not None, offsets is not None) != 2 * (kind is Weights.INT8,):
            raise ValueError("8 bits have scales and offsets, and nothing else has")
        struct = Linear(
            panels=panels,
            scales=scales,
            offsets=offsets,
            bias=bias,
            places=places,
            in_features=in_features,
            out_features=out_features,
            weights=kind,
            paired=paired,
        )
        return cls(panels, scales, offsets, bias, places, struct)


def _size(
    in_features: int, out_features: int, kind: Weights, places: Tensor | None, paired: bool
) -> tuple[int, int]:
    """The columns of a layer's panels, and the bytes of all of these."""
    parts = 2 if paired else 1
    columns = parts * -(-out_features // parts // COLUMNS) * COLUMNS
    if kind is Weights.INT8:
        return columns, columns * -(-in_features // _TURNED) * _TURNED
    if kind in _BLOCK_BITS:
        return columns, columns // COLUMNS * _panel_bytes(kind, in_features)
    if places is not None:
        kinds = places[:, 1]
        if len(kinds) != columns // COLUMNS or not torch.equal(places, _places(kinds, in_features)):
            raise ValueError("panels of mixed weights follow each other, and these do not")
        return columns, sum(_panel_bytes(Weights(each), in_features) for each in kinds.tolist())
    return columns, columns * in_features * (4 if kind is Weights.F32 else 2)


def can_pack(weights: Sequence[Tensor], precision: Precision) -> bool:
    """Whether the kernels can take these weights [out, in]."""
    if precision == "int8":
        return all(w.shape[1] <= _MOST_IN_BYTES for w in weights)
    if precision == "int4":
        return all(w.shape[1] % INPUTS == 0 for w in weights)
    return all(w.dtype is torch.float32 or w.shape[1] % DEPTH == 0 for w in weights)


def can_pack_blocks(blocks: Sequence[Blocks], *, paired: bool) -> bool:
    """Whether these can be the outputs of one layer: blocks of several kinds share no panel."""
    if paired or len({each.kind for each in blocks}) == 1:
        return True
    return all(len(each.scale) % COLUMNS == 0 for each in blocks[:-1])


def _panel_bytes(kind: Weights, in_features: int) -> int:
    return COLUMNS * in_features // INPUTS * _BLOCK_BITS[kind] // 8


def _places(kinds: Tensor, in_features: int) -> Tensor:
    """int64 [panels, 2]: where panels of these kinds begin that follow each other, and the kinds."""
    sizes = torch.tensor([_panel_bytes(Weights(kind), in_features) for kind in kinds.tolist()])
    return torch.stack((sizes.cumsum(0) - sizes, kinds), dim=1)


def _block_panels(blocks: Blocks, paired: bool) -> Tensor:
    """uint8 [panels, bytes], as blocks.h reads them."""
    numbers = _columns(blocks.unpacked(), paired)
    count = numbers.shape[2] // INPUTS
    # [panels, in / 32, 8, 16 columns, 4 inputs]
    laid = numbers.view(-1, COLUMNS, count, 8, 4).permute(0, 2, 3, 1, 4)
    if blocks.bits == 4:
        laid = _in_fours(laid)
    elif blocks.bits == 8:
        laid = laid.view(torch.uint8) ^ 128
    else:
        laid = (laid + 32).view(torch.uint8)
        high = [laid[:, :, i::4] >> 4 << 2 * i for i in range(4)]
        laid = torch.cat((_in_fours(laid & 15), high[0] | high[1] | high[2] | high[3]), dim=2)
    factors = [x for x in (blocks.scale, blocks.least) if x is not None]
    shared = [_columns(x, paired).transpose(1, 2).contiguous().view(torch.uint8) for x in factors]
    if blocks.scale_steps is None:
        return torch.cat((*shared, laid.flatten(2)), dim=2).flatten(1)
    steps = [_columns(x, paired) for x in (blocks.scale_steps, blocks.least_steps) if x is not None]
    beside = [
        x.view(*x.shape[:2], count, -1).permute(0, 2, 3, 1).flatten(2).contiguous().view(torch.uint8)
        for x in steps
    ]
    own = torch.cat((*beside, laid.flatten(2)), dim=2)  # of each 32 inputs
    return torch.cat((*shared, own.view(len(own), shared[0].shape[1], -1)), dim=2).flatten(1)


def _in_fours(laid: Tensor) -> Tensor:
    """Numbers of 4 bits, [panels, n, 8, ...] -> [panels, n, 4, ...], two in a byte."""
    return laid[:, :, ::2] | (laid[:, :, 1::2] << 4)


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
