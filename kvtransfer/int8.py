"""Keys and values as 8-bit numbers on the wire: one scale per token and head, half the bytes of bf16.

x is about q * scale with scale = max|x| / 127 over a head's elements, so no element is off by more than
scale / 2 before it is rounded to the model's dtype. What is not finite stays not finite. The only module here
that knows torch; both services use it, nothing else in this package does.
"""

from typing import Any

import torch
from torch import Tensor

_LARGEST = 127


def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """states [T, heads, dim] -> int8 [T, heads, dim] and float32 scales [T, heads]."""
    wide = states.float()
    scale = wide.abs().amax(dim=-1, keepdim=True) / _LARGEST
    steps = wide / scale.clamp(min=torch.finfo(torch.float32).tiny)
    return steps.round_().to(torch.int8), scale.squeeze(-1)


def dequantise(
    data: memoryview, scales: memoryview, shape: tuple[int, int], dtype: torch.dtype
) -> memoryview:
    """The planes of `quantise` -> raw bytes [T, heads, dim] of `dtype`. shape: heads and dim."""
    steps = torch.frombuffer(bytearray(data), dtype=torch.int8).view(-1, *shape)
    scale = torch.frombuffer(bytearray(scales), dtype=torch.float32).view(-1, shape[0], 1)
    raw: Any = (steps * scale).to(dtype).view(torch.uint8).numpy()
    return memoryview(raw).cast("B")
