"""PrAd-MaM, "mix and match" (He et al. 2022): prefix tuning, and a scaled parallel adapter beside every FFN.

Its configuration is both parts' in one, with that paper's scale; parameters are called as in the parts.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from prad.adapters.method import FrozenModel, Group, Method, Parameters
from prad.adapters.parallel import ParallelAdapter, ParallelConfig
from prad.adapters.prefix import PrefixConfig, PrefixTuning
from prad.lm import Site


class MaMConfig(PrefixConfig, ParallelConfig):
    virtual_tokens: Annotated[int, Field(ge=1)] = 30
    scale: float = 4.0


class _Prefix(PrefixTuning):
    name = "prad-mam"  # what its errors name


class MaM(Method):
    name = "prad-mam"
    config_type = MaMConfig

    _prefix = _Prefix()
    _parallel = ParallelAdapter()

    def virtual_tokens(self, config: MaMConfig) -> int:
        return config.virtual_tokens

    def sites(self, config: MaMConfig) -> frozenset[Site]:
        return self._prefix.sites(config) | self._parallel.sites(config)

    def shapes(self, config: MaMConfig, model: FrozenModel) -> dict[str, tuple[int, ...]]:
        return self._prefix.shapes(config, model) | self._parallel.shapes(config, model)

    def initialise(self, config: MaMConfig, model: FrozenModel, generator: torch.Generator) -> Parameters:
        prefix = self._prefix.initialise(config, model, generator)
        return prefix | self._parallel.initialise(config, model, generator)

    def reparametrise(
        self, config: MaMConfig, fresh: Parameters, model: FrozenModel, generator: torch.Generator
    ) -> nn.Module | None:
        return self._prefix.reparametrise(config, fresh, model, generator)

    def contribute(self, group: Group, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        part = self._parallel if site is Site.FFN_OUT else self._prefix
        part.contribute(group, layer, site, value, source)
