"""Products of rows and packed weights, against the same written out in torch around the edges of tiles."""

import ctypes
import mmap

import pytest
import torch
from near import ACTIVATIONS, DTYPES, EACH_KIND, ROWS, assert_near, some
from torch import Tensor

from prad.lm.blocks import Blocks
from prad.lm.kernels import Activation, HugePages, Kernels, Out, PackedLinear, Precision
from prad.lm.kernels.build import built
from tests.cache import CACHE

SIZES = ((48, 64), (50, 96), (96, 32), (720, 160))  # columns: whole panels or not, an odd number of them
ODD = ((1, 1), (40, 17), (33, 77))  # inputs, too: float32 alone has them
CASES = [*((dtype, *size) for dtype in DTYPES for size in SIZES), *((torch.float32, *size) for size in ODD)]


@EACH_KIND
@pytest.mark.parametrize(("dtype", "columns", "depth"), CASES)
@pytest.mark.parametrize("rows", ROWS)
def test_linear(kernels: Kernels, dtype: torch.dtype, columns: int, depth: int, rows: int) -> None:
    x, weight, bias = some(rows, depth, dtype=dtype), some(columns, depth, dtype=dtype, seed=1), some(columns)
    expected = x.float() @ weight.float().T + bias
    packed = PackedLinear.of(weight, bias)
    out = torch.full((rows + 1, columns), 7.0, dtype=dtype)
    kernels.linear(packed, x, out[:rows], Out.STORE)
    assert_near(out[:rows], expected, DTYPES[dtype])
    assert (out[rows] == 7).all(), "a row beyond the batch was written"
    summed = some(rows, columns, seed=2)
    before = summed.clone()
    kernels.linear(packed, x, summed, Out.ADD)
    assert_near(summed, before + expected, 1e-5)  # products of bfloat16 are exact in float32
    wide = torch.full((rows + 1, columns), 7.0)
    kernels.linear(packed, x, wide[:rows], Out.WIDE)
    assert_near(wide[:rows], expected, 1e-5)
    assert (wide[rows] == 7).all(), "a row beyond the batch was written"


@EACH_KIND
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(dtype, "full") for dtype in DTYPES] + [(torch.bfloat16, p) for p in ("int8", "int4")],
)
@pytest.mark.parametrize("depth", [96, 4128])  # more inputs than are taken at once, too
def test_a_row_has_the_same_products_alone_and_in_any_batch(
    kernels: Kernels, depth: int, dtype: torch.dtype, precision: Precision
) -> None:
    """Bit for bit: what is drawn must not depend on who else is served."""
    x, weight = some(300, depth, dtype=dtype), some(336, depth, dtype=dtype, seed=1)
    if precision == "int4":
        packed = PackedLinear.of_blocks([Blocks.rounded(weight, 4)])
    else:
        packed = PackedLinear.of(weight, precision=precision)
    alone = torch.cat([_wide(kernels, packed, row[None]) for row in x])
    for rows in (*range(2, 28), *ROWS[7:]):
        assert torch.equal(_wide(kernels, packed, x[:rows]), alone[:rows]), rows
        assert torch.equal(_wide(kernels, packed, x[-rows:]), alone[-rows:]), rows


class _BesideNothing(HugePages):
    """Room for one tensor between pages that nobody may read, at the first byte behind one or the last before
    the other: who reads beside the tensor is ended by the system."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self._last = last

    def copied(self, tensor: Tensor) -> Tensor:
        page, size = mmap.PAGESIZE, tensor.nbytes
        room = -(-size // page) * page
        whole = torch.frombuffer(mmap.mmap(-1, page + room + page), dtype=torch.uint8)
        begin = page + (room - size if self._last else 0)
        placed = whole[begin : begin + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        forbid = ctypes.CDLL(None, use_errno=True).mprotect
        for guard in (0, page + room):
            failed = forbid(ctypes.c_void_p(whole.data_ptr() + guard), ctypes.c_size_t(page), 0)
            assert not failed, ctypes.get_errno()
        return placed


@EACH_KIND
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(dtype, "full") for dtype in DTYPES] + [(torch.bfloat16, p) for p in ("int8", "int4")],
)
@pytest.mark.parametrize("last", [False, True])
def test_nothing_is_read_beside_the_weights(
    kernels: Kernels, last: bool, dtype: torch.dtype, precision: Precision
) -> None:
    def packed(memory: HugePages | None) -> PackedLinear:
        weight = some(80, 96, dtype=dtype)
        if precision == "int4":
            return PackedLinear.of_blocks([Blocks.rounded(weight, 4)], memory=memory)
        return PackedLinear.of(weight, precision=precision, memory=memory)

    guarded, plain = packed(_BesideNothing(last=last)), packed(None)
    for rows in ROWS:
        x = some(rows, 96, dtype=dtype)
        assert torch.equal(_wide(kernels, guarded, x), _wide(kernels, plain, x)), rows


def _wide(kernels: Kernels, packed: PackedLinear, x: Tensor) -> Tensor:
    out = torch.empty(len(x), packed.struct.out_features)
    kernels.linear(packed, x, out, Out.WIDE)
    return out


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("rows", [3, 32, 65])
def test_gated_linear(kernels: Kernels, dtype: torch.dtype, activation: Activation, rows: int) -> None:
    x, weight, bias = some(rows, 64, dtype=dtype), some(2 * 40, 64, dtype=dtype, seed=1), some(80)
    gate, up = (x.float() @ weight.float().T + bias).chunk(2, dim=1)
    packed = PackedLinear.of(weight, bias, paired=True)
    both = torch.empty(rows, 80, dtype=dtype)
    kernels.linear(packed, x, both, Out.STORE)
    assert_near(both, torch.cat((gate, up), dim=1), DTYPES[dtype])
    if activation is not Activation.NONE:
        inner = torch.empty(rows, 40, dtype=dtype)
        kernels.linear(packed, x, inner, Out.GATED, activation)
        assert_near(inner, ACTIVATIONS[activation](gate) * up, DTYPES[dtype])


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 20, 65])
def test_what_is_not_finite_spoils_its_own_row(kernels: Kernels, dtype: torch.dtype, rows: int) -> None:
    x, packed = some(rows, 96, dtype=dtype), PackedLinear.of(some(80, 96, dtype=dtype, seed=1))
    before, others = _wide(kernels, packed, x), torch.arange(rows) != rows // 2
    for value in (torch.nan, torch.inf, -torch.inf):
        x[rows // 2, -2:] = value
        after = _wide(kernels, packed, x)
        assert not after[rows // 2].isfinite().any()
        assert torch.equal(after[others], before[others])


@EACH_KIND
@pytest.mark.usefixtures("denormals")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_least_numbers_are_next_to_nothing(kernels: Kernels, dtype: torch.dtype) -> None:
    """Some instructions take denormals for zeros."""
    x, weight = some(9, 64, dtype=dtype), some(40, 64, dtype=dtype, seed=1)
    x[:3], x[3, 1:] = 1e-40, -1e-39
    weight[7] = 1e-40
    found = _wide(kernels, PackedLinear.of(weight), x)
    assert found[:3].abs().max() < 1e-36
    assert_near(found, x.float() @ weight.float().T, 1e-5)
    assert found[:, 7].abs().max() < 1e-36


def test_one_thread_equals_two() -> None:
    x, packed = some(70, 64), PackedLinear.of(some(480, 64, seed=1))
    results = []
    for threads in (1, 2, 3):
        out = torch.empty(70, 480)
        Kernels(built(CACHE), threads).linear(packed, x, out, Out.STORE)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
