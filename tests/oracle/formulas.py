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

_LLAMA = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "ffn": "mlp",
}
PLACES = {  # the module whose output a site is, by model type; "a b": from the input of a to the output of b
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": {
        **dict.fromkeys("qkv", "attn.c_attn"),
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
        "ffn": "mlp",
    },
    "gpt_neox": {
        **dict.fromkeys("qkv", "attention.query_key_value"),
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
        "ffn": "mlp",
    },
    "opt": {
        **{site: f"self_attn.{site}_proj" for site in "qkv"},
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
        "ffn": "fc1 fc2",
    },
}


class Layer(NamedTuple):
    """One of transformers' layers, and the configuration of its model."""

    module: nn.Module
    config: Any


class Place(NamedTuple):
    """From `entry`'s input x to `columns` [width] of `module`'s output, which are y."""

    entry: nn.Module
    module: nn.Module
    columns: Tensor


class Change(NamedTuple):
    """A formula at its place. One that leaves a vector in `state` scales every later position by it."""

    place: Place
    formula: Formula
    state: Weights


def changes(method: str, config: dict[str, Any], layer: Layer, weights: Weights) -> Iterator[Change]:
    """What the method does in one layer."""
    for site, formula in _METHODS[method](config, layer, weights):
        state = formula.keywords["state"] if isinstance(formula, partial) else {}
        yield Change(_place(layer, site), formula, state)


def _place(layer: Layer, site: str) -> Place:
    modules = [layer.module.get_submodule(p) for p in PLACES[layer.config.model_type][site].split()]
    hidden, heads = layer.config.hidden_size, layer.config.num_attention_heads
    columns = torch.arange(hidden if site == "ffn" else _stored(modules[-1]).shape[0])
    if site in "qkv" and layer.config.model_type == "gpt2":  # all of q, all of k, all of v
        columns = columns[columns // hidden == "qkv".index(site)]
    if site in "qkv" and layer.config.model_type == "gpt_neox":  # q, k and v of each head in turn
        columns = columns[columns // (hidden // heads) % 3 == "qkv".index(site)]
    return Place(modules[0], modules[-1], columns)


def _stored(projection: nn.Module) -> Tensor:
    """Its weight [out, in], whichever way it is stored."""
    weight = projection.weight.detach()
    assert isinstance(weight, Tensor)
    return weight if isinstance(projection, nn.Linear) else weight.T


def _bottleneck(
    config: dict[str, Any], _: Layer, w: Weights, sequential: bool = False
) -> Iterator[tuple[str, Formula]]:
    def formula(x: Tensor, y: Tensor) -> Tensor:
        hidden = (y if sequential else x) @ w["ffn.down"]
        if config["bias"]:
            hidden = hidden + w["ffn.bias"]
        return y + config["scale"] * torch.relu(hidden) @ w["ffn.up"]

    yield "ffn", formula


def _lora(config: dict[str, Any], _: Layer, w: Weights) -> Iterator[tuple[str, Formula]]:
    scale = config["alpha"] / (config["r"] ** 0.5 if config["rslora"] else config["r"])
    for site in config["targets"]:
        a, b = w[f"{site}.lora_A"], w[f"{site}.lora_B"]
        yield site, lambda x, y, a=a, b=b: y + scale * (x @ a.T) @ b.T


def _dora(config: dict[str, Any], layer: Layer, w: Weights) -> Iterator[tuple[str, Formula]]:
    """The merged weight V / ‖V‖ · m with V = W0 + s B A."""
    for site in config["targets"]:
        frozen, bias = _frozen(layer, site)
        scale = config["alpha"] / (config["r"] ** 0.5 if config["rslora"] else config["r"])
        merged = frozen + scale * w[f"{site}.lora_B"] @ w[f"{site}.lora_A"]
        norms = merged.square().sum(1).sqrt()
        merged = merged / norms[:, None] * w[f"{site}.lora_magnitude_vector"][:, None]
        yield site, lambda x, y, merged=merged, bias=bias: x @ merged.T + bias


def _ia3(config: dict[str, Any], layer: Layer, w: Weights) -> Iterator[tuple[str, Formula]]:
    """Where both the input and the output of down are scaled, the output's factor comes last."""
    for site in sorted(config["targets"], key=lambda site: site != "down_in"):
        factor = w[f"{site}.ia3_l"]
        if site == "down_in":
            frozen, bias = _frozen(layer, "down")
            yield "down", lambda x, y, factor=factor, w0=frozen, b=bias: (x * factor) @ w0.T + b
        else:
            yield site, lambda x, y, factor=factor: y * factor


def _bitfit(config: dict[str, Any], _: Layer, w: Weights) -> Iterator[tuple[str, Formula]]:
    for site in config["targets"]:
        yield site, lambda x, y, change=w[f"{site}.bias"]: y + change


def _generated(
    config: dict[str, Any], _: Layer, w: Weights, follows: bool = False
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


def _frozen(layer: Layer, site: str) -> tuple[Tensor, Tensor]:
    """The projection's weight [out, in], and its bias or zeros [out]."""
    place = _place(layer, site)
    bias = place.module.bias
    own = bias.detach()[place.columns] if isinstance(bias, Tensor) else torch.zeros(1)
    return _stored(place.module)[place.columns], own


def _in_front_only(*_: Any) -> Iterator[tuple[str, Formula]]:
    """All that the method does is its `tests.oracle.front.Front`."""
    return iter(())


_METHODS: dict[str, Callable[..., Iterator[tuple[str, Formula]]]] = {
    "prad-pa": _bottleneck,
    "prad-sa": partial(_bottleneck, sequential=True),
    "prad-lora": _lora,
    "prad-dora": _dora,
    "prad-ia3": _ia3,
    "prad-bitfit": _bitfit,
    "prad-prefix": _in_front_only,
    "prad-prompt": _in_front_only,
    "prad-mam": _bottleneck,
    "prad-para": _generated,
    "para": partial(_generated, follows=True),
}
