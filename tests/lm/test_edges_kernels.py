"""What each row goes through alone, at the edges: any number of rows, NaN and denormals in some of them."""

from collections.abc import Callable

import pytest
import torch
from near import DTYPES, EACH_KIND, assert_near, some
from torch import Tensor
from torch.nn.functional import layer_norm, relu, silu

from prad.lm.kernels import Activation, Kernels, LowRankSpan, view_of

ROWS = (1, 5, 6, 7, 15, 16, 17, 63, 64, 65)
WIDTH, R = 38, 7
TINY = 1e-40
"""A denormal in float32 and in bfloat16."""

WEIGHT, BIAS = some(WIDTH, seed=1), some(WIDTH, seed=2)
DOWN, UP = some(1, WIDTH, R, seed=3) / 6, some(1, R, WIDTH, seed=4)

Operation = tuple[Callable[[Kernels, Tensor], Tensor], Callable[[Tensor], Tensor]]
"""What the kernels make of rows [n, WIDTH], and the same in float64."""


def activated(activation: Activation) -> Callable[[Kernels, Tensor], Tensor]:
    def ours(kernels: Kernels, x: Tensor) -> Tensor:
        out = torch.empty(len(x), WIDTH // 2, dtype=x.dtype)
        kernels.activate(x, out, activation)
        return out

    return ours


def normed(center: bool) -> Callable[[Kernels, Tensor], Tensor]:
    def ours(kernels: Kernels, x: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        kernels.norm(x.float(), WEIGHT, BIAS if center else None, center, 1e-5, out)
        return out

    return ours


def low_rank(kernels: Kernels, x: Tensor) -> Tensor:
    out, down, up = torch.zeros_like(x), DOWN.to(x.dtype), UP.to(x.dtype)
    span = LowRankSpan(start=0, stop=len(x), down=down, bias=None, up=up, r=R, factor=0.5)
    kernels.low_rank(out, x, (LowRankSpan * 1)(span), 0, True, x.dtype)
    return out


def scaled(kernels: Kernels, x: Tensor) -> Tensor:
    own, nothing = WEIGHT[None].to(x.dtype), torch.zeros(1, 1, dtype=torch.long)
    x, addresses = x.clone(), torch.full((1, len(x)), own.data_ptr())
    kernels.scale(x, 0, 0, view_of(nothing, nothing, addresses), x.dtype)
    return x


def affine(kernels: Kernels, x: Tensor) -> Tensor:
    gain, shift = (torch.tensor([vector.data_ptr()]) for vector in (WEIGHT, BIAS))
    x = x.clone()
    kernels.affine(x, torch.tensor([[0, len(x)]]), gain, shift, 0)
    return x


def mean(kernels: Kernels, x: Tensor) -> Tensor:
    """Of each row alone."""
    out = torch.empty(x.shape, dtype=x.dtype)
    kernels.mean(x, torch.arange(len(x))[:, None] + torch.arange(2), out)
    return out


def rotated(kernels: Kernels, x: Tensor) -> Tensor:
    """One head, by an angle of its own for each pair of inputs."""
    x, angles = x.clone(), BIAS[: WIDTH // 2].repeat(len(x), 2)
    kernels.rotate(x, 1, 1, WIDTH, angles.cos(), angles.sin(), None, 1e-6)
    return x


def rotated_there(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=1)
    cosine, sine = BIAS[: WIDTH // 2].double().cos(), BIAS[: WIDTH // 2].double().sin()
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=1)


def gated(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x[:, : WIDTH // 2]) * x[:, WIDTH // 2 :]


OPERATIONS: dict[str, Operation] = {
    "silu": (activated(Activation.SILU), gated(silu)),
    "relu": (activated(Activation.RELU), gated(relu)),
    "gelu": (
        activated(Activation.GELU_TANH),
        gated(lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ),
    "RMS norm": (
        normed(center=False),
        lambda x: x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt() * WEIGHT.double(),
    ),
    "layer norm": (
        normed(center=True),
        lambda x: layer_norm(x, (WIDTH,), WEIGHT.double(), BIAS.double(), 1e-5),
    ),
    "low rank": (low_rank, lambda x: 0.5 * relu(x @ DOWN[0].double()) @ UP[0].double()),
    "scale": (scaled, lambda x: x * (1 + WEIGHT.double())),
    "affine": (affine, lambda x: x * WEIGHT.double() + BIAS.double()),
    "mean": (mean, lambda x: x),
    "rotation": (rotated, rotated_there),
}


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.usefixtures("denormals")
def test_edges(kernels: Kernels, dtype: torch.dtype, operation: str) -> None:
    """NaN comes out where it must, and stays in its row; denormals are next to nothing, or zero."""
    ours, there = OPERATIONS[operation]
    for rows in ROWS:
        clean = some(rows, WIDTH, dtype=dtype, seed=rows)
        expected = ours(kernels, clean)
        assert_near(expected, there(clean.double()), 2 * DTYPES[dtype])
        x = clean.clone()
        x[1::4, 5] = torch.nan
        x[2::4] = TINY
        found, right = ours(kernels, x), there(x.double())
        assert torch.equal(found[0::4], expected[0::4])
        assert torch.equal(found[3::4], expected[3::4])
        assert torch.equal(found.isnan(), right.isnan())
        largest = float(there(clean.double()).abs().max())
        near = (found.double() - right).nan_to_num(0).abs().max()
        assert near <= 2 * DTYPES[dtype] * largest


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("denormals")
def test_edges_of_argmax(kernels: Kernels, dtype: torch.dtype) -> None:
    """A row of NaN has some id of the vocabulary, and others theirs."""
    for rows in ROWS:
        logits = some(rows, 50, dtype=dtype, seed=rows)
        right = logits.argmax(dim=1).tolist()
        assert kernels.argmax(logits) == right
        logits[1::4] = torch.nan
        found = kernels.argmax(logits)
        assert found[0::4] == right[0::4]
        assert found[2::4] == right[2::4]
        assert all(0 <= each < 50 for each in found)
