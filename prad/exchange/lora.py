"""LoRA and DoRA, from PEFT's modules to our sites.

A fused projection's change is cut into its parts: each has the same A, its own rows of B, and its own
magnitudes. Ranks that differ are filled up with zeros, factors that differ go into B in float32; both leave
the product as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import pad

from prad.adapters.lora import PROJECTIONS, LoRAConfig
from prad.adapters.method import FrozenModel, Parameters
from prad.exchange.errors import ExchangeError, FieldError
from prad.exchange.imported import Imported, stack
from prad.exchange.modules import Modules
from prad.exchange.peft_config import LoraSource
from prad.exchange.targets import alpha_of, rank_of, targeted
from prad.exchange.tensors import by_module, require_modules, require_shape
from prad.lm import Site

DOWN, UP, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


@dataclass(frozen=True)
class Change:
    """factor · B A of one projection or a part of it: down A [r, in], up B [out, r], magnitude m [out]."""

    down: Tensor
    up: Tensor
    factor: float
    magnitude: Tensor | None

    @property
    def rank(self) -> int:
        return len(self.down)

    def part(self, outputs: Tensor) -> "Change":
        """That of some outputs, without ranks that add nothing to them."""
        magnitude = None if self.magnitude is None else self.magnitude[outputs]
        up = self.up[outputs]
        used = up.any(dim=0)
        return Change(self.down[used], up[:, used], self.factor, magnitude)

    def padded(self, rank: int) -> "Change":
        more = rank - self.rank
        return replace(self, down=pad(self.down, (0, 0, 0, more)), up=pad(self.up, (0, more)))

    def folded(self) -> "Change":
        """The same with factor one."""
        return replace(self, up=self.up.float() * self.factor, factor=1.0)


BySite = dict[Site, dict[int, Change]]


def import_lora(config: LoraSource, tensors: Mapping[str, Tensor], modules: Modules) -> Imported:
    """Raises ExchangeError."""
    found = by_module(tensors, (DOWN, UP, MAGNITUDE) if config.use_dora else (DOWN, UP), modules)
    targets = targeted(config, modules.names, modules.linear)
    require_modules(targets, found, modules)
    changes: BySite = {}
    for name in targets:
        whole = _change(config, name, found[name], modules)
        parts = modules.projections[name]
        for part in parts:
            own = whole if len(parts) == 1 else whole.part(part.outputs)
            changes.setdefault(part.site, {})[part.layer] = own
    changes = {site: changes[site] for site in PROJECTIONS if _matters(site, changes, modules)}
    if not changes:
        raise ExchangeError(f"adapter_model.safetensors: expected weights, every {UP} is zero (untrained)")
    scale, changes = _one_scale(config, changes)
    fields = {
        "r": scale.r,
        "alpha": scale.alpha,
        "rslora": scale.rslora,
        "targets": [str(s) for s in changes],
    }
    method = "prad-dora" if config.use_dora else "prad-lora"
    return Imported(method, fields, _parameters(changes, modules))


def _change(config: LoraSource, name: str, found: Mapping[str, Tensor], modules: Modules) -> Change:
    width_in, width_out = modules.width(name)
    rank = rank_of(config, name)
    alpha = alpha_of(config, name)
    magnitude = None
    if config.use_dora:
        magnitude = require_shape(name, MAGNITUDE, found.get(MAGNITUDE), (width_out,))
    return Change(
        require_shape(name, DOWN, found.get(DOWN), (rank, width_in)),
        require_shape(name, UP, found.get(UP), (width_out, rank)),
        alpha / (sqrt(rank) if config.use_rslora else rank),
        magnitude,
    )


def _matters(site: Site, changes: BySite, modules: Modules) -> bool:
    """Whether any layer is changed there: of a fused projection often only some parts are."""
    for layer, change in changes.get(site, {}).items():
        if change.up.any():
            return True
        m = change.magnitude
        if m is not None and not torch.equal(m.float(), frozen_norm(modules, site, layer)):
            return True
    return False


def _one_scale(config: LoraSource, changes: BySite) -> tuple[LoRAConfig, BySite]:
    """One rank and one factor for all, and what has to change for that. Raises FieldError for factor 0."""
    every = [change for layers in changes.values() for change in layers.values()]
    rank = max(1, *(change.rank for change in every))
    factors = {change.factor for change in every}
    if factors == {0.0}:
        raise FieldError("lora_alpha", "a number other than 0", 0, "nothing would be changed")
    if len(factors) > 1:
        scale = LoRAConfig(r=rank, alpha=rank)
        changes = {s: {i: c.folded() for i, c in layers.items()} for s, layers in changes.items()}
    elif factors == {config.lora_alpha / (sqrt(rank) if config.use_rslora else rank)}:
        scale = LoRAConfig(r=rank, alpha=config.lora_alpha, rslora=config.use_rslora)
    else:
        scale = LoRAConfig(r=rank, alpha=factors.pop() * rank)
    return scale, {s: {i: c.padded(rank) for i, c in layers.items()} for s, layers in changes.items()}


def _parameters(changes: BySite, modules: Modules) -> Parameters:
    """[layers, ...] by our names; a layer that is not changed gets zeros, and its own norm as magnitude."""
    parameters: Parameters = {}
    count = modules.model.num_layers
    for site, layers in changes.items():
        downs = {i: change.down for i, change in layers.items()}
        ups = {i: change.up for i, change in layers.items()}
        known = {i: change.magnitude for i, change in layers.items() if change.magnitude is not None}
        some = next(iter(layers))
        parameters[f"{site}.lora_A"] = stack(downs, count, torch.zeros_like(downs[some]))
        parameters[f"{site}.lora_B"] = stack(ups, count, torch.zeros_like(ups[some]))
        if known:
            others = {i: frozen_norm(modules, site, i) for i in range(count) if i not in known}
            parameters[f"{site}.{MAGNITUDE}"] = stack(known | others, count, known[some])
    return parameters


def frozen_norm(modules: Modules, site: Site, layer: int) -> Tensor:
    """‖W0‖ of each output [out]: the magnitude with which DoRA changes nothing."""
    weight, _ = FrozenModel(modules.model).projection(site, layer)
    norm: Tensor = weight.float().norm(dim=1).cpu()
    return norm
