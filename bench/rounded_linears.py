"""Ways to round a model's linear layers to 8 bits, computed in float32 by torch, whatever the kernels do.

Weights get a scale for each output, rows one for each token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_TOGETHER = 64  # inputs that are turned by one Hadamard matrix


class Scheme(NamedTuple):
    """rows: whether they are rounded, too; turned: both, before; kept: what the layers' names end with whose
    rows are not rounded."""

    rows: bool
    turned: bool = False
    kept: tuple[str, ...] = ()


SCHEMES = {
    "weights": Scheme(rows=False),
    "weights and rows": Scheme(rows=True),
    "the same, but rows of the down projections": Scheme(rows=True, kept=("down_proj",)),
    "the same, but rows of the LM head": Scheme(rows=True, kept=("lm_head",)),
    "the same, but both": Scheme(rows=True, kept=("down_proj", "lm_head")),
    "weights, turned": Scheme(rows=False, turned=True),
    "weights and rows, turned": Scheme(rows=True, turned=True),
}


@contextmanager
def rounded_linears(module: nn.Module, scheme: Scheme) -> Iterator[None]:
    """The model's linear layers compute so meanwhile."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        rows = scheme.rows and not name.endswith(scheme.kept or ("-",))
        weight = _rounded(_turned(layer.weight) if scheme.turned else layer.weight)
        layer.forward = partial(_forward, weight, layer.bias, rows, scheme.turned)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _forward(weight: Tensor, bias: Tensor | None, rows: bool, turned: bool, x: Tensor) -> Tensor:
    x = _turned(x) if turned else x
    return linear(_rounded(x) if rows else x, weight, bias)


def _rounded(x: Tensor) -> Tensor:
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(1e-12)
    return (x / scale).round() * scale


def _turned(x: Tensor) -> Tensor:
    """Every 64 of the last dimension, which is a multiple of it, times a Hadamard matrix."""
    matrix = torch.ones(1, 1, dtype=x.dtype)
    while len(matrix) < _TOGETHER:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.matmul(x.reshape(-1, _TOGETHER), matrix / _TOGETHER**0.5).view(x.shape)
