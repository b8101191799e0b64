"""Weights as a `.gguf` keeps them: blocks of 32 inputs that share a scale, in 4 or 8 bits each.

A converted model's folder holds them beside the bfloat16 weights that were made of them.
"""

from collections.abc import Mapping
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

INPUTS = 32
_FILE = Path("blocks") / "model.safetensors"  # not beside the weights, of which it is no part

_KINDS = {"Q4_0": (1, 16), "Q4_1": (2, 16), "Q8_0": (1, 32)}
"""A block's halves, of scale and least number, and the bytes of its numbers."""

Bits = Literal[4, 8]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight [out, in] in blocks: scale * number, and `least` with it in 4 bits.

    scale, least: float16 [out, in / 32]; numbers: int8 [out, in], or uint8 [out, in / 2], two in a byte, the
    first in its low half.
    """

    numbers: Tensor
    scale: Tensor
    least: Tensor | None

    @property
    def bits(self) -> Bits:
        return 8 if self.least is None else 4

    @classmethod
    def rounded(cls, weight: Tensor, bits: Bits) -> "Blocks":
        """weight [out, in] in that many bits, as ggml rounds to Q4_1 and Q8_0; in is a multiple of 32."""
        from gguf import GGMLQuantizationType  # only where something is packed: its imports take their time
        from gguf.quants import quantize

        kind = GGMLQuantizationType.Q4_1 if bits == 4 else GGMLQuantizationType.Q8_0
        blocks = _read(quantize(weight.detach().float().numpy(), kind), kind)
        assert blocks is not None
        return blocks

    def in_order(self, rows: NDArray[np.int64]) -> "Blocks":
        least = None if self.least is None else self.least[rows]
        return Blocks(self.numbers[rows], self.scale[rows], least)

    def unpacked(self) -> Tensor:
        """The numbers [out, in], each in a byte."""
        if self.bits == 8:
            return self.numbers
        return torch.stack((self.numbers & 15, self.numbers >> 4), dim=-1).flatten(1)

    def widened(self) -> Tensor:
        """The weight in bfloat16, as a conversion rounds it."""
        wide = self.unpacked().view(*self.scale.shape, INPUTS).float() * self.scale.float()[..., None]
        if self.least is not None:
            wide += self.least.float()[..., None]
        return wide.flatten(1).bfloat16()


def save_blocks(blocks: Mapping[str, Blocks], folder: Path) -> None:
    """Into a model's folder, by the names of its parameters; nothing if there are none."""
    if not blocks:
        return
    parts = {
        f"{name}.{part}": tensor.contiguous()
        for name, its in blocks.items()
        for part in Blocks.__slots__
        if (tensor := getattr(its, part)) is not None
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
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        names = {name.rpartition(".")[0] for name in parts}
        return {
            name: Blocks(parts[f"{name}.numbers"], parts[f"{name}.scale"], parts.get(f"{name}.least"))
            for name in names
        }
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelNotFoundError(
            f"{path} cannot be read as a model's blocks of 4 and 8 bits ({error}): it is "
            f"damaged; if a .gguf file was converted into it, remove the folder "
            f"{folder}, and the next start converts it again"
        ) from error


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
    halves, size = _KINDS.get(kind.name, (0, 0))
    if not size or data.ndim != 2:
        return None
    blocks = torch.from_numpy(data.copy()).view(len(data), -1, 2 * halves + size)
    scale, *least = blocks[..., : 2 * halves].contiguous().view(torch.float16).unbind(-1)
    numbers = blocks[..., 2 * halves :].contiguous()
    if size == INPUTS:
        return Blocks(numbers.view(torch.int8).flatten(1), scale.contiguous(), None)
    inputs = torch.cat((numbers & 15, numbers >> 4), dim=-1)  # a block's first half is in the low bits
    packed = inputs[..., ::2] | (inputs[..., 1::2] << 4)
    return Blocks(packed.flatten(1), scale.contiguous(), least[0].contiguous() if least else -8 * scale)
