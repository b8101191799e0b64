"""PrAd-IA3: keys, values and the FFN's inner states are scaled by learned vectors (Liu et al. 2022).

    k' = l_k ⊙ k      v' = l_v ⊙ v      FFN(x)' = (l_ff ⊙ inner(x)) W_down      on the prompt only

Keys are scaled before RoPE. All vectors start at one. Names are PEFT's: `ia3_l`.
"""

import torch
from torch import Tensor

from prad.adapters.method import FrozenModel, Group, Method, MethodConfig, Parameters
from prad.lm import Site


class IA3Config(MethodConfig):
    pass


class IA3(Method):
    name = "prad-ia3"
    config_type = IA3Config

    def sites(self, config: IA3Config) -> frozenset[Site]:
        return frozenset({Site.K, Site.V, Site.DOWN_IN})

    def shapes(self, config: IA3Config, model: FrozenModel) -> dict[str, tuple[int, ...]]:
        inner, _ = model.width(Site.DOWN)
        return {
            f"{Site.K}.ia3_l": (model.width(Site.K)[1],),
            f"{Site.V}.ia3_l": (model.width(Site.V)[1],),
            f"{Site.DOWN_IN}.ia3_l": (inner,),
        }

    def initialise(self, config: IA3Config, model: FrozenModel, generator: torch.Generator) -> Parameters:
        return {n: torch.ones(model.layers, *shape) for n, shape in self.shapes(config, model).items()}

    def contribute(self, group: Group, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        for span in group.spans:
            value[span.start : span.stop].mul_(group.parameters[span.adapter][f"{site}.ia3_l"][layer])
