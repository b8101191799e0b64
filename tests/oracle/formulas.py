"""Every method's formula, as it stands in its paper, over transformers' own modules.

A formula maps a projection's (or FFN's) input x and output y, both [tokens, width] of the adapted positions,
to what y becomes there. The tensors are those of the artefact's file, one layer's without their prefix.
"""

from collections.abc import Callable, Iterator
from functools import partial
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
    """A formula at its place. One that leaves a vector in `state` scales every later position by it."""

    module: nn.Module
    part: int
    parts: int
    formula: Formula
    state: Weights


def changes(method: str, config: dict[str, Any], layer: nn.Module, weights: Weights) -> Iterator[Change]:
    """What the method does in one layer."""
    for site, formula in _METHODS[method](config, layer, weights):
        state = formula.keywords["state"] if isinstance(formula, partial) else {}
        yield Change(*_place(layer, site), formula, state)


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


def _sequential(config: dict[str, Any], _: nn.Module, w: Weights) -> Iterator[tuple[str, Formula]]:
    def formula(x: Tensor, y: Tensor) -> Tensor:
        return y + config["scale"] * torch.relu(y @ w["ffn.down"] + w["ffn.bias"]) @ w["ffn.up"]

    yield "ffn", formula


def _dora(config: dict[str, Any], layer: nn.Module, w: Weights) -> Iterator[tuple[str, Formula]]:
    """The merged weight V / ‖V‖ · m with V = W0 + s B A."""
    for site in config["targets"]:
        frozen, bias = _frozen(layer, site)
        scale = config["alpha"] / (config["r"] ** 0.5 if config["rslora"] else config["r"])
        merged = frozen + scale * w[f"{site}.lora_B"] @ w[f"{site}.lora_A"]
        norms = merged.square().sum(1).sqrt()
        merged = merged / norms[:, None] * w[f"{site}.lora_magnitude_vector"][:, None]
        yield site, lambda x, y, merged=merged, bias=bias: x @ merged.T + bias


def _ia3(_: dict[str, Any], layer: nn.Module, w: Weights) -> Iterator[tuple[str, Formula]]:
    for site in ("k", "v"):
        yield site, lambda x, y, factor=w[f"{site}.ia3_l"]: y * factor
    frozen, bias = _frozen(layer, "down")
    yield "down", lambda x, y: (x * w["down_in.ia3_l"]) @ frozen.T + bias


def _bitfit(config: dict[str, Any], _: nn.Module, w: Weights) -> Iterator[tuple[str, Formula]]:
    for site in config["targets"]:
        yield site, lambda x, y, change=w[f"{site}.bias"]: y + change


def _generated(
    config: dict[str, Any], _: nn.Module, w: Weights, follows: bool = False
) -> Iterator[tuple[str, Formula]]:
    """q, v and u times 1 + ReLU(p Wd) W, with p from the states that enter the attention's projections."""
    hidden: Weights = {}

    def formula(x: Tensor, y: Tensor, site: str, state: Weights) -> Tensor:
        if site == "q":
            pooled = x[-1] if config["pooling"] == "last" else x.sum(0) / len(x)
            hidden["of the prompt"] = (pooled @ w["generator.down"]).clamp(min=0)
        vector = 1 + hidden["of the prompt"] @ w[f"generator.{site}"]
        if follows:
            state["vector"] = vector
        return y * vector

    for site in ("q", "v", "up"):
        yield site, partial(formula, site=site, state={})


def _frozen(layer: nn.Module, site: str) -> tuple[Tensor, Tensor]:
    """The projection's weight [out, in], and its bias or zeros [out]."""
    module, part, parts = _place(layer, site)
    stored = module.weight.detach()
    assert isinstance(stored, Tensor)
    weight = (stored if isinstance(module, nn.Linear) else stored.T).chunk(parts)[part]
    bias = module.bias.detach().chunk(parts)[part] if isinstance(module.bias, Tensor) else torch.zeros(1)
    return weight, bias


_METHODS: dict[str, Callable[..., Iterator[tuple[str, Formula]]]] = {
    "prad-pa": _parallel,
    "prad-sa": _sequential,
    "prad-lora": _lora,
    "prad-dora": _dora,
    "prad-ia3": _ia3,
    "prad-bitfit": _bitfit,
    "prad-para": _generated,
    "para": partial(_generated, follows=True),
}
