"""A model's modules by the names that PEFT knows, and the sites in them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prad.adapters.lora import PROJECTIONS
from prad.lm import LanguageModel, Site, placements


class Part(NamedTuple):
    """A site of a layer. `outputs` [width]: which of the module's outputs are the site's own."""

    layer: int
    site: Site
    outputs: Tensor


@dataclass(frozen=True)
class Modules:
    model: LanguageModel

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.model.module.named_modules() if name)

    @cached_property
    def linear(self) -> frozenset[str]:
        """All projections but the output head: what PEFT calls all-linear."""
        module: Any = self.model.module
        head, named = module.get_output_embeddings(), module.named_modules()
        return frozenset(n for n, m in named if isinstance(m, nn.Linear | Conv1D) and m is not head)

    @cached_property
    def projections(self) -> dict[str, tuple[Part, ...]]:
        """By module name the parts of its output, in their order: one, or several in a fused projection."""
        found: dict[str, tuple[Part, ...]] = {}
        for place in placements(self.model.module, self.model.config.model_type):
            if place.site in PROJECTIONS and place.outputs is not None:
                part = Part(place.layer, place.site, place.outputs)
                found[place.module] = (*found.get(place.module, ()), part)
        return found

    @cached_property
    def inputs(self) -> dict[str, tuple[int, Site]]:
        """By module name the layer and site of its input, where that is one."""
        return {
            place.module: (place.layer, place.site)
            for place in placements(self.model.module, self.model.config.model_type)
            if place.site is Site.DOWN_IN
        }

    @cached_property
    def embedding(self) -> tuple[str, int]:
        """Name and width of the input embedding: not the hidden size where it is projected (some of OPT)."""
        module: Any = self.model.module
        embedding = module.get_input_embeddings()
        name = next(name for name, found in module.named_modules() if found is embedding)
        return name, embedding.embedding_dim

    def width(self, name: str) -> tuple[int, int]:
        """(in, out) of a projection, fused or not."""
        module = self.model.module.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, Tensor)
        rows, columns = weight.shape
        return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)

    def is_transposed(self, name: str) -> bool:
        """Whether it stores its weight as [in, out] (GPT-2's Conv1D); PEFT wants to be told."""
        return not isinstance(self.model.module.get_submodule(name), nn.Linear)

    def in_layer(self, name: str) -> str:
        """The name below its layer: model.layers.3.self_attn.q_proj is self_attn.q_proj."""
        (layer, *_), *_ = self.projections[name]
        return name.split(f".{layer}.", 1)[1]
