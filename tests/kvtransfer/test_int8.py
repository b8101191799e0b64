"""8-bit keys and values: close within half a step, half the bytes, and never hiding what is broken."""

import pytest
import torch

from kvtransfer.frames import Encoding, plane_bytes
from kvtransfer.int8 import dequantise, quantise
from prad.core.kv import KVLayout, LayerKV


def there_and_back(states: torch.Tensor) -> torch.Tensor:
    data, scales = (memoryview(part.view(torch.uint8).numpy()).cast("B") for part in quantise(states))
    raw = dequantise(data, scales, (states.shape[1], states.shape[2]), states.dtype)
    return torch.frombuffer(bytearray(raw), dtype=states.dtype).view(states.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_within_half_a_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    loud = 10 ** torch.empty(50, 3, 1).uniform_(-3, 3)
    states = (torch.randn(50, 3, 16) * loud).to(dtype)
    step = states.float().abs().amax(dim=-1, keepdim=True) / 127
    rounding = states.float().abs() * torch.finfo(dtype).eps
    error = (there_and_back(states).float() - states.float()).abs()
    assert (error <= 0.501 * step + rounding).all()
    assert (error > 0.3 * step).any(), "a test that cannot fail: the bound is far away"


def test_edges() -> None:
    states = torch.zeros(5, 2, 4)
    states[1, 0] = torch.tensor([1e-30, 0.0, -1e-30, 5e-31])
    states[2, 1, 3] = float("nan")
    states[3, 0, 0] = float("inf")
    back = there_and_back(states)
    assert (back[0] == 0).all()
    assert torch.allclose(back[1, 0], states[1, 0], rtol=0.01, atol=1e-32)
    for token, head in ((2, 1), (3, 0)):
        assert not back[token, head].isfinite().all()
        assert (back[token, 1 - head] == 0).all()


def test_half_the_bytes() -> None:
    smol = KVLayout((LayerKV(3, 64, 64),), "bfloat16")
    ratio = sum(plane_bytes(smol, 0, Encoding.INT8)) / smol.bytes_per_token
    assert ratio == 0.53125
