"""What the kernels' tests compare, and how near."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

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

_BELOW = [
    kind for needs, kind in (("avx512f", "x86-64-v3"), ("avx2", "x86-64-v2")) if needs in instructions()
]
LESSER = [pytest.param(kind, marks=[pytest.mark.long] if i else []) for i, kind in enumerate(_BELOW)]
"""CPUs with fewer instructions than this one, whose code nothing else runs here: AVX2, then SSE."""

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
