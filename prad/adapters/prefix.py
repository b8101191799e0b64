"""Prefix tuning: learned keys and values in front of the prompt, in every layer (Li and Liang 2021).

    attention over [Pk, K] and [Pv, V]      Pk, Pv [virtual tokens, kv_heads, dim]

A special instance of PrAd as it stands: generated tokens meet the prefix in the KV cache only. Pk is stored
as it is cached, after RoPE and any norm, as PEFT has it; positions count the prefix.

Fresh, it is what real tokens leave in the cache (that paper's initialisation). Training goes through an MLP
over embeddings, as there, which adds to it: P = P0 + tanh(E W1 + b1) W2 + b2, with W2 and b2 zero at first.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from prad.adapters.errors import AdapterError
from prad.adapters.method import FrozenModel, Group, Method, Parameters
from prad.adapters.virtual import VirtualConfig, first_ids
from prad.core.kv import LayerKV
from prad.lm import Site
from prad.lm.sites import module_paths

_NAMES = {Site.KEYS: "prefix.key", Site.VALUES: "prefix.value"}


class PrefixConfig(VirtualConfig):
    """`projection`: inner width of the MLP that training goes through; None: keys and values themselves."""

    projection: Annotated[int, Field(ge=1)] | None = 512


class PrefixTuning(Method):
    name = "prad-prefix"
    config_type = PrefixConfig
    only_in_front = True

    def virtual_tokens(self, config: PrefixConfig) -> int:
        return config.virtual_tokens

    def sites(self, config: PrefixConfig) -> frozenset[Site]:
        return frozenset(_NAMES)

    def shapes(self, config: PrefixConfig, model: FrozenModel) -> dict[str, tuple[int, ...]]:
        layer = model.layout.layers[0]
        if others := [i for i, kept in enumerate(model.layout.layers) if kept != layer]:
            raise AdapterError(
                f"{self.name}: a '{model.kind}' model's layers differ in what they keep of a token "
                f"({module_paths(model.kind, (Site.K, Site.V))}): layer 0 has {_size(layer)}, "
                f"layer {others[0]} has {_size(model.layout.layers[others[0]])}"
            )
        tokens = config.virtual_tokens
        return {
            _NAMES[Site.KEYS]: (tokens, layer.heads, layer.key_dim),
            _NAMES[Site.VALUES]: (tokens, layer.heads, layer.value_dim),
        }

    def initialise(self, config: PrefixConfig, model: FrozenModel, generator: torch.Generator) -> Parameters:
        self.shapes(config, model)  # whether the layers are alike
        states = model.keys_and_values(first_ids(config, model, generator))
        return dict(zip(_NAMES.values(), states, strict=True))

    def reparametrise(
        self, config: PrefixConfig, fresh: Parameters, model: FrozenModel, generator: torch.Generator
    ) -> nn.Module | None:
        if config.projection is None:
            return None
        own = {name: fresh[name] for name in _NAMES.values()}
        return _Projection(own, model.hidden, config.projection, generator)

    def contribute(self, group: Group, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        group.set_virtual(layer, value, _NAMES[site])


def _size(kept: LayerKV) -> str:
    return f"{kept.heads} keys of {kept.key_dim} and values of {kept.value_dim}"


class _Projection(nn.Module):
    """P0 and the MLP; float32. Called, it gives the keys and values of the prefix."""

    def __init__(self, fresh: Parameters, hidden: int, inner: int, generator: torch.Generator) -> None:
        super().__init__()
        self._shapes = {name: p.shape for name, p in fresh.items()}  # [layers, tokens, kv_heads, dim]
        for name, p in fresh.items():
            self.register_buffer(_attribute(name), p)
        tokens = next(iter(self._shapes.values()))[1]
        width = sum(p.numel() for p in fresh.values()) // tokens
        self.embedding = nn.Parameter(torch.randn(tokens, hidden, generator=generator))
        bound = 1 / math.sqrt(hidden)
        down = torch.empty(hidden, inner).uniform_(-bound, bound, generator=generator)
        self.down, self.down_bias = nn.Parameter(down), nn.Parameter(torch.zeros(inner))
        self.up, self.up_bias = nn.Parameter(torch.zeros(inner, width)), nn.Parameter(torch.zeros(width))

    def forward(self) -> Parameters:
        hidden = torch.tanh(self.embedding @ self.down + self.down_bias)
        change = hidden @ self.up + self.up_bias  # [tokens, width]
        widths = [shape.numel() // len(change) for shape in self._shapes.values()]
        parts = change.split(widths, dim=1)  # type: ignore[no-untyped-call]
        parameters = {}
        for (name, shape), part in zip(self._shapes.items(), parts, strict=True):
            by_token = part.view(shape[1], shape[0], *shape[2:])
            parameters[name] = getattr(self, _attribute(name)) + by_token.transpose(0, 1)
        return parameters


def _attribute(name: str) -> str:
    return name.replace(".", "_")
