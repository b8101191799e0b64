"""Weights as a `.gguf` keeps them: blocks of 32 or 16 inputs that share a scale, in 4, 6 or 8 bits each.

A converted model's folder holds them beside the bfloat16 weights that were made of them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prad.lm.errors import ModelNotFoundError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader

INPUTS, TOGETHER = 32, 256
"""Of a block; and those that share what its scale is a multiple of, where blocks have such."""

_FILE = Path("blocks") / "model.safetensors"  # not beside the weights, of which it is no part

_KINDS = {"Q4_0": (1, 16), "Q4_1": (2, 16), "Q8_0": (1, 32)}
"""A block's halves, of scale and least number, and the bytes of its numbers."""

_STEPS = 12
"""Bytes of the steps of Q4_K's blocks: eight for scales and eight for least numbers, of 6 bits."""

Bits = Literal[4, 8]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight [out, in] in blocks: scale * number, and `least` with it in 4 bits.

    scale, least: float16 [out, in / 32]; numbers: int8 [out, in], or uint8 [out, in / 2], two in a byte, the
    first in its low half. Where there are steps, scale and least are of 256 inputs, [out, in / 256], and a
    block's are so many times that: int8 [out, in / 32] in 4 bits, [out, in / 16] in 6, which have no least.
    """

    numbers: Tensor
    scale: Tensor
    least: Tensor | None = None
    scale_steps: Tensor | None = None
    least_steps: Tensor | None = None

    @property
    def bits(self) -> Literal[4, 6, 8]:
        if self.least is not None:
            return 4
        return 8 if self.scale_steps is None else 6

    @property
    def kind(self) -> tuple[int, bool]:
        """What blocks have alike that can be `joined`."""
        return self.bits, self.scale_steps is not None

    @classmethod
    def rounded(cls, weight: Tensor, bits: Bits) -> "Blocks":
        """weight [out, in] in that many bits, as ggml rounds to Q4_1 and Q8_0; in is a multiple of 32."""
        from gguf import GGMLQuantizationType  # only where something is packed: its imports take their time
        from gguf.quants import quantize

        kind = GGMLQuantizationType.Q4_1 if bits == 4 else GGMLQuantizationType.Q8_0
        blocks = _read(quantize(weight.detach().float().numpy(), kind), kind)
        assert blocks is not None
        return blocks

    @classmethod
    def joined(cls, several: Sequence["Blocks"]) -> "Blocks":
        """The outputs of several of a kind in turn."""
        return several[0]._with(lambda name: torch.cat([getattr(each, name) for each in several]))

    def in_order(self, rows: NDArray[np.int64]) -> "Blocks":
        return self._with(lambda name: getattr(self, name)[rows])

    def parts(self) -> dict[str, Tensor]:
        every = {name: getattr(self, name) for name in self.__slots__}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    def _with(self, part: Callable[[str], Tensor]) -> "Blocks":
        return Blocks(**{name: part(name) for name in self.parts()})

    def unpacked(self) -> Tensor:
        """The numbers [out, in], each in a byte."""
        if self.bits != 4:
            return self.numbers
        return torch.stack((self.numbers & 15, self.numbers >> 4), dim=-1).flatten(1)

    def widened(self) -> Tensor:
        """The weight in bfloat16, as a conversion rounds it."""
        scale = _stepped(self.scale, self.scale_steps)
        wide = self.unpacked().view(*scale.shape, -1).float() * scale[..., None]
        if self.least is not None:
            wide += _stepped(self.least, self.least_steps)[..., None]
        return wide.flatten(1).bfloat16()


def _stepped(shared: Tensor, steps: Tensor | None) -> Tensor:
    """Of each block, in float32, which holds the products exactly."""
    if steps is None:
        return shared.float()
    return (shared.float()[..., None] * steps.float().view(*shared.shape, -1)).flatten(1)


def save_blocks(blocks: Mapping[str, Blocks], folder: Path) -> None:
    """Into a model's folder, by the names of its parameters; nothing if there are none."""
    if not blocks:
        return
    parts = {
        f"{name}.{part}": tensor.contiguous()
        for name, its in blocks.items()
        for part, tensor in its.parts().items()
    }
    (folder / _FILE).parent.mkdir()
    save_file(parts, folder / _FILE)


def load_blocks(folder: Path) -> dict[str, Blocks]:
    """By the names of parameters; none if the folder was not converted from blocks. Raises ModelNotFoundError
    if they cannot be read."""
    path = folder / _FILE
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            parts = defaultdict[str, dict[str, Tensor]](dict)
            for stored in file.keys():  # noqa: SIM118 (it is no dict)
                name, _, part = stored.rpartition(".")
                parts[name][part] = file.get_tensor(stored)
        return {name: Blocks(**own) for name, own in parts.items()}
    except (OSError, SafetensorError, TypeError) as error:
        raise ModelNotFoundError(
            f"{path} cannot be read as a model's blocks of 4 to 8 bits ({error}): it is "
            f"damaged; if a .gguf file was converted into it, remove the folder "
            f"{folder}, and the next start converts it again"
        ) from error


