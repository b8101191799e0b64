"""Layers of 8-bit weights: the same integers by any CPU's instructions, and numbers at the edges."""

from collections.abc import Callable

import pytest
import torch
from near import EACH_KIND, LESSER, ROWS, assert_near, some, wide
from near import by_bytes as products

from prad.lm.kernels import Activation, Kernels, Out, PackedLinear

SIZES = ((1, 1), (16, 63), (17, 64), (40, 65), (80, 96), (336, 576), (50, 4161))  # columns, inputs
EDGES = (1, 2, 4, 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 63, 64, 65)


@pytest.mark.parametrize(("columns", "depth"), SIZES)
def test_sums_are_those_of_whole_numbers(kernels: Kernels, columns: int, depth: int) -> None:
    """Bit for bit what numpy computes, in every number of rows."""
    x, weight = some(65, depth, dtype=torch.bfloat16), some(columns, depth, dtype=torch.bfloat16, seed=1)
    expected, packed = products(x, weight), PackedLinear.of(weight, precision="int8")
    for rows in EDGES:
        assert torch.equal(wide(kernels, packed, x[:rows]), expected[:rows]), rows


@pytest.mark.parametrize("kind", LESSER)
def test_a_cpu_without_dot_products_has_the_same_bits(
    kernels: Kernels, kernels_of: Callable[[str], Kernels], kind: str
) -> None:
    plain = kernels_of(kind)
    for columns, depth in SIZES:
        x, weight = some(65, depth, dtype=torch.bfloat16), some(columns, depth, dtype=torch.bfloat16, seed=1)
        packed = PackedLinear.of(weight, precision="int8")
        expected = wide(kernels, packed, x)
        for rows in EDGES:
            assert torch.equal(wide(plain, packed, x[:rows]), expected[:rows]), (columns, depth, rows)


@EACH_KIND
def test_the_largest_products(kernels: Kernels) -> None:
    """One input of 64, turned, is 64 numbers of one size: all of them 127 or -127, in rows and weights."""
    signs = torch.tensor([1, -1]).bfloat16()
    x, weight = torch.zeros(2, 64).bfloat16(), torch.zeros(2, 64).bfloat16()
    x[:, 0] = weight[:, 0] = signs
    expected = products(x, weight)
    assert_near(expected, x.float() @ weight.float().T, 1e-6)
    assert torch.equal(wide(kernels, PackedLinear.of(weight, precision="int8"), x), expected)


@pytest.mark.parametrize("rows", ROWS)
def test_what_becomes_of_the_products(kernels: Kernels, rows: int) -> None:
    x, weight = some(rows, 96, dtype=torch.bfloat16), some(80, 96, dtype=torch.bfloat16, seed=1)
    bias = some(80, seed=2)
    packed = PackedLinear.of(weight, bias, precision="int8")
    expected = products(x, weight) + bias
    exact = x.float() @ weight.float().T + bias
    assert_near(expected, exact, 0.03)
    assert not torch.allclose(expected, exact, atol=1e-3), "nothing was rounded"
    assert_near(wide(kernels, packed, x), expected, 1e-6)
    added = torch.ones(rows, 80)
    kernels.linear(packed, x, added, Out.ADD)
    assert_near(added, 1 + expected, 1e-6)
    stored = torch.empty(rows, 80, dtype=torch.bfloat16)
    kernels.linear(packed, x, stored, Out.STORE)
    assert torch.equal(stored, wide(kernels, packed, x).bfloat16())
    pairs = PackedLinear.of(weight, bias, precision="int8", paired=True)
    inner = torch.empty(rows, 40, dtype=torch.bfloat16)
    kernels.linear(pairs, x, inner, Out.GATED, Activation.RELU)
    gate, up = expected.chunk(2, dim=1)
    assert_near(inner, gate.relu() * up, 8e-3)
    assert torch.equal(wide(kernels, pairs, x), wide(kernels, packed, x))


def test_rows_lie_anywhere(kernels: Kernels) -> None:
    """An odd number of elements from one to the next, NaN beside them."""
    beside = torch.full((9, 105), torch.nan, dtype=torch.bfloat16)
    x = beside[:, 3:99]
    x.copy_(some(9, 96))
    packed = PackedLinear.of(some(80, 96, dtype=torch.bfloat16, seed=1), precision="int8")
    assert torch.equal(wide(kernels, packed, x), wide(kernels, packed, x.contiguous()))


@pytest.mark.usefixtures("denormals")
def test_zeros_and_the_least_numbers(kernels: Kernels) -> None:
    """They are next to nothing, and never NaN."""
    x, weight = torch.zeros(6, 70, dtype=torch.bfloat16), some(33, 70, dtype=torch.bfloat16, seed=1)
    x[1] = 1e-40
    x[2, 5] = -1e-39
    x[3], x[3, 0] = 1e-40, 2.0
    x[4] = 1e-25
    packed = PackedLinear.of(weight, precision="int8")
    found = wide(kernels, packed, x)
    assert (found[[0, 5]] == 0).all()
    assert found[1:3].abs().max() < 1e-30
    assert_near(found[3], 2 * weight[:, 0], 0.03)
    assert_near(found[4], (x[4].float() * weight.float()).sum(1), 0.03)
    nothing = PackedLinear.of(torch.zeros(33, 70, dtype=torch.bfloat16), precision="int8")
    assert (wide(kernels, nothing, x) == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("rows", [1, 7, 20])
def test_what_is_not_finite_spoils_its_own_row(kernels: Kernels, rows: int, value: float) -> None:
    """The largest numbers as well: sums of 64 of them are none."""
    x, weight = some(rows, 96, dtype=torch.bfloat16), some(80, 96, dtype=torch.bfloat16, seed=1)
    packed = PackedLinear.of(weight, precision="int8")
    before = wide(kernels, packed, x)
    x[rows // 2, -2:] = value
    after = wide(kernels, packed, x)
    assert after[rows // 2].isnan().all()
    others = torch.arange(rows) != rows // 2
    assert torch.equal(after[others], before[others])
