"""The honest baseline: our own engine, but with the adapters at every generated token, as others do it.

Kept here only: the decode service must not know adapters. Each sequence has an adapter of its own. All
parameters are stacked over the sequences once, beforehand, so that one batched matrix product per site
applies all of them, without gathering or copying while it runs: the best case of a multi-adapter server.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prad.lm import LanguageModel, Site

Kind = Literal["lora", "pa"]


@dataclass(frozen=True)
class _Stack:
    """One site's parameters: down [layers, sequences, in, r], up [layers, sequences, r, out]."""

    down: Tensor
    up: Tensor


class StackedAdapters:
    """Implements prad.lm.Adaptation for a batch whose rows are those of `sequences` sequences, equally many
    each: a prompt pass of equally long prompts, or a decode step.

    lora: r on q and v (Hu et al. 2021). pa: a ReLU bottleneck beside the FFN (He et al. 2022).
    """

    def __init__(self, kind: Kind, model: LanguageModel, sequences: int, r: int) -> None:
        config = model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        widths = {
            "lora": {Site.Q: config.num_attention_heads * head, Site.V: kv_heads * head},
            "pa": {Site.FFN_OUT: model.hidden_size},
        }[kind]
        self._nonlinear = kind == "pa"
        self._sequences = sequences
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            values = torch.empty(model.num_layers, sequences, *shape).normal_(0.0, 0.02, generator=generator)
            return values.to(model.device, model.dtype)

        self._stacks = {
            site: _Stack(random(model.hidden_size, r), random(r, width)) for site, width in widths.items()
        }

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(self._stacks)

    def apply(self, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        stack = self._stacks[site]
        hidden = torch.bmm(source.view(self._sequences, -1, source.shape[-1]), stack.down[layer])
        if self._nonlinear:
            hidden = hidden.relu()
        value += torch.bmm(hidden, stack.up[layer]).view_as(value)
