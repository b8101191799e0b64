"""LoRA and DoRA, from our sites to PEFT's modules.

PEFT adapts a fused projection whole: its adapted parts become the blocks of one change whose rank is the sum
of theirs.
"""

import re
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from prad.adapters.lora import LoRAConfig
from prad.adapters.method import Parameters
from prad.exchange.exported import Exported
from prad.exchange.lora import DOWN, MAGNITUDE, UP, frozen_norm
from prad.exchange.modules import Modules, Part
from prad.exchange.tensors import PREFIX


def export_lora(config: LoRAConfig, parameters: Parameters, modules: Modules, *, dora: bool) -> Exported:
    """parameters [layers, ...] as our file holds them."""
    tensors: dict[str, Tensor] = {}
    blocks: dict[str, int] = {}  # by name below the layer
    for name, parts in modules.projections.items():
        own = [part for part in parts if part.site in config.targets]
        if not own:
            continue
        downs = [parameters[f"{p.site}.lora_A"][p.layer] for p in own]
        up = downs[0].new_zeros(modules.width(name)[1], len(own) * config.r)
        for i, part in enumerate(own):
            up[part.outputs, i * config.r : (i + 1) * config.r] = parameters[f"{part.site}.lora_B"][
                part.layer
            ]
        tensors |= {f"{PREFIX}{name}.{DOWN}": torch.cat(downs), f"{PREFIX}{name}.{UP}": up}
        if dora:
            tensors[f"{PREFIX}{name}.{MAGNITUDE}"] = _magnitude(config, parameters, parts, modules)
        blocks[modules.in_layer(name)] = len(own)
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": any(modules.is_transposed(name) for name in modules.projections),
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "target_modules": sorted(blocks),
        "use_dora": dora,
        "use_rslora": config.rslora,
    }
    return Exported(fields | _scales(config, blocks), tensors)


def _scales(config: LoRAConfig, blocks: dict[str, int]) -> dict[str, Any]:
    """r and alpha, so that every module keeps our factor whatever its rank."""

    def alpha(count: int) -> float:
        return config.alpha * (sqrt(count) if config.rslora else count)

    usual = min(blocks.values())
    wider = {re.escape(name): count for name, count in blocks.items() if count != usual}
    return {
        "r": config.r * usual,
        "lora_alpha": alpha(usual),
        "rank_pattern": {pattern: config.r * count for pattern, count in wider.items()},
        "alpha_pattern": {pattern: alpha(count) for pattern, count in wider.items()},
    }


def _magnitude(
    config: LoRAConfig, parameters: Parameters, parts: tuple[Part, ...], modules: Modules
) -> Tensor:
    """[out]; of the parts that are not adapted, what they have."""
    norms = [
        parameters[f"{part.site}.{MAGNITUDE}"][part.layer]
        if part.site in config.targets
        else frozen_norm(modules, part.site, part.layer)
        for part in parts
    ]
    whole = torch.zeros(sum(map(len, norms)))
    for part, norm in zip(parts, norms, strict=True):
        whole[part.outputs] = norm
    return whole
