"""IA3: PEFT scales a module's output [out, 1], or for feed-forward modules its input [1, in]."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prad.adapters.ia3 import SCALED, IA3Config
from prad.adapters.method import Parameters
from prad.exchange.errors import ExchangeError, FieldError
from prad.exchange.exported import Exported
from prad.exchange.imported import Imported, stack
from prad.exchange.modules import Modules
from prad.exchange.peft_config import IA3Source
from prad.exchange.targets import is_feedforward, targeted
from prad.exchange.tensors import PREFIX, by_module, require_modules, require_shape
from prad.lm import Site

VECTOR = "ia3_l"


def import_ia3(config: IA3Source, tensors: Mapping[str, Tensor], modules: Modules) -> Imported:
    """Where the file scales nothing, or all by one, nothing is kept. Raises ExchangeError."""
    found = by_module(tensors, (VECTOR,), modules)
    targets = targeted(config, modules.names, modules.linear)
    require_modules(targets, found, modules)
    vectors: dict[Site, dict[int, Tensor]] = {}
    for name in targets:
        width_in, width_out = modules.width(name)
        vector = found[name].get(VECTOR)
        if is_feedforward(config, name):
            layer, site = _input(name, modules)
            scaled = require_shape(name, VECTOR, vector, (1, width_in))
            vectors.setdefault(site, {})[layer] = scaled.flatten()
            continue
        scaled = require_shape(name, VECTOR, vector, (width_out, 1)).flatten()
        for part in modules.projections[name]:
            vectors.setdefault(part.site, {})[part.layer] = scaled[part.outputs]
    kept = {s: vectors[s] for s in SCALED if any((v != 1).any() for v in vectors.get(s, {}).values())}
    if not kept:
        raise ExchangeError(f"adapter_model.safetensors: expected weights, every {VECTOR} is one (untrained)")
    parameters = {
        f"{site}.{VECTOR}": stack(
            layers, modules.model.num_layers, torch.ones_like(next(iter(layers.values())))
        )
        for site, layers in kept.items()
    }
    return Imported("prad-ia3", {"targets": [str(site) for site in kept]}, parameters)


def _input(name: str, modules: Modules) -> tuple[int, Site]:
    if name not in modules.inputs:
        known = ", ".join(sorted({modules.in_layer(n) for n in modules.inputs}))
        raise FieldError("feedforward_modules", f"only {known} (its input is an adapter site)", name)
    return modules.inputs[name]


def export_ia3(config: IA3Config, parameters: Parameters, modules: Modules) -> Exported:
    """Raises ExchangeError if both input and output of one module are scaled: PEFT has one vector for it."""
    tensors: dict[str, Tensor] = {}
    for name, parts in modules.projections.items():
        own = [part for part in parts if part.site in config.targets]
        if not own:
            continue
        scaled = torch.ones(modules.width(name)[1])
        for part in own:
            scaled[part.outputs] = parameters[f"{part.site}.{VECTOR}"][part.layer]
        tensors[f"{PREFIX}{name}.{VECTOR}"] = scaled.unsqueeze(1)
    outputs = {modules.in_layer(n.removeprefix(PREFIX).removesuffix(f".{VECTOR}")) for n in tensors}
    inputs = {}
    for name, (layer, site) in modules.inputs.items():
        if site in config.targets:
            inputs[name] = parameters[f"{site}.{VECTOR}"][layer].unsqueeze(0)
    feedforward = {modules.in_layer(name) for name in inputs}
    for both in sorted(outputs & feedforward):
        raise ExchangeError(f"PEFT's IA3 scales the input or the output of {both}, this adapter scales both")
    fields: dict[str, Any] = {
        "peft_type": "IA3",
        "fan_in_fan_out": any(modules.is_transposed(name) for name in modules.projections),
        "feedforward_modules": sorted(feedforward),
        "init_ia3_weights": True,
        "target_modules": sorted(outputs | feedforward),
    }
    return Exported(fields, tensors | {f"{PREFIX}{n}.{VECTOR}": v for n, v in inputs.items()})
