"""What the kernels' tests compare, and how near."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from prad.lm.blocks import Blocks
from prad.lm.kernels import Activation, Kernels, Out, PackedLinear
from prad.lm.kernels.cpus import instructions

ROWS = (1, 5, 6, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 257)
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # tolerance, of the largest result
ACTIVATIONS = {
    Activation.NONE: lambda x: x,
    Activation.SILU: silu,
    Activation.GELU_TANH: lambda x: gelu(x, approximate="tanh"),
    Activation.RELU: relu,
}

Floats = NDArray[np.float32]
_BELOW = [
    kind for needs, kind in (("avx512f", "x86-64-v3"), ("avx2", "x86-64-v2")) if needs in instructions()
]
LESSER = [pytest.param(kind, marks=[pytest.mark.long] if kind == "x86-64-v2" else []) for kind in _BELOW]
"""CPUs with fewer instructions than this one, whose code nothing else runs here: AVX2; SSE, whose code takes
minutes to compile, in the long tests."""

EACH_KIND = pytest.mark.parametrize("kernels", ["own", *LESSER], indirect=True)


def each_kind(argument: str, values: Sequence[object], few: Sequence[object]) -> pytest.MarkDecorator:
    """With all values by this CPU's kernels, with few by a lesser one's."""
    own = [("own", value) for value in values]
    lesser = [pytest.param(*kind.values, value, marks=kind.marks) for kind in LESSER for value in few]
    return pytest.mark.parametrize(("kernels", argument), [*own, *lesser], indirect=["kernels"])


def assert_near(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        ours.float(), expected.float(), rtol=0, atol=tolerance * float(expected.abs().max())
    )


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(kernels: Kernels, packed: PackedLinear, x: Tensor) -> Tensor:
    out = torch.full((len(x) + 1, packed.struct.out_features), 7.0)
    kernels.linear(packed, x, out[:-1], Out.WIDE)
    assert (out[-1] == 7).all(), "a row beyond the batch was written"
    return out[:-1]


def turned(x: Floats) -> Floats:
    """[n, in] times the Hadamard matrix of every 64, zeros behind the inputs; summed as the kernels do."""
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % 64)))
    for distance in (1, 2, 4, 8, 16, 32):
        pairs = x.reshape(len(x), -1, 2, distance)
        left, right = pairs[:, :, 0], pairs[:, :, 1]
        x = np.stack((left + right, left - right), axis=2).reshape(len(x), -1)
    return x


def by_bytes(x: Tensor, weight: Tensor) -> Tensor:
    """What bytes.h and weights.py say, written out: rounded rows by rounded weights, in whole numbers."""
    rows, columns = turned(x.float().numpy()), turned(weight.float().numpy() / np.float32(64))
    largest = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.float32(2.0**-100))
    steps = np.rint(rows * (np.float32(127) / largest)).astype(np.int64)
    scales = np.maximum(np.abs(columns).max(axis=1) / np.float32(127), np.float32(1e-12))
    whole = np.rint(columns / scales[:, None]).astype(np.int64)
    sums = (steps @ whole.T).astype(np.float32)
    return torch.from_numpy(sums * (largest / np.float32(127) * scales))


def numbers(blocks: Blocks) -> Floats:
    """[out, in / 32, 32] in float32."""
    found = blocks.unpacked().unflatten(1, (-1, 32)).float() * blocks.scale.float()[..., None]
    found += 0 if blocks.least is None else blocks.least.float()[..., None]
    return found.numpy()


def by_blocks(x: Tensor, blocks: Blocks) -> Tensor:
    """What blocks.h says, written out: 32 inputs of a row share a scale, sums in float64."""
    rows = x.float().unflatten(1, (-1, 32)).numpy()
    largest = np.maximum(np.abs(rows).max(axis=2, keepdims=True), np.float32(2.0**-100))
    steps = np.rint(rows * (np.float32(127) / largest)) * (largest / np.float32(127)).astype(np.float64)
    weight = numbers(blocks).astype(np.float64)
    return torch.from_numpy(steps.reshape(len(x), -1) @ weight.reshape(len(weight), -1).T).float()
