"""What every member of the PrAd family consists of. One file per method beside this one.

A method is stateless: it names its configuration, sites and parameters, and computes the contribution of
many adapters at once. Training uses the very same contribution, with one adapter and gradients.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from prad.adapters.errors import AdapterError
from prad.adapters.rows import AdaptedRows
from prad.lm import LanguageModel, Site

Parameters = dict[str, Tensor]
"""A method's parameters by name; each has the layers as its first dimension."""


class MethodConfig(BaseModel):
    """A method's own part of `prad.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model that parameter shapes depend on."""

    layers: int
    hidden: int

    @classmethod
    def of(cls, model: LanguageModel) -> "ModelShape":
        return cls(model.num_layers, model.hidden_size)


@dataclass(frozen=True, slots=True)
class Group:
    """Adapters of one method and one set of parameter shapes that share a packed pass.

    configs and parameters are those of the distinct adapters, in the order of `rows`.
    """

    method: "Method"
    configs: tuple[Any, ...]
    parameters: tuple[Parameters, ...]
    rows: AdaptedRows

    def stacked(self, name: str, layer: int) -> Tensor:
        """One layer's parameter for every chunk of rows: [chunks, ...]."""
        if len(self.parameters) == 1:
            return self.parameters[0][name][layer].unsqueeze(0)
        layers = [p[name][layer] for p in self.parameters]
        return torch.stack([layers[adapter] for adapter in self.rows.chunks])

    def per_chunk(self, values: Sequence[float], like: Tensor) -> Tensor:
        """One number per adapter, spread over chunks: [chunks, 1, 1] in the dtype of `like`."""
        return like.new_tensor([values[adapter] for adapter in self.rows.chunks]).view(-1, 1, 1)


class Method(ABC):
    """A way to adapt the prompt."""

    name: ClassVar[str]
    config_type: ClassVar[type[MethodConfig]]

    def configure(self, fields: Mapping[str, Any]) -> Any:
        """The method's configuration out of plain fields. Raises AdapterError."""
        try:
            return self.config_type.model_validate(fields)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise AdapterError(f"configuration of {self.name}: {problems}") from error

    @abstractmethod
    def sites(self, config: Any) -> frozenset[Site]:
        """The sites that the contribution acts on."""

    @abstractmethod
    def shapes(self, config: Any, model: ModelShape) -> dict[str, tuple[int, ...]]:
        """Parameter names and shapes, without the leading dimension of layers."""

    @abstractmethod
    def initialise(self, config: Any, model: ModelShape, generator: torch.Generator) -> Parameters:
        """Fresh float32 parameters [layers, ...] with which the adapted model equals the plain one."""

    @abstractmethod
    def contribute(self, group: Group, layer: int, site: Site, value: Tensor, source: Tensor) -> Tensor:
        """The site's value [T, width] with the group's contribution in its rows; source [T, in_width]."""
