"""PrAd-BitFit: learned changes of the projections' biases (Zaken et al. 2022), on the prompt only.

    [x', y'] = W0 [x, y] + b + [Δb, 0]

Stored is the change, which starts at zero. A projection without a bias gets one, or is refused under
`missing` = "refuse". The norms' biases stay as they are.
"""

from typing import Literal

import torch
from torch import Tensor

from prad.adapters.errors import AdapterError
from prad.adapters.lora import Projections
from prad.adapters.method import FrozenModel, Group, Method, MethodConfig, Parameters
from prad.lm import Site
from prad.lm.sites import module_paths


class BitFitConfig(MethodConfig):
    targets: Projections = (Site.Q, Site.K, Site.V, Site.O, Site.UP, Site.DOWN)
    missing: Literal["add", "refuse"] = "add"


class BitFit(Method):
    name = "prad-bitfit"
    config_type = BitFitConfig

    def sites(self, config: BitFitConfig) -> frozenset[Site]:
        return frozenset(config.targets)

    def shapes(self, config: BitFitConfig, model: FrozenModel) -> dict[str, tuple[int, ...]]:
        without = [site for site in config.targets if model.projection(site)[1] is None]
        if without and config.missing == "refuse":
            raise AdapterError(
                f"{self.name}: a '{model.kind}' model has no bias in {', '.join(without)} "
                f"({module_paths(model.kind, without)})"
            )
        return {f"{site}.bias": (model.width(site)[1],) for site in config.targets}

    def initialise(self, config: BitFitConfig, model: FrozenModel, generator: torch.Generator) -> Parameters:
        return {n: torch.zeros(model.layers, *shape) for n, shape in self.shapes(config, model).items()}

    def contribute(self, group: Group, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        group.affine(layer, value, shift=f"{site}.bias")
