"""PrAd-DoRA: LoRA whose projections keep a learned magnitude per output (Liu et al. 2024), on the prompt.

    y' = g ⊙ (W0 x + s B A x) + b      g = m / ‖W0 + s B A‖, the norm of each output feature over its inputs

m starts at ‖W0‖ and B at zero. The norm is computed once on load; training takes it as a constant at each
step (section 4.3 of that paper). Names are PEFT's.
"""

import torch
from torch import Tensor

from prad.adapters.lora import LoRA, LoRAConfig
from prad.adapters.method import FrozenModel, Group, Parameters
from prad.lm import Site

_MAGNITUDE = "lora_magnitude_vector"


class DoRA(LoRA):
    name = "prad-dora"

    def shapes(self, config: LoRAConfig, model: FrozenModel) -> dict[str, tuple[int, ...]]:
        magnitudes = {f"{site}.{_MAGNITUDE}": (model.width(site)[1],) for site in config.targets}
        return super().shapes(config, model) | magnitudes

    def initialise(self, config: LoRAConfig, model: FrozenModel, generator: torch.Generator) -> Parameters:
        fresh = super().initialise(config, model, generator)
        for site in config.targets:
            norms = [model.projection(site, i)[0].float().norm(dim=1) for i in range(model.layers)]
            fresh[f"{site}.{_MAGNITUDE}"] = torch.stack(norms).cpu()
        return fresh

    def prepare(self, config: LoRAConfig, parameters: Parameters, model: FrozenModel) -> Parameters:
        """g and g ⊙ B instead of m and B; (1 - g) ⊙ b beside them, as g must not scale the bias."""
        scaled: Parameters = {}
        beside: Parameters = {}
        for site in config.targets:
            down, up, magnitude = (
                parameters[f"{site}.{n}"].float() for n in ("lora_A", "lora_B", _MAGNITUDE)
            )
            norms, biases = [], []
            for layer in range(model.layers):
                weight, bias = model.projection(site, layer)
                change = config.factor * up[layer].detach() @ down[layer].detach()
                norms.append((weight.float() + change).norm(dim=1))
                biases.append(torch.zeros_like(norms[-1]) if bias is None else bias.float())
            gain = magnitude / torch.stack(norms)
            scaled |= {f"{site}.lora_A": down, f"{site}.lora_B": gain.unsqueeze(-1) * up}
            beside |= {f"{site}.gain": gain, f"{site}.shift": (1 - gain) * torch.stack(biases)}
        return super().prepare(config, scaled, model) | beside

    def contribute(self, group: Group, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        group.affine(layer, value, gain=f"{site}.gain", shift=f"{site}.shift")
        super().contribute(group, layer, site, value, source)
