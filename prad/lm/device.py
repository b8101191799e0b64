"""Where a model computes: the one place that reads a device's name."""

import re

import torch

from prad.lm.errors import DeviceError

_NAMES = re.compile(r"cpu|cuda(:(?P<index>0|[1-9][0-9]*))?")


def require_device(name: str) -> None:
    """Raises DeviceError if `name` is not cpu, cuda or cuda:N, or this machine does not have it."""
    found = _NAMES.fullmatch(name)
    if found is None:
        raise DeviceError(f"device: expected cpu, cuda or cuda:N, got '{name}'")
    if name == "cpu":
        return
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device '{name}': torch {torch.__version__} finds no GPU on this machine; cpu works everywhere"
        )
    count = torch.cuda.device_count()
    if int(found["index"] or 0) >= count:
        raise DeviceError(f"device '{name}': this machine has cuda:0 to cuda:{count - 1}")
