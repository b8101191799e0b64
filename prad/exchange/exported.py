"""What every exporter makes."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Exported:
    """`fields` of `adapter_config.json` that are the method's own, and tensors by PEFT's names."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]
