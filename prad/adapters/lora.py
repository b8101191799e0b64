"""PrAd-LoRA: a low-rank change of chosen projections (Hu et al. 2022), on the prompt only.

    [x', y'] = [x, y] W0ᵀ + [s · x Aᵀ Bᵀ, 0]      s = alpha / r, or alpha / √r (rank-stabilised)

x is the projection's own input. B starts at zero. Names and shapes are PEFT's: `lora_A` [r, in], `lora_B`
[out, r]. A fused projection (GPT-2's c_attn) is adapted in its part. PrAd-LoRA-FFN is this method with the
targets gate, up and down.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from prad.adapters.method import FrozenModel, Group, LowRankConfig, LowRankNames, Method, Parameters
from prad.lm import Site

PROJECTIONS = (Site.Q, Site.K, Site.V, Site.O, Site.GATE, Site.UP, Site.DOWN)


def some_of(sites: Sequence[Site]) -> BeforeValidator:
    """For a configuration's `targets`."""

    def check(targets: Any) -> tuple[Site, ...]:
        known = isinstance(targets, list | tuple) and all(target in sites for target in targets)
        if not known or not targets or len(set(targets)) < len(targets):
            raise ValueError(f"expected a list of some of {', '.join(sites)}, each once")
        return tuple(Site(target) for target in targets)

    return BeforeValidator(check)


Projections = Annotated[tuple[Site, ...], some_of(PROJECTIONS)]


def _not_zero(alpha: float) -> float:
    if alpha == 0:
        raise ValueError("expected a number other than 0, with which nothing is changed")
    return alpha


class LoRAConfig(LowRankConfig):
    r: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, AfterValidator(_not_zero)] = 16.0
    rslora: bool = False
    targets: Projections = (Site.Q, Site.V)

    @property
    def factor(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class LoRA(Method):
    name = "prad-lora"
    config_type = LoRAConfig

    def sites(self, config: LoRAConfig) -> frozenset[Site]:
        return frozenset(config.targets)

    def shapes(self, config: LoRAConfig, model: FrozenModel) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for site in config.targets:
            width_in, width_out = model.width(site)
            shapes |= {f"{site}.lora_A": (config.r, width_in), f"{site}.lora_B": (width_out, config.r)}
        return shapes

    def initialise(self, config: LoRAConfig, model: FrozenModel, generator: torch.Generator) -> Parameters:
        fresh = {
            name: torch.zeros(model.layers, *shape) for name, shape in self.shapes(config, model).items()
        }
        for site in config.targets:
            down = fresh[f"{site}.lora_A"]
            bound = 1 / math.sqrt(down.shape[-1])
            down.uniform_(-bound, bound, generator=generator)
        return fresh

    def prepare(self, config: LoRAConfig, parameters: Parameters, model: FrozenModel) -> Parameters:
        """down = Aᵀ [in, r] and up = Bᵀ [r, out]: rows of what is read together lie side by side."""
        ready: Parameters = {}
        for site in config.targets:
            ready[f"{site}.down"] = parameters[f"{site}.lora_A"].mT.contiguous()
            ready[f"{site}.up"] = parameters[f"{site}.lora_B"].mT.contiguous()
        return ready

    def contribute(self, group: Group, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        group.add_low_rank(layer, value, source, LowRankNames(f"{site}.down", f"{site}.up"))
