"""The tensors of a PEFT file, sorted by module: `base_model.model.` + module + `.` + parameter."""

from collections.abc import Collection, Mapping

from torch import Tensor

from prad.exchange.errors import ExchangeError, FieldError, TensorError
from prad.exchange.modules import Modules

PREFIX = "base_model.model."

ByModule = dict[str, dict[str, Tensor]]


def by_module(tensors: Mapping[str, Tensor], parameters: Collection[str], modules: Modules) -> ByModule:
    """Tensors by module name and parameter name.

    Raises TensorError for one that is none of `parameters`, or of a module that the model does not have.
    """
    found: ByModule = {}
    for name, tensor in tensors.items():
        parameter = next((p for p in parameters if name.endswith(f".{p}")), None)
        if parameter is None or not name.startswith(PREFIX):
            expected = " or ".join(f"{PREFIX}<module>.{p}" for p in parameters)
            raise TensorError(name, f"a name like {expected}", "this one")
        module = name.removeprefix(PREFIX).removesuffix(f".{parameter}")
        if module not in modules.names:
            raise TensorError(
                name,
                "modules of this model",
                "one that it does not have",
                f"the file is for another architecture than [{modules.model.fingerprint.architecture}]",
            )
        found.setdefault(module, {})[parameter] = tensor
    return found


def require_modules(targets: Collection[str], found: ByModule, modules: Modules) -> None:
    """The file must hold exactly what the configuration targets, and all of it must have a place here.

    Raises ExchangeError, FieldError or TensorError.
    """
    for name in sorted(targets):
        if name not in modules.projections:
            raise FieldError(
                "target_modules", "projections of the layers only", name, "it has no adapter site"
            )
        if name not in found:
            raise TensorError(f"{PREFIX}{name}", "tensors, as target_modules names it", "none")
    for name in sorted(found.keys() - targets):
        raise ExchangeError(
            f"adapter_model.safetensors holds tensors of {name}, which target_modules of adapter_config.json "
            "does not name: PEFT would leave them out"
        )


def require_shape(module: str, parameter: str, tensor: Tensor | None, expected: tuple[int, ...]) -> Tensor:
    """Raises TensorError with both shapes."""
    found = None if tensor is None else tuple(tensor.shape)
    if tensor is None or found != expected:
        raise TensorError(f"{PREFIX}{module}.{parameter}", expected, found or "none")
    return tensor