def share_in_blocks(folder: Path) -> float:
    """Of the numbers in a model's matrices, 0 to 1: what its folder has in blocks, too."""
    shapes = _shapes(folder)
    blocks = {name.removesuffix(".scale") for name in _shapes((folder / _FILE).parent)}
    own = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name in blocks)
    return own / max(1, sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2))


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Of the tensors in its files."""
    found: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found


def blocks_of(
    reader: "GGUFReader", model: Any, places: Mapping[str, str], processor: Any
) -> dict[str, Blocks]:
    """Of a converted model, for each parameter whose blocks in the file are exactly what was converted.

    places: parameters by the file's names; `processor`: transformers', which puts some rows in another order.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for tensor in reader.tensors:
        name = places[tensor.name]
        blocks = _read(tensor.data, tensor.tensor_type)
        if blocks is None or name not in parameters:
            continue
        blocks = blocks.in_order(_order(processor, tensor.name, len(blocks.scale)))
        if torch.equal(blocks.widened(), parameters[name].data):
            found[name] = blocks
    return found


def _order(processor: Any, name: str, rows: int) -> NDArray[np.int64]:
    """Where each row of the model lies in the file; as they come if transformers does more than reorder."""
    here = np.arange(rows)
    try:
        # some of its classes put what they make in there, too
        placed = processor.process(
            weights=here[:, None], name=name, parsed_parameters={"tensors": {}}
        ).weights
    except (KeyError, TypeError, ValueError):
        return here
    return placed[:, 0] if np.shape(placed) == (rows, 1) else here


def _read(data: NDArray[np.uint8], kind: "GGMLQuantizationType") -> Blocks | None:
    """data [out, bytes], as files keep it; None for what has no blocks, or blocks of another kind."""
    if data.ndim != 2:
        return None
    rows = torch.from_numpy(data.copy())
    if kind.name == "Q4_K":
        return _read_steps_of_four(rows)
    if kind.name == "Q6_K":
        return _read_steps_of_six(rows)
    if kind.name not in _KINDS:
        return None
    halves, size = _KINDS[kind.name]
    factors, numbers = rows.view(len(rows), -1, 2 * halves + size).split_with_sizes(
        (2 * halves, size), dim=-1
    )
    scale, *least = _halves(factors)
    if size == INPUTS:
        return Blocks(numbers.contiguous().view(torch.int8).flatten(1), scale)
    # a block's first half is in the low bits
    return Blocks(_in_pairs(numbers & 15, numbers >> 4), scale, least[0] if least else -8 * scale)


def _read_steps_of_four(rows: Tensor) -> Blocks:
    """Of 256 inputs: scale, least, the blocks' steps, and numbers, of every two blocks in a byte."""
    halves, packed, numbers = rows.view(len(rows), -1, 4 + _STEPS + TOGETHER // 2).split_with_sizes(
        (4, _STEPS, TOGETHER // 2), dim=-1
    )
    scale, least = _halves(halves)
    # of the first four blocks in 6 bits of a byte; of the others in 4, and in the 2 that those leave
    scales, leasts, others = packed.view(*packed.shape[:-1], 3, 4).unbind(-2)
    scale_steps = torch.cat((scales & 63, others & 15 | scales >> 6 << 4), dim=-1)
    least_steps = torch.cat((leasts & 63, others >> 4 | leasts >> 6 << 4), dim=-1)
    numbers = numbers.view(*numbers.shape[:-1], -1, INPUTS)
    return Blocks(
        _in_pairs(numbers & 15, numbers >> 4),
        scale,
        -least,
        scale_steps.flatten(1).view(torch.int8),
        least_steps.flatten(1).view(torch.int8),
    )


def _read_steps_of_six(rows: Tensor) -> Blocks:
    """Of 256 inputs: the numbers' low 4 bits and high 2, the blocks' steps, and a scale. 32 is added to all
    numbers; of every 128 half share a byte, and four times 32 the high ones."""
    low, high, steps, halves = rows.view(len(rows), -1, TOGETHER * 3 // 4 + 18).split_with_sizes(
        (TOGETHER // 2, TOGETHER // 4, 16, 2), dim=-1
    )
    low, high = (x.view(*x.shape[:-1], 2, -1) for x in (low, high))
    numbers = torch.cat((low & 15, low >> 4), dim=-1)
    numbers |= torch.cat([high >> shift << 4 & 48 for shift in (0, 2, 4, 6)], dim=-1)
    (scale,) = _halves(halves)
    return Blocks(
        numbers.flatten(1).view(torch.int8) - 32, scale, scale_steps=steps.flatten(1).view(torch.int8)
    )


def _halves(stored: Tensor) -> tuple[Tensor, ...]:
    """Bytes [..., 2 n] as n tensors of float16."""
    return tuple(each.contiguous() for each in stored.contiguous().view(torch.float16).unbind(-1))


def _in_pairs(first: Tensor, second: Tensor) -> Tensor:
    """Numbers of 4 bits, first and second [out, blocks, n], in the order [out, blocks, first and second]: two
    in a byte."""
    inputs = torch.cat((first, second), dim=-1)
    return (inputs[..., ::2] | (inputs[..., 1::2] << 4)).flatten(1)
