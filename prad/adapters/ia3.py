"""PrAd-IA3: keys, values and the FFN's inner states are scaled by learned vectors (Liu et al. 2022).

    k' = l_k ⊙ k      v' = l_v ⊙ v      FFN(x)' = (l_ff ⊙ inner(x)) W_down      on the prompt only

Keys are scaled before RoPE. All vectors start at one. Names are PEFT's: `ia3_l`. Other projections' outputs
can be scaled by choice (PEFT does so for some families).
"""

from typing import Annotated

import torch
from torch import Tensor

from prad.adapters.lora import PROJECTIONS, some_of
from prad.adapters.method import FrozenModel, Group, Method, MethodConfig, Parameters
from prad.lm import Site

SCALED = (*PROJECTIONS, Site.DOWN_IN)


class IA3Config(MethodConfig):
    targets: Annotated[tuple[Site, ...], some_of(SCALED)] = (Site.K, Site.V, Site.DOWN_IN)


class IA3(Method):
    name = "prad-ia3"
    config_type = IA3Config

    def sites(self, config: IA3Config) -> frozenset[Site]:
        return frozenset(config.targets)

    def shapes(self, config: IA3Config, model: FrozenModel) -> dict[str, tuple[int, ...]]:
        return {f"{site}.ia3_l": (_width(model, site),) for site in config.targets}

    def initialise(self, config: IA3Config, model: FrozenModel, generator: torch.Generator) -> Parameters:
        return {n: torch.ones(model.layers, *shape) for n, shape in self.shapes(config, model).items()}

    def contribute(self, group: Group, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        group.affine(layer, value, gain=f"{site}.ia3_l")


def _width(model: FrozenModel, site: Site) -> int:
    return model.width(Site.DOWN)[0] if site is Site.DOWN_IN else model.width(site)[1]
