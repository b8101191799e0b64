"""What stands between a PEFT folder and an artefact."""

from typing import Any

from prad.core.errors import PradError


class ExchangeError(PradError):
    """A folder that cannot be imported or exported; the message names the file and what was expected."""


class FieldError(ExchangeError):
    """A field of `adapter_config.json` that cannot be honoured here."""

    def __init__(self, field: str, expected: str, found: Any, why: str = "") -> None:
        reason = f" ({why})" if why else ""
        super().__init__(f"adapter_config.json: {field}: expected {expected}, found {found!r}{reason}")


class TensorError(ExchangeError):
    """A tensor of `adapter_model.safetensors` that does not fit the configuration or the model."""

    def __init__(self, tensor: str, expected: Any, found: Any, why: str = "") -> None:
        reason = f" ({why})" if why else ""
        super().__init__(f"adapter_model.safetensors: {tensor}: expected {expected}, found {found}{reason}")
