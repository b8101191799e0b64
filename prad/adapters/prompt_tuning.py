"""Prompt tuning: learned input vectors in front of the prompt (Lester et al. 2021).

    [x', y'] = M([p, x, y])      p [virtual tokens, width], in the place of embeddings

A special instance of PrAd as it stands: generated tokens meet p in the KV cache only. Positions count p.
"""

import torch
from torch import Tensor

from prad.adapters.method import INPUT, FrozenModel, Group, Method, Parameters
from prad.adapters.virtual import VirtualConfig, first_ids
from prad.lm import Site

_EMBEDDING = f"{INPUT}embedding"


class PromptTuning(Method):
    name = "prad-prompt"
    config_type = VirtualConfig
    only_in_front = True

    def virtual_tokens(self, config: VirtualConfig) -> int:
        return config.virtual_tokens

    def sites(self, config: VirtualConfig) -> frozenset[Site]:
        return frozenset({Site.EMBEDDING})

    def shapes(self, config: VirtualConfig, model: FrozenModel) -> dict[str, tuple[int, ...]]:
        return {_EMBEDDING: (config.virtual_tokens, model.embedding_width)}

    def initialise(self, config: VirtualConfig, model: FrozenModel, generator: torch.Generator) -> Parameters:
        return {_EMBEDDING: model.embeddings(first_ids(config, model, generator))[None]}

    def contribute(self, group: Group, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        group.set_virtual(layer, value, _EMBEDDING)
