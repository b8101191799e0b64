"""What every importer makes: a method, its configuration and its parameters, as an artefact holds them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prad.adapters.method import Parameters


@dataclass(frozen=True)
class Imported:
    """`config`: the method's part of `prad.json`; parameters [layers, ...]."""

    method: str
    config: dict[str, Any]
    parameters: Parameters
    virtual_tokens: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The one that holds every matrix exactly; vectors are float32 in an artefact."""
        found = {p.dtype for p in self.parameters.values() if p.dim() > 2}
        return found.pop() if len(found) == 1 else torch.float32


def stack(layers: Mapping[int, Tensor], count: int, missing: Tensor) -> Tensor:
    """[count, ...]: one tensor a layer, `missing` in those that have none."""
    tensors = [layers.get(i, missing) for i in range(count)]
    dtypes = {t.dtype for t in layers.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return torch.stack([t.to(dtype) for t in tensors])
