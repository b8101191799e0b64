"""PARA and PrAd-PARA: queries, values and up states scaled by vectors that the prompt itself generates.

    q' = l_q ⊙ q    v' = l_v ⊙ v    u' = l_u ⊙ u        l_s = 1 + ReLU(p Wd) W_s        p = pool(x)

One generator per layer (Liu et al. 2024, arXiv 2502.01033); x are the prompt's states at the layer's entry.
In PARA the vectors scale the prompt and every generated token: they depend on the request, so they go along
with it as its state, as l - 1. In PrAd-PARA they scale the prompt alone. W_s start at zero.

The three products and the generator's parts (pooler, down projection, activation, up projection) are the
paper's. The rest is our reading of it: x is taken behind the layer's first norm, as everywhere in PrAd; the
pooler is the mean, or the last token by choice; the activation is ReLU; l is 1 + ..., without biases. On a
model of Llama 2 7B's sizes such generators have 8.9 million parameters at r = 12, as many as are reported for
PARA.
"""

import math
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from prad.adapters.method import FrozenModel, Group, LowRankConfig, LowRankNames, Method, Parameters
from prad.adapters.segments import Span
from prad.lm import Site, SiteVectors

_SCALED = (Site.Q, Site.V, Site.UP)
_DOWN = "generator.down"


class PARAConfig(LowRankConfig):
    r: Annotated[int, Field(ge=1)] = 12
    pooling: Literal["mean", "last"] = "mean"


class PromptPARA(Method):
    name = "prad-para"
    config_type = PARAConfig
    needs_whole_prompt = True

    def sites(self, config: PARAConfig) -> frozenset[Site]:
        return frozenset(_SCALED)

    def shapes(self, config: PARAConfig, model: FrozenModel) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {_DOWN: (model.width(Site.Q)[0], config.r)}
        return shapes | {_up(site): (config.r, model.width(site)[1]) for site in _SCALED}

    def initialise(self, config: PARAConfig, model: FrozenModel, generator: torch.Generator) -> Parameters:
        fresh = {
            name: torch.zeros(model.layers, *shape) for name, shape in self.shapes(config, model).items()
        }
        bound = 1 / math.sqrt(fresh[_DOWN].shape[1])
        fresh[_DOWN].uniform_(-bound, bound, generator=generator)
        return fresh

    def contribute(self, group: Group, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        self._scaled(group).scale_spans(value, self._changes(group, layer, site, source))

    def _scaled(self, group: Group) -> Group:
        """Whose spans are the rows that are scaled."""
        return group

    def _changes(self, group: Group, layer: int, site: Site, source: Tensor) -> Tensor:
        """l - 1: [spans, width of the site]; a layer's q and v come first, and have its entry as source."""
        if ("pooled", layer) not in group.kept:
            group.kept["pooled", layer] = group.means(source, self._pooling(group))
        pooled: Tensor = group.kept["pooled", layer]
        changes = pooled.new_zeros(len(pooled), group.parameters[0][_up(site)][layer].shape[1])
        if "generators" not in group.kept:  # a low-rank change whose rows are the spans
            rows = tuple(Span(i, i + 1, span.adapter) for i, span in enumerate(group.spans))
            group.kept["generators"] = replace(group, spans=rows)
        names = LowRankNames(_DOWN, _up(site))
        group.kept["generators"].add_low_rank(layer, changes, pooled, names, relu=True)
        return changes

    def _pooling(self, group: Group) -> Tensor:
        """The rows that are pooled, [start, stop) of each span; int64 [spans, 2] on the CPU."""
        if "pooling" not in group.kept:
            rows = [
                (s.start if group.configs[s.adapter].pooling == "mean" else s.stop - 1, s.stop)
                for s in group.spans
            ]
            group.kept["pooling"] = torch.tensor(rows)
        bounds: Tensor = group.kept["pooling"]
        return bounds


class PARA(PromptPARA):
    name = "para"

    def _scaled(self, group: Group) -> Group:
        if "scaled" not in group.kept:
            spans = tuple(s._replace(stop=s.stop + s.after) for s in group.spans)
            group.kept["scaled"] = replace(group, spans=spans)
        scaled: Group = group.kept["scaled"]
        return scaled

    def _changes(self, group: Group, layer: int, site: Site, source: Tensor) -> Tensor:
        changes = super()._changes(group, layer, site, source)
        group.kept[site, layer] = changes
        return changes

    def state_widths(self, parameters: Parameters) -> dict[Site, int]:
        return {site: parameters[_up(site)].shape[-1] for site in _SCALED}

    def states(self, group: Group) -> list[SiteVectors]:
        layers = range(len(group.parameters[0][_DOWN]))
        by_site = {site: torch.stack([group.kept[site, i] for i in layers], dim=1) for site in _SCALED}
        return [{site: by_site[site][i] for site in _SCALED} for i in range(len(group.spans))]


def _up(site: Site) -> str:
    return f"generator.{site}"
