"""Every method's formula, as it stands in its paper, over transformers' own modules.

A formula maps a projection's (or FFN's) input x and output y, both [tokens, width] of the adapted positions,
to what y becomes there. The tensors are those of the artefact's file, one layer's without their prefix.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Formula = Callable[[Tensor, Tensor], Tensor]
Weights = dict[str, Tensor]

PLACES = {  # Llama's modules; GPT-2's, with the part of a fused output
    "q": ("self_attn.q_proj", "attn.c_attn", 0, 3),
    "k": ("self_attn.k_proj", "attn.c_attn", 1, 3),
    "v": ("self_attn.v_proj", "attn.c_attn", 2, 3),
    "o": ("self_attn.o_proj", "attn.c_proj", 0, 1),
    "gate": ("mlp.gate_proj", "", 0, 1),
    "up": ("mlp.up_proj", "mlp.c_fc", 0, 1),
    "down": ("mlp.down_proj", "mlp.c_proj", 0, 1),
    "ffn": ("mlp", "mlp", 0, 1),
}


class Change(NamedTuple):
    module: nn.Module
    part: int
    parts: int
    formula: Formula


def changes(method: str, config: dict[str, Any], layer: nn.Module, weights: Weights) -> Iterator[Change]:
    """What the method does in one layer."""
    for site, formula in _METHODS[method](config, layer, weights):
        yield Change(*_place(layer, site), formula)


def _place(layer: nn.Module, site: str) -> tuple[nn.Module, int, int]:
    llama, gpt2, part, parts = PLACES[site]
    if hasattr(layer, "self_attn"):
        return layer.get_submodule(llama), 0, 1
    return layer.get_submodule(gpt2), part, parts


def _parallel(config: dict[str, Any], _: nn.Module, w: Weights) -> Iterator[tuple[str, Formula]]:
    def formula(x: Tensor, y: Tensor) -> Tensor:
        return y + config["scale"] * torch.relu(x @ w["ffn.down"] + w["ffn.bias"]) @ w["ffn.up"]

    yield "ffn", formula


def _lora(config: dict[str, Any], _: nn.Module, w: Weights) -> Iterator[tuple[str, Formula]]:
    scale = config["alpha"] / (config["r"] ** 0.5 if config["rslora"] else config["r"])
    for site in config["targets"]:
        a, b = w[f"{site}.lora_A"], w[f"{site}.lora_B"]
        yield site, lambda x, y, a=a, b=b: y + scale * (x @ a.T) @ b.T


_METHODS: dict[str, Callable[..., Iterator[tuple[str, Formula]]]] = {
    "prad-pa": _parallel,
    "prad-lora": _lora,
}
