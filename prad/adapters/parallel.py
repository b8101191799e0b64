"""PrAd-PA: a bottleneck beside every FFN (paper, equation 4; parallel adapter of He et al. 2022).

    [x', y'] = FFN([x, y]) + [A(x), 0]      A(x) = s · ReLU(x Wd + b) Wu

x is the FFN's input after its norm. Wu starts at zero.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from prad.adapters.method import Group, Method, MethodConfig, ModelShape, Parameters
from prad.lm import Site


class ParallelConfig(MethodConfig):
    r: Annotated[int, Field(ge=1)] = 32
    scale: float = 1.0
    bias: bool = True


class ParallelAdapter(Method):
    name = "prad-pa"
    config_type = ParallelConfig

    def sites(self, config: ParallelConfig) -> frozenset[Site]:
        return frozenset({Site.FFN_OUT})

    def shapes(self, config: ParallelConfig, model: ModelShape) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "ffn.down": (model.hidden, config.r),
            "ffn.up": (config.r, model.hidden),
        }
        return shapes | ({"ffn.bias": (config.r,)} if config.bias else {})

    def initialise(self, config: ParallelConfig, model: ModelShape, generator: torch.Generator) -> Parameters:
        fresh = {
            name: torch.zeros(model.layers, *shape) for name, shape in self.shapes(config, model).items()
        }
        bound = 1 / math.sqrt(model.hidden)
        fresh["ffn.down"].uniform_(-bound, bound, generator=generator)
        return fresh

    def contribute(self, group: Group, layer: int, site: Site, value: Tensor, source: Tensor) -> Tensor:
        rows = group.rows
        hidden = torch.bmm(rows.pack(source), group.stacked("ffn.down", layer))  # [chunks, longest, r]
        if group.configs[0].bias:
            hidden = hidden + group.stacked("ffn.bias", layer).unsqueeze(1)
        packed = torch.bmm(hidden.relu(), group.stacked("ffn.up", layer))  # [chunks, longest, hidden]
        scales = [config.scale for config in group.configs]
        if any(scale != 1.0 for scale in scales):
            packed = packed * group.per_chunk(scales, packed)
        return value.index_add(0, rows.rows, rows.unpack(packed))
