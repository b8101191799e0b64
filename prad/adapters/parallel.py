"""PrAd-PA: a bottleneck beside every FFN (paper, equation 4; parallel adapter of He et al. 2022).

    [x', y'] = FFN([x, y]) + [A(x), 0]      A(x) = s · ReLU(x Wd + b) Wu

x is the FFN's input after its norm. Wu starts at zero.
"""

import math

import torch
from torch import Tensor

from prad.adapters.method import FrozenModel, Group, LowRankConfig, LowRankNames, Method, Parameters
from prad.lm import Site


class ParallelConfig(LowRankConfig):
    scale: float = 1.0
    bias: bool = True

    @property
    def factor(self) -> float:
        return self.scale


class ParallelAdapter(Method):
    name = "prad-pa"
    config_type = ParallelConfig

    def sites(self, config: ParallelConfig) -> frozenset[Site]:
        return frozenset({Site.FFN_OUT})

    def shapes(self, config: ParallelConfig, model: FrozenModel) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "ffn.down": (model.hidden, config.r),
            "ffn.up": (config.r, model.hidden),
        }
        return shapes | ({"ffn.bias": (config.r,)} if config.bias else {})

    def initialise(
        self, config: ParallelConfig, model: FrozenModel, generator: torch.Generator
    ) -> Parameters:
        fresh = {
            name: torch.zeros(model.layers, *shape) for name, shape in self.shapes(config, model).items()
        }
        bound = 1 / math.sqrt(model.hidden)
        fresh["ffn.down"].uniform_(-bound, bound, generator=generator)
        return fresh

    def contribute(self, group: Group, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        bias = "ffn.bias" if group.configs[0].bias else None
        group.add_low_rank(layer, value, source, LowRankNames("ffn.down", "ffn.up", bias), relu=True)
