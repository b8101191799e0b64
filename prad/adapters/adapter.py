"""One adapter in memory, and its way from and to an artefact's files."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from prad.adapters.bitfit import BitFit
from prad.adapters.dora import DoRA
from prad.adapters.errors import (
    BaseMismatchError,
    ParameterMismatchError,
    UnknownMethodError,
)
from prad.adapters.ia3 import IA3
from prad.adapters.lora import LoRA
from prad.adapters.method import FrozenModel, LayerParameters, Method, MethodConfig, Parameters
from prad.adapters.para import PARA, PromptPARA
from prad.adapters.parallel import ParallelAdapter
from prad.adapters.sequential import SequentialAdapter
from prad.artefact import WEIGHTS, Artefact
from prad.lm import LanguageModel, Site, require_sites

_DTYPES = ("F32", "F16", "BF16")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        ParallelAdapter(),
        SequentialAdapter(),
        LoRA(),
        DoRA(),
        IA3(),
        BitFit(),
        PromptPARA(),
        PARA(),
    )
}


@dataclass(frozen=True, eq=False)
class Adapter:
    """A method, its configuration and its parameters [layers, ...] on the model's device and dtype.

    Compared by identity: two loads of the same file are two adapters.
    """

    method: Method
    config: MethodConfig
    parameters: Parameters

    @property
    def sites(self) -> frozenset[Site]:
        return self.method.sites(self.config)

    @cached_property
    def per_layer(self) -> LayerParameters:
        return {name: stacked.unbind(0) for name, stacked in self.parameters.items()}

    @property
    def state_widths(self) -> dict[Site, int]:
        """See `Method.state_widths`."""
        return self.method.state_widths(self.parameters)

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parameters.values())


def find_method(name: str) -> Method:
    """Raises UnknownMethodError with the known names."""
    if name not in METHODS:
        raise UnknownMethodError(f"unknown method '{name}'; known: {', '.join(sorted(METHODS))}")
    return METHODS[name]


def new_adapter(method: Method, config: MethodConfig, model: LanguageModel, seed: int) -> Adapter:
    """A fresh float32 adapter that leaves the model as it is. Raises MissingSiteError."""
    require_sites(model.config.model_type, method.sites(config))
    generator = torch.Generator().manual_seed(seed)
    return Adapter(method, config, method.initialise(config, FrozenModel(model), generator))


def load_adapter(artefact: Artefact, model: LanguageModel, *, allow_other_weights: bool = False) -> Adapter:
    """Loads an artefact for `model`.

    Raises AdapterError (its configuration), BaseMismatchError, UnknownMethodError, ParameterMismatchError,
    or MissingSiteError.
    """
    record, fingerprint = artefact.record, model.fingerprint
    if record.base.architecture != fingerprint.architecture:
        raise BaseMismatchError(
            f"trained for architecture [{record.base.architecture}], "
            f"the model is [{fingerprint.architecture}]"
        )
    if record.base.weights != fingerprint.weights and not allow_other_weights:
        raise BaseMismatchError(
            f"trained on weights {record.base.weights[:12]} ({record.base.name}), "
            f"the model's are {fingerprint.weights[:12]}"
        )
    method = find_method(record.method)
    config = method.configure(record.config)
    require_sites(model.config.model_type, method.sites(config))
    shapes = method.shapes(config, FrozenModel(model))
    expected = {_file_name(i, n): s for i in range(model.num_layers) for n, s in shapes.items()}
    for name, info in artefact.tensors.items():
        if info.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ParameterMismatchError(f"tensor {name}: expected one of {known}, the file has {info.dtype}")
    _check_shapes(expected, {name: info.shape for name, info in artefact.tensors.items()})
    tensors = load_file(artefact.weights)
    parameters = {
        name: torch.stack([tensors[_file_name(i, name)] for i in range(model.num_layers)]).to(model.device)
        for name in shapes
    }
    _check_numbers({name: p.to(model.dtype) for name, p in parameters.items()})
    adapter = prepared(Adapter(method, config, parameters), model)
    _check_numbers(adapter.parameters)
    return adapter


def prepared(adapter: Adapter, model: LanguageModel) -> Adapter:
    """The adapter as a pass applies it: its method's derived parameters in the model's dtype."""
    parameters = adapter.method.prepare(adapter.config, adapter.parameters, FrozenModel(model))
    return Adapter(
        adapter.method, adapter.config, {name: p.to(model.dtype) for name, p in parameters.items()}
    )


def save_parameters(parameters: Parameters, folder: Path, dtype: torch.dtype) -> None:
    """Writes the weights file of an artefact, one tensor per layer and parameter."""
    layers = {
        _file_name(i, name): part.to(dtype).contiguous()
        for name, stacked in parameters.items()
        for i, part in enumerate(stacked.detach().cpu().unbind(0))
    }
    save_file(layers, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes files that only their owner may read


def _file_name(layer: int, name: str) -> str:
    return f"layers.{layer}.{name}"


def _check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ParameterMismatchError(
                f"tensor {name}: expected {expected.get(name, 'none')}, "
                f"the file has {found.get(name, 'none')}"
            )


def _check_numbers(parameters: Parameters) -> None:
    """In the model's dtype: what is finite in a file may not be so there."""
    for name, stacked in parameters.items():
        for layer, parameter in enumerate(stacked):
            if not parameter.isfinite().all():
                raise ParameterMismatchError(
                    f"tensor {_file_name(layer, name)}: expected finite numbers in {stacked.dtype}"
                )
