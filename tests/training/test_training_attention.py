"""The training step's attention and its gradient equal those of attention over each sequence alone."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prad.lm import Ragged
from prad.training.attention import TrainingKV

LENGTHS = [1, 31, 32, 33, 5, 70, 2]


def one_by_one(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True):
        at = torch.arange(len(q))
        distance = at[:, None] - at
        seen = (distance >= 0) & (distance < (window or len(q)))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient(window: int | None, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def states(count: int, dim: int) -> Tensor:
        x = torch.randn(sum(LENGTHS), count, dim, generator=generator).to(dtype)
        return x.requires_grad_()

    query, key, value = states(heads, 8), states(kv_heads, 8), states(kv_heads, 12)
    weights = torch.randn(sum(LENGTHS), heads, 12, generator=generator)
    found = TrainingKV(Ragged.of(LENGTHS)).attend(0, query, key, value, 0.3, window)
    assert found.dtype is dtype
    gradients = torch.autograd.grad((found.float() * weights).sum(), (query, key, value))

    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected = one_by_one(*exact, 0.3, window)
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    for one, other in zip(gradients, wanted, strict=True):
        assert one.dtype is dtype
        torch.testing.assert_close(one.double(), other, **tolerance)


def test_a_neighbour_changes_nothing() -> None:
    """Rows of another sequence, NaN included, reach neither a sequence's output nor its gradient."""
    ragged, states = Ragged.of([5, 7]), [torch.randn(12, 2, 4) for _ in range(3)]

    def run(last: float) -> tuple[Tensor, ...]:
        leaves = [torch.cat([x[:5], torch.full((7, 2, 4), last)]).requires_grad_() for x in states]
        out = TrainingKV(ragged).attend(0, *leaves, 0.5, None)  # type: ignore[arg-type]
        return (out[:5], *torch.autograd.grad(out[:5].sum(), leaves))

    for one, other in zip(run(1.0), run(torch.nan), strict=True):
        assert torch.equal(one[:5], other[:5])
